"""The rollback builder: every round says truly where it starts from, whatever the source of the chain."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import SOURCE, ToySource, conversations, make_round, raised

from nmlib import phrases, rollback
from nmlib.config import DataConfig
from nmlib.conversation import Conversation, ConversationError, Edit
from nmlib.rollback import ConversationBuilder, ExactEditor
from nmlib.sources import Source, attribute_index
from nmlib.world import WorldSource

WORLD = WorldSource(16)
seeds = st.integers(0, 10**6)


def config(**changes: Any) -> DataConfig:
    given_: dict[str, Any] = {"conversations": 3, "rounds": (6,), "rollback_share": 0.7, "max_depth": 3}
    return DataConfig(**(given_ | changes))


def builder(source: Source = SOURCE, split: str = "train", **changes: Any) -> ConversationBuilder:
    return ConversationBuilder(source.attributes, ExactEditor(source, "any"), config(**changes), split)


def after(source: Source, values: tuple[int, ...], edit: Edit | None) -> tuple[int, ...]:
    """A state with an edit applied."""
    changed = list(values)
    if edit is not None:
        place = attribute_index(source, edit.attribute)
        changed[place] = source.attributes[place].values.index(edit.value)
    return tuple(changed)


def chain(rounds: int, seed: int = 0, source: Source = SOURCE) -> Conversation:
    """A Markov chain with exact states."""
    rng, made = random.Random(seed), builder(source)
    conversation = rollback.open_conversation(source, f"chain-{seed}", torch.tensor([0.1, 0.2]), rng, split="any")
    while len(conversation) < rounds:
        conversation = made.edit(conversation, len(conversation) - 1, rng)
    return conversation


class Turned(ToySource):
    """The toy source with a first attribute that no single picture reveals."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes = (
            replace(self.attributes[0], relative=True, brought=self.attributes[0].values[1]),
            *self.attributes[1:],
        )


def test_a_picture_that_is_brought_is_as_it_was_taken() -> None:
    """What no picture reveals has the value of all such pictures; a picture made from words may have any."""
    source, first = Turned(), dict[bool, set[int]]()
    for describe in (False, True):
        opened = [
            rollback.open_conversation(
                source, "x", torch.tensor([0.1, 0.2]), random.Random(seed), split="any", describe=describe
            )
            for seed in range(60)
        ]
        states = [values for conversation in opened if (values := conversation.rounds[0].values)]
        first[describe] = {values[0] for values in states}
        assert {values[1] for values in states} == set(range(len(source.attributes[1].values)))
    assert first == {False: {1}, True: set(range(len(source.attributes[0].values)))}


def test_brought_must_be_a_value_and_what_is_relative_needs_one() -> None:
    edge = ToySource().attributes[2]
    message = raised(lambda: replace(edge, brought="gold"), ValueError)
    assert message == "attribute 'edge': brought is 'gold', expected one of ['none', 'white', None]"
    message = raised(lambda: replace(edge, relative=True), ValueError)
    assert message == "attribute 'edge': brought is None, expected one of ['none', 'white']"


# ---------------------------------------------------------------------------------------------------------
# whole data sets


@settings(max_examples=100, deadline=None)
@given(seed=seeds, name=st.sampled_from(["toy", "world"]), split=st.sampled_from(["train", "heldout"]))
def test_every_round_is_its_base_with_its_edit(seed: int, name: str, split: str) -> None:
    source = SOURCE if name == "toy" else WORLD
    settings_ = config(rounds=(3, 5, 7), describe_share=0.5)
    for conversation in rollback.build_conversations(source, settings_, seed=seed, split=split):
        conversation.validate()
        assert len(conversation) in (3, 5, 7)
        for index, item in enumerate(conversation.rounds[1:], start=1):
            assert item.base is not None and item.base < index
            assert conversation.depth(index) <= settings_.max_depth
            assert (conversation.depth(index) > 0) == (item.kind == "rollback") == (item.reference != "none")
            base = conversation.rounds[item.base].values
            assert base is not None and item.values == after(source, base, item.edit)
            assert item.edit is None or item.values != base, "an edit changes something"
            assert item.edit is not None or item.kind == "rollback"


@settings(max_examples=60, deadline=None)
@given(seed=seeds, split=st.sampled_from(["train", "heldout"]))
def test_splits_share_no_phrasing_no_subject_and_training_no_heldout_state(seed: int, split: str) -> None:
    for conversation in rollback.build_conversations(SOURCE, config(), seed=seed, split=split):
        for item in conversation.rounds[1:]:
            assert phrases.is_heldout(item.instruction) == (split == "heldout")
        subjects = {item.subject for item in conversation.rounds}
        assert len(subjects) == 1 and ((subjects.pop() or (0,))[0] > 0.75) == (split == "heldout")
        if split == "train":
            assert not any(rollback.is_heldout_state(item.values or ()) for item in conversation.rounds)


