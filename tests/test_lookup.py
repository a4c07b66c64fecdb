"""Exercises in finding what was said: every question has one answer, and it is the one that the reply gives."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmlib import layout, lookup, phrases
from nmlib.layout import IGNORE, Template
from nmlib.names import names
from nmlib.people import PeopleSource

SOURCE = PeopleSource(32)
WORDS = lookup.spoken_words(SOURCE)


def test_words_are_no_names_and_no_words_of_replies() -> None:
    assert not set(WORDS) & {*SOURCE.names, "said", "before", "to"}
    assert {"hat", "blue", "third"} <= set(WORDS)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rounds=st.integers(1, 12), named=st.booleans())
def test_every_question_has_the_answer_that_the_reply_gives(seed: int, rounds: int, named: bool) -> None:
    said: dict[str, int] = {}
    behind: dict[str, str] = {}
    names = SOURCE.names if named else ()
    for index, (text, reply) in enumerate(lookup.exercise(WORDS, names, rounds, random.Random(seed))):
        here = phrases.marker(index)
        assert reply.endswith(here)
        called = [word for word in text.split() if word in SOURCE.names]
        if text.startswith("said "):
            word = text.removeprefix("said ")
            assert reply == f"said {word} {phrases.marker(said[word])} to {here}"
        elif text.startswith("before "):
            word = text.removeprefix("before ")
            assert reply == f"before {word} {behind[word]} to {here}" and behind[word] == phrases.marker(said[word] - 1)
        elif called:
            assert named and len(called) == 1
            for word in text.split():
                said.setdefault(word, index)
            assert reply == f"said {called[0]} {phrases.marker(said[called[0]])} to {here}"
        elif text in phrases.ORDINALS:
            assert reply == f"{phrases.marker(phrases.ORDINALS.index(text))} to {here}"
            assert phrases.ORDINALS.index(text) < index
        else:
            fresh = text.split()
            assert not set(fresh) & set(said) and len(set(fresh)) == len(fresh)
            said |= dict.fromkeys(fresh, index)
            assert reply.split()[0] == fresh[-1]
            if index:
                behind[fresh[-1]] = reply.split()[1]


def test_names_come_back_and_held_out_ones_are_known_as_words() -> None:
    told = lookup.exercises(WORDS, SOURCE.names, 200, 8, random.Random(1))
    replies = [reply.split() for dialogue in told for _, reply in dialogue if reply.startswith("said ")]
    heard = {words[1] for words in replies}
    assert heard & set(names("heldout")) and heard & set(names("train"))
    returned = [words for words in replies if words[1] in SOURCE.names and words[2] != words[-1]]
    assert len(returned) > 200


def test_the_layout_of_a_dialogue_by_hand() -> None:
    """Words keep the places they would have beside pictures of five tokens; only the replies are learned."""
    template = Template(layout.build_tokenizer(SOURCE.attributes, 5, 3, SOURCE.names), 5, "grounded")
    batch = template.spoken([[("blue hat", "hat #1"), ("said hat", "said hat #1 to #2")]])
    words = template.tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    assert words[:8] == ["<s>", "[INST]", "blue", "hat", "[/INST]", "hat", "#1", "<img>"]
    assert words[8:] == [
        "</img>",
        "[INST]",
        "said",
        "hat",
        "[/INST]",
        "said",
        "hat",
        "#1",
        "to",
        "#2",
        "<img>",
        "</img>",
    ]
    assert batch.position_ids[0, 7:10].tolist() == [7, 13, 14]
    assert batch.rounds[0].tolist() == [0] * 9 + [1] * 11
    learned = [word for word, label in zip(words, batch.labels[0].tolist(), strict=True) if label != IGNORE]
    assert learned == ["[/INST]", "hat", "#1", "[/INST]", "said", "hat", "#1", "to", "#2"]
    assert not len(batch.queries) and not len(batch.history)


@pytest.mark.parametrize("count", [1, 3])
def test_exercises_are_a_function_of_their_chance(count: int) -> None:
    first, again = (lookup.exercises(WORDS, (), count, 7, random.Random(5)) for _ in range(2))
    assert first == again and len(first) == count and {len(dialogue) for dialogue in first} == {7}
    assert first != lookup.exercises(WORDS, (), count, 7, random.Random(6))
