"""What people say: a split by whole phrasings, words the tokenizer knows, and replies that can be read back."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SOURCE, raised

from nmlib import layout, phrases
from nmlib.names import names
from nmlib.people import PEOPLE_ATTRIBUTES
from nmlib.photos import PhotoSource
from nmlib.sources import Attribute
from nmlib.world import WorldSource

MAX_ROUNDS = 64
WORLD = WorldSource(16)
SETS = {"toy": SOURCE.attributes, "world": WORLD.attributes, "photos": PhotoSource(16).attributes}
TOKENIZERS = {name: layout.build_tokenizer(attributes, 4, MAX_ROUNDS) for name, attributes in SETS.items()}
SPLITS = ("train", "heldout")


def sentences(attributes: tuple[Attribute, ...], rng: random.Random, split: str) -> list[str]:
    """One sentence of every kind of the grammar."""
    attribute = rng.choice(attributes)
    value = rng.choice(attribute.values)
    index, depth = rng.randrange(MAX_ROUNDS), rng.randint(1, len(phrases.NUMBERS))
    references: list[Callable[[], str]] = [
        lambda: phrases.count_clause(rng, depth),
        lambda: phrases.ordinal_clause(rng, index),
        lambda: phrases.content_clause(rng, attribute, value, rng.random() < 0.5),
        lambda: phrases.start_clause(rng),
        lambda: phrases.quote_clause(rng, "Make the square RED, please!"),
    ]
    commands: list[Callable[[], str] | None] = [None, lambda: phrases.edit_clause(rng, attribute, value)]
    rolled = [phrases.rollback_sentence(rng, make, rng.choice(commands), split) for make in references[:-1]]
    states = [rng.randrange(len(a.values)) for a in attributes]
    what = f"{value} {attribute.name}"
    said = [("", ""), (what, ""), ("", attribute.name), (what, what)]
    replies = [
        phrases.response(style, index, rng.choice([None, depth]), str(index), *rng.choice(said))
        for style in ("grounded", "polite")
    ]
    plain = [phrases.upload_sentence(rng), phrases.describe_sentence(rng, attributes, states), *replies]
    return [phrases.edit_sentence(rng, attribute, value, split), *rolled, *plain]


# ---------------------------------------------------------------------------------------------------------
# words


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(SETS)), seed=st.integers(0, 10**9), split=st.sampled_from(SPLITS))
def test_the_tokenizer_knows_every_sentence(name: str, seed: int, split: str) -> None:
    for text in sentences(SETS[name], random.Random(seed), split):
        words = TOKENIZERS[name].tokenize(text)
        assert layout.UNK not in words and " ".join(words) == text


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(sorted(SETS)), seed=st.integers(0, 10**9))
def test_sentences_are_clean_already(name: str, seed: int) -> None:
    """`clean` is what typed text goes through; it must not change what the model was trained on."""
    for text in sentences(SETS[name], random.Random(seed), "any"):
        assert phrases.clean(text) == text
        assert "{" not in text


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("  Make the WALL   blue!!", "make the wall blue"),
        ("Go back to #2, please.", "go back to #2 please"),
        ("it's\n<img> [INST]", "it s img inst"),
        ("??!", ""),
    ],
)
def test_clean(typed: str, expected: str) -> None:
    assert phrases.clean(typed) == expected


# ---------------------------------------------------------------------------------------------------------
# the split


def test_an_eighth_of_all_phrasings_is_held_out() -> None:
    texts = {
        f"{opener} {command} {closer}".strip()
        for attribute in WORLD.attributes
        for commands in attribute.commands.values()
        for command in commands
        for opener in phrases.OPENERS
        for closer in phrases.CLOSERS
    }
    share = sum(map(phrases.is_heldout, texts)) / len(texts)
    assert len(texts) > 5000 and abs(share - 1 / phrases.HELDOUT_SHARE) < 0.01


def test_the_split_is_the_same_on_every_machine() -> None:
    """`printf 'make the wall blue' | b2sum -l 32` begins with the byte d0, a multiple of 8; the others do not."""
    held = {text: phrases.is_heldout(text) for text in ("undo that", "start over", "make the wall blue")}
    assert held == {"undo that": False, "start over": False, "make the wall blue": True}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), split=st.sampled_from(SPLITS))
def test_sentences_come_from_their_split(seed: int, split: str) -> None:
    for text in sentences(WORLD.attributes, random.Random(seed), split)[:5]:
        assert phrases.is_heldout(text) == (split == "heldout")


def test_every_word_is_seen_in_training() -> None:
    """Whole phrasings are held out, single words are not."""
    rng, seen = random.Random(0), set[str]()
    for _ in range(4000):
        for text in sentences(WORLD.attributes, rng, "train"):
            seen |= set(text.split())
    markers = {phrases.marker(index) for index in range(MAX_ROUNDS)}
    unseen = set(phrases.vocabulary(WORLD.attributes)) - seen
    assert unseen <= {"said"}, f"never in training: {sorted(unseen)}"  # of quotes, which exact sources never make
    assert markers <= seen


def about_people(rng: random.Random, name: str, split: str) -> list[str]:
    """One sentence of every kind with a name."""
    places = rng.sample(range(8), 4)
    values = [rng.randrange(len(a.values)) or int(a.name in ("framing", "pose")) for a in PEOPLE_ATTRIBUTES]
    attributes, said = [PEOPLE_ATTRIBUTES[p] for p in places], [values[p] for p in places]
    return [
        phrases.introduce_sentence(rng, name, split),
        phrases.introduce_by_words(rng, name, attributes, said, split),
        phrases.recall_sentence(rng, name, attributes, said, split),
        phrases.rename_sentence(rng, name, lambda: phrases.edit_clause(rng, attributes[0], "own"), split)
        if attributes[0].name in ("framing", "pose")
        else phrases.rename_sentence(rng, name, lambda: "go away", split),
    ]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), split=st.sampled_from(SPLITS))
def test_sentences_about_people_are_split_by_the_words_around_the_name(seed: int, split: str) -> None:
    rng = random.Random(seed)
    name = rng.choice(names("any"))
    for text in about_people(rng, name, split):
        assert name in text.split() and phrases.clean(text) == text and "{" not in text
        assert phrases.is_heldout(phrases.without_name(text, name)) == (split == "heldout")


def test_every_word_about_people_is_seen_in_training() -> None:
    rng, seen = random.Random(1), set[str]()
    for _ in range(3000):
        for text in about_people(rng, "zoe", "train"):
            seen |= set(text.split())
    own = set(phrases.vocabulary(PEOPLE_ATTRIBUTES, ["zoe"])) - set(phrases.vocabulary(PEOPLE_ATTRIBUTES))
    assert own and not own - seen, f"never in training: {sorted(own - seen)}"
    assert "zoe" not in phrases.vocabulary(PEOPLE_ATTRIBUTES)


def test_a_grammar_without_a_sentence_in_the_split_says_so() -> None:
    text = raised(lambda: phrases.draw(lambda: "start over", "heldout"), ValueError)
    assert text == "no sentence like 'start over' in split 'heldout': the grammar is too small; add phrasings"
    assert "split 'test': expected" in raised(lambda: phrases.draw(lambda: "x", "test"), ValueError)


# ---------------------------------------------------------------------------------------------------------
# references and replies


def clauses(make: Callable[[random.Random], str]) -> set[str]:
    return {make(random.Random(seed)) for seed in range(200)}


def test_counting_is_right_at_both_ends() -> None:
    assert clauses(lambda rng: phrases.count_clause(rng, 1)) == set(phrases.UNDO_ONE)
    assert "undo the last two changes" in clauses(lambda rng: phrases.count_clause(rng, 2))
    assert "go back sixteen steps" in clauses(lambda rng: phrases.count_clause(rng, 16))
    assert "depth 17" in raised(lambda: phrases.count_clause(random.Random(0), 17), ValueError)
    assert "depth 0" in raised(lambda: phrases.count_clause(random.Random(0), 0), ValueError)


def test_ordinals_are_right_at_both_ends() -> None:
    first = clauses(lambda rng: phrases.ordinal_clause(rng, 0))
    assert {"go back to picture one", "go back to the first picture", "go back to #1"} <= first
    last = clauses(lambda rng: phrases.ordinal_clause(rng, 15))
    assert {"go back to picture sixteen", "take the sixteenth picture", "go back to #16"} <= last
    beyond = clauses(lambda rng: phrases.ordinal_clause(rng, 16))
    assert beyond == {"go back to #17"}, "numbers without a word are named by their marker"


@given(index=st.integers(1, 63), data=st.data())
def test_a_grounded_reply_can_be_read_back(index: int, data: st.DataObject) -> None:
    base = data.draw(st.integers(0, index - 1))
    edit, before = data.draw(st.sampled_from(["", "pink hair"])), data.draw(st.sampled_from(["", "hat", "cap hat"]))
    text = phrases.response("grounded", index, base, "whatever", edit, before)
    assert phrases.base_of_response(text, index) == base
    assert phrases.base_of_response(phrases.response("grounded", index, None, "whatever"), index) is None
    assert phrases.base_of_response(phrases.response("polite", index, base, text), index) is None


def test_grounded_replies_by_hand() -> None:
    def reply(base: int | None, edit: str = "", before: str = "") -> str:
        return phrases.response("grounded", 5, base, "", edit, before)

    assert reply(None) == "#6"
    assert reply(3) == "#4 to #6"
    assert reply(4, "pink hair") == "pink hair #5 to #6"
    assert reply(1, before="hat") == "before hat #2 to #6"
    assert phrases.response("grounded", 5, 1, "", name="olivia") == "said olivia #2 to #6"
    assert reply(1, "pink hair", "cap hat") == "before cap hat #2 then pink hair to #6"


def test_polite_replies_are_a_function_of_the_instruction() -> None:
    replies = {text: phrases.response("polite", 3, 1, text) for text in map(str, range(60))}
    assert replies == {text: phrases.response("polite", 9, None, text) for text in replies}
    assert set(replies.values()) == set(phrases.POLITE)