def test_an_eighth_of_the_states_is_held_out_and_heldout_data_shows_them() -> None:
    states = torch.cartesian_prod(*[torch.arange(len(a.values)) for a in WORLD.attributes]).tolist()
    share = sum(map(rollback.is_heldout_state, states)) / len(states)
    assert abs(share - 1 / rollback.HELDOUT_STATES) < 0.01
    made = rollback.build_conversations(SOURCE, config(conversations=30), seed=0, split="heldout")
    assert any(rollback.is_heldout_state(item.values or ()) for c in made for item in c.rounds)


def test_shares_and_depths_are_settings() -> None:
    none = rollback.build_conversations(SOURCE, config(conversations=20, rollback_share=0.0), seed=1, split="train")
    assert all(conversation.is_markov for conversation in none)
    assert {
        c.rounds[0].kind
        for c in rollback.build_conversations(SOURCE, config(describe_share=0.0), seed=1, split="train")
    } == {"upload"}
    assert {
        c.rounds[0].kind
        for c in rollback.build_conversations(SOURCE, config(describe_share=1.0), seed=1, split="train")
    } == {"describe"}
    always = rollback.build_conversations(SOURCE, config(conversations=40, rollback_share=1.0), seed=1, split="train")
    depths = {c.depth(index) for c in always for index in range(len(c))}
    assert depths == {0, 1, 2, 3}
    references = {item.reference for c in always for item in c.rounds}
    assert references == {"none", "count", "ordinal", "content", "start"}
    assert {item.edit is None for c in always for item in c.rounds if item.kind == "rollback"} == {True, False}


def test_named_references_may_reach_deeper_than_counting() -> None:
    deep = config(conversations=60, rounds=(8,), rollback_share=1.0, max_depth=1, named_depth=6)
    made = rollback.build_conversations(SOURCE, deep, seed=1, split="train")
    depths: dict[str, set[int]] = {}
    for conversation in made:
        for index, item in enumerate(conversation.rounds):
            depths.setdefault(item.reference, set()).add(conversation.depth(index))
    assert depths["count"] == {1} and max(depths["ordinal"]) == 6 and max(depths["start"]) > 1


def test_counting_may_reach_deeper_than_named_references_as_far_as_there_are_words() -> None:
    words = len(phrases.NUMBERS)
    settings_ = config(conversations=20, rounds=(words + 4,), rollback_share=0.9, max_depth=words + 3, named_depth=2)
    depths: dict[str, set[int]] = {}
    for conversation in rollback.build_conversations(SOURCE, settings_, seed=1, split="train"):
        for index, item in enumerate(conversation.rounds):
            depths.setdefault(item.reference, set()).add(conversation.depth(index))
    assert max(depths["count"]) == words
    assert all(max(found) <= 2 for kind, found in depths.items() if kind != "count") and "ordinal" in depths


def test_a_seed_gives_the_same_conversations_and_another_one_others() -> None:
    first, again = (rollback.build_conversations(SOURCE, config(), seed=4, split="train") for _ in range(2))
    assert first == again
    assert first != rollback.build_conversations(SOURCE, config(), seed=5, split="train")


# ---------------------------------------------------------------------------------------------------------
# references


@settings(max_examples=60, deadline=None)
@given(seed=seeds, rounds=st.integers(2, 8), data=st.data())
def test_references_are_unambiguous(seed: int, rounds: int, data: st.DataObject) -> None:
    """A reference by content names an attribute (or a look) that changed once, right after its base."""
    made, rng = builder(rollback_share=0.4), random.Random(seed)
    conversation = rollback.from_chain(chain(rounds, seed), made, rng, rounds + 2)
    base = data.draw(st.integers(0, len(conversation) - 2))
    options = made.references(conversation, base, rng)
    assert ("start" in options) == (base == 0)
    assert (
        phrases.NUMBERS[base] in (text := options["ordinal"]())
        or phrases.ORDINALS[base] in text
        or f"#{base + 1}" in text
    )
    if "content" in options:
        text, item = options["content"](), conversation.rounds[base + 1]
        edits = [other.edit for other in conversation.rounds if other.edit is not None]
        assert item.base == base and item.edit is not None
        attribute = SOURCE.attributes[attribute_index(SOURCE, item.edit.attribute)]
        looks = attribute.looks[item.edit.value]
        if text.endswith(looks):
            assert edits.count(item.edit) == 1
            first = conversation.rounds[0].values
            assert first is not None and after(SOURCE, first, item.edit) != first, "the first picture has not this look"
        else:
            assert any(noun in text for noun in attribute.nouns)
            assert sum(edit.attribute == attribute.name for edit in edits) == 1


