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
    assert not set(WORDS) & {*SOURCE.names, "said", "before", "ago", "then", "to", "third", "three"}
    assert {"hat", "blue", "changed"} <= set(WORDS)


def numbered(text: str, index: int) -> tuple[int, int] | None:
    """The round that the first words of a text name by number or distance, and how many words that takes."""
    first, second = [*text.split(), "", ""][:2]
    if second == "ago":
        return index - 2 - phrases.NUMBERS.index(first), 2
    for place in range(16):
        if first in (phrases.ORDINALS[place], phrases.NUMBERS[place], phrases.marker(place)):
            return place, 1
    return None


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rounds=st.integers(1, 12), named=st.booleans())
def test_every_question_has_the_answer_that_the_reply_gives(seed: int, rounds: int, named: bool) -> None:
    """A second reader, who has seen only what was said before, gives the same replies."""
    said: dict[str, int] = {}
    behind: dict[str, str] = {}
    names = SOURCE.names if named else ()
    for index, (text, reply) in enumerate(lookup.exercise(WORDS, names, rounds, random.Random(seed))):
        here, spoken = phrases.marker(index), text.split()
        called = [word for word in spoken if word in SOURCE.names]
        if (found := numbered(text, index)) is not None:
            place, length = found
            assert 0 <= place < index
            fresh, start = spoken[length:], phrases.marker(place)
            expected = [*fresh[-1:], start, "to", here]
        elif spoken[0] == "said":
            fresh, start = spoken[2:], ""
            expected = ["said", spoken[1], phrases.marker(said[spoken[1]]), "to", here]
        elif spoken[0] == "before":
            fresh, start = spoken[2:], ""
            expected = ["before", spoken[1], behind[spoken[1]], *(["then", fresh[-1]] if fresh else []), "to", here]
        elif called:
            assert named and len(called) == 1
            for word in spoken:
                said.setdefault(word, index)
            fresh, start = [], ""
            expected = ["said", called[0], phrases.marker(said[called[0]]), "to", here]
        else:
            fresh, start = spoken, phrases.marker(index - 1) if index else ""
            expected = [fresh[-1], *([start, "to"] if start else []), here]
        assert reply == " ".join(expected)
        assert not set(fresh) & set(said) and len(set(fresh)) == len(fresh)
        said |= dict.fromkeys(fresh, index)
        behind |= dict.fromkeys(fresh[-1:], start) if start else {}


def test_all_ways_to_ask_are_practised() -> None:
    told = lookup.exercises(WORDS, (), 60, 12, random.Random(1))
    asked = [(text.split(), reply.split()) for dialogue in told for text, reply in dialogue[1:]]
    kinds = {
        "ordinal": lambda said, _: said[0] in phrases.ORDINALS,
        "number": lambda said, _: said[0] in phrases.NUMBERS and said[1:2] != ["ago"],
        "marker": lambda said, _: said[0].startswith("#"),
        "distance": lambda said, _: said[1:2] == ["ago"],
        "number with new words": lambda said, reply: said[0].startswith("#") and reply[0] == said[-1],
        "word": lambda said, _: said[0] == "said",
        "before": lambda said, reply: said[0] == "before" and "then" not in reply,
        "before with new words": lambda said, reply: said[0] == "before" and "then" in reply,
    }
    for name, is_kind in kinds.items():
        assert sum(is_kind(said, reply) for said, reply in asked) > 10, name


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