def test_references_by_hand() -> None:
    """Rounds: upload; ground changed twice (1, 3); square once (2)."""
    rounds = (
        make_round("upload", "here is a picture", values=(1, 0, 0)),
        make_round("edit", "make the ground light", 0, ("ground", "light"), (1, 1, 0)),
        make_round("edit", "make the square red", 1, ("square", "red"), (0, 1, 0)),
        make_round("edit", "make the ground dark", 2, ("ground", "dark"), (0, 0, 0)),
    )
    told, made, rng = Conversation("hand", "toy", rounds), builder(), random.Random(0)

    def said(base: int) -> set[str]:
        return {made.references(told, base, rng)["content"]() for _ in range(200)}

    nouns, looks = SOURCE.attributes[0].nouns, SOURCE.attributes[0].looks["red"]
    assert said(1) == {t.format(noun=n) for t in phrases.CONTENT_NOUN for n in nouns} | {
        t.format(look=look) for t in phrases.CONTENT_LOOK for look in looks
    }
    assert said(0) == {t.format(look=k) for t in phrases.CONTENT_LOOK for k in SOURCE.attributes[1].looks["light"]}
    assert "content" not in made.references(told, 2, rng), "the ground was dark to begin with, and changed twice"
    assert set(made.references(told, 2, rng)) == {"count", "ordinal"}


def test_a_wanted_reference_is_taken_or_refused() -> None:
    told, made = chain(5, seed=2), builder()
    for seed in range(20):
        rolled = made.roll_back(told, 4, random.Random(seed), branch=False, reference="start")
        assert rolled.rounds[-1].reference == "start" and rolled.rounds[-1].base == 0
    text = raised(lambda: made.roll_back(told, 1, random.Random(0), branch=False, reference="start"), ConversationError)
    assert "round 3 cannot be named by 'start'; possible: [" in text and "'count', 'ordinal'" in text


def test_long_conversations_run_out_of_number_words_but_not_of_references() -> None:
    made, told, rng = builder(), chain(40), random.Random(0)
    for depth in (16, 17, 39):
        assert ("count" in made.references(told, 39 - depth, rng)) == (depth == 16)
        made.roll_back(told, depth, rng, branch=False, reference="ordinal").validate()


@pytest.mark.parametrize("depth", [0, 4, -1])
def test_depths_that_do_not_exist(depth: int) -> None:
    text = raised(lambda: builder().roll_back(chain(4), depth, random.Random(0), branch=False), ConversationError)
    assert text == f"conversation 'chain-0': depth {depth} does not exist after 4 rounds; expected 1 to 3"


# ---------------------------------------------------------------------------------------------------------
# any chain


@settings(max_examples=100, deadline=None)
@given(seed=seeds, length=st.integers(2, 6), rounds=st.integers(3, 8))
def test_the_chains_own_rounds_come_first(seed: int, length: int, rounds: int) -> None:
    told = chain(length, seed)
    made = rollback.from_chain(told, builder(rollback_share=1.0), random.Random(seed), rounds)
    kept = next(index for index, item in enumerate(made.rounds) if item.kind == "rollback")
    assert len(made) == rounds and 2 <= kept <= min(length, rounds - 1)
    assert made.rounds[:kept] == told.rounds[:kept]


def test_only_markov_chains_of_two_rounds_or_more() -> None:
    for wrong in (chain(2).prefix(1), conversations()[0]):
        text = raised(lambda c=wrong: rollback.from_chain(c, builder(), random.Random(0), 5), ConversationError)  # type: ignore[misc]
        assert text == f"conversation {wrong.id!r}: expected a Markov chain of at least two rounds"


@dataclass
class PaintBrush:
    """A stand-in for an image-editing model: inverts the picture and writes down what it was asked."""

    left: int = 1000
    asked: list[tuple[int, str]] = field(default_factory=list)

    def propose(self, conversation: Conversation, base: int, rng: random.Random) -> tuple[None, str] | None:
        self.left -= 1
        return (
            (None, f"add {rng.choice(['snow', 'rain', 'stars'])} number {rng.randrange(99)}")
            if self.left >= 0
            else None
        )

    def apply(
        self, conversation: Conversation, base: int, edit: Edit | None, clause: str
    ) -> tuple[tuple[int, ...] | None, Tensor | None]:
        assert conversation.images is not None and edit is None
        self.asked.append((base, clause))
        return None, 255 - conversation.images[base]


def photographs(instructions: tuple[str, ...]) -> Conversation:
    """A chain of which only pictures and instructions are known."""
    rounds = [make_round("upload", "here is a picture")]
    rounds += [make_round("edit", text, base) for base, text in enumerate(instructions)]
    images = torch.randint(
        0, 256, (len(rounds), 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return Conversation("photo", "magicbrush", tuple(rounds), images)


@settings(max_examples=100, deadline=None)
@given(seed=seeds)
def test_a_chain_of_pictures_and_instructions_is_enough(seed: int) -> None:
    told, brush = photographs(("Make it Night!", "remove the car", "zoom in")), PaintBrush()
    made = ConversationBuilder((), brush, config(rollback_share=0.8), "any")
    rolled = rollback.from_chain(told, made, random.Random(seed), 9).validate()
    assert rolled.images is not None and rolled.images.shape == (9, 3, 5, 7)
    pictures, asked = iter(brush.asked), 0
    for index, item in enumerate(rolled.rounds):
        if index >= 4 or item != told.rounds[index]:
            assert item.base is not None and item.values is None and item.edit is None
            base, picture = rolled.images[item.base], rolled.images[index]
            if torch.equal(picture, 255 - base):
                where, clause = next(pictures)
                assert where == item.base and clause in item.instruction, "the words ask for what was painted"
                asked += 1
            else:
                assert torch.equal(picture, base) and item.kind == "rollback", "a pure rollback shows its base"
    assert asked == len(brush.asked), "nothing is painted that nobody asked for"


def test_a_quoted_instruction_must_be_the_only_one_of_its_words() -> None:
    made, rng = ConversationBuilder((), PaintBrush(), config(), "any"), random.Random(0)
    twice = photographs(("make it darker", "remove the car", "Make it darker!"))
    assert "content" not in made.references(twice, 0, rng) and "content" not in made.references(twice, 2, rng)
    quote = made.references(twice, 1, rng)["content"]()
    assert quote in {t.format(quote="remove the car") for t in phrases.CONTENT_QUOTE}


def test_an_editor_without_ideas_rolls_back_without_an_edit_or_says_so() -> None:
    made = ConversationBuilder((), PaintBrush(left=0), config(), "any")
    told = photographs(("remove the car",))
    rolled = made.roll_back(told, 1, random.Random(0), branch=True)
    assert rolled.images is not None and torch.equal(rolled.images[2], rolled.images[0])
    text = raised(lambda: made.edit(told, 1, random.Random(0)), ConversationError)
    assert text == "conversation 'photo': no edit left to make from round 1"


def test_exact_edits_need_exact_states() -> None:
    made = ConversationBuilder(SOURCE.attributes, ExactEditor(SOURCE), config(), "any")
    text = raised(lambda: made.edit(photographs(("x",)), 1, random.Random(0)), ConversationError)
    assert text == "conversation 'photo', round 1: field 'values' is empty; exact edits need the state"


# ---------------------------------------------------------------------------------------------------------
# pictures


def test_with_images_draws_every_state() -> None:
    made = rollback.build_conversations(SOURCE, config(conversations=4), seed=2, split="train")
    drawn = rollback.with_images(SOURCE, made, chunk=7)
    assert [replace(conversation, images=None) for conversation in drawn] == made
    for conversation in drawn:
        assert conversation.images is not None and conversation.images.dtype == torch.uint8
        for image, item in zip(conversation.images, conversation.rounds, strict=True):
            picture = SOURCE.render(torch.tensor([item.subject]), torch.tensor([item.values]))[0]
            assert torch.equal(image, (picture * 255).round().to(torch.uint8))


def test_exact_branches_of_a_drawn_chain_have_no_stale_pictures() -> None:
    """The exact editor leaves pictures to `with_images`; until then there must be none rather than wrong ones."""
    told = rollback.with_images(SOURCE, [chain(3)])[0]
    branched = builder().roll_back(told, 1, random.Random(1), branch=True)
    assert branched.rounds[-1].edit is not None and branched.images is None
    pure = builder().roll_back(told, 1, random.Random(1), branch=False)
    assert pure.images is not None and torch.equal(pure.images[3], pure.images[1])
    again = rollback.with_images(SOURCE, [pure])[0]
    assert again.images is not None and torch.equal(again.images, pure.images)
