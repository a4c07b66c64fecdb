"""Texts about pictures: what they name, of what they are true, and what changing them changes."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SOURCE, ToySource, raised

from nmlib import data, phrases, prompts
from nmlib.sources import attribute_sizes

ALL = torch.ones(1, 3, dtype=torch.bool)


def test_what_is_true_of_what_by_hand() -> None:
    """Four squares: text 0 (red) is true of pictures 0 and 3, text 3 (red on light) of picture 3 alone."""
    values = torch.tensor([[0, 0, 1], [1, 0, 1], [1, 1, 0], [0, 1, 1]])
    named = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1], [1, 1, 0]]).bool()
    assert prompts.true_of(values, named).int().tolist() == [
        [1, 0, 0, 1],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_text_says_what_it_names_and_nothing_else(seed: int) -> None:
    """Read back by its words: every value of a named attribute is there, no word of another attribute is."""
    rng = random.Random(seed)
    values, named = data.sample_values(SOURCE, 5, data.step_generator(seed, 0)), prompts.draw_named(rng, SOURCE, 5)
    texts = prompts.describe(rng, SOURCE, values, named, "any")
    for text, state, wanted in zip(texts, values.tolist(), named.tolist(), strict=True):
        looks = text.split(" with ")[1].split(" and ")
        said = {(attribute.name, value) for attribute in SOURCE.attributes for value in attribute.values
                if set(attribute.looks[value]) & set(looks)}  # fmt: skip
        states = zip(SOURCE.attributes, state, wanted, strict=True)
        assert said == {(attribute.name, attribute.values[value]) for attribute, value, asked in states if asked}
        assert len(looks) == sum(wanted)


def test_splits_of_texts_do_not_meet() -> None:
    rng, values = random.Random(0), torch.zeros(20, 3, dtype=torch.int64)
    for split, heldout in (("train", False), ("heldout", True)):
        texts = prompts.describe(rng, SOURCE, values, ALL.expand(20, 3), split)
        assert {phrases.is_heldout(text) for text in texts} == {heldout}
        assert len({text.split(" with ")[1].split()[1] for text in texts}) > 1, "attributes come in any order"


def test_every_text_names_some_attributes_that_show() -> None:
    class Mirrored(ToySource):
        """No single picture shows its second attribute."""

        def __init__(self) -> None:
            super().__init__()
            mirrored = replace(self.attributes[1], relative=True, brought=self.attributes[1].values[0])
            self.attributes = (self.attributes[0], mirrored, self.attributes[2])

    named = prompts.draw_named(random.Random(0), Mirrored(), 200)
    assert prompts.visible(Mirrored()) == [0, 2] and not named[:, 1].any()
    assert set(named.sum(1).tolist()) == {1, 2}
    choices = prompts.list_choices(random.Random(0), Mirrored(), "any")
    assert len(choices) == 3 + 2 and not any("ground" in text for text in choices)


def test_choices_stand_in_the_order_of_the_values() -> None:
    choices = prompts.list_choices(random.Random(3), SOURCE, "train")
    looks = [attribute.looks[value] for attribute in SOURCE.attributes for value in attribute.values]
    assert len(choices) == 7
    assert all(text.split(" with ")[1] in of for text, of in zip(choices, looks, strict=True))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_change_is_where_it_should_be_and_nowhere_else(seed: int) -> None:
    rng = random.Random(seed)
    values, named = data.sample_values(SOURCE, 11, data.step_generator(seed, 1)), prompts.draw_named(rng, SOURCE, 11)
    picked = prompts.pick_one(rng, named)
    assert (picked.sum(1) == 1).all() and not (picked & ~named).any()
    changed = prompts.change(rng, SOURCE, values, picked)
    assert torch.equal(changed != values, picked)
    assert (changed >= 0).all() and (changed < torch.tensor(attribute_sizes(SOURCE))).all()
    assert prompts.true_of(torch.cat([values, changed]), torch.cat([named, named]))[11:, :11].diag().sum() == 0


def test_a_text_without_a_phrasing_in_a_split_says_so() -> None:
    """One look and three openings: no phrasing of it happens to be held out."""
    only = replace(SOURCE.attributes[0], looks={value: (f"{value} square",) for value in SOURCE.attributes[0].values})

    class Terse(ToySource):
        """A source of one attribute with one phrase for each value."""

        def __init__(self) -> None:
            super().__init__()
            self.attributes = (only,)

    texts = [opening.format(looks=f"{value} square") for value in only.values for opening in phrases.DESCRIBE]
    value = next(v for v in range(3) if not any(phrases.is_heldout(text) for text in texts[3 * v : 3 * v + 3]))
    state, named = torch.tensor([[value]]), torch.ones(1, 1, dtype=torch.bool)
    text = raised(lambda: prompts.describe(random.Random(0), Terse(), state, named, "heldout"), ValueError)
    assert text.endswith("in split 'heldout': the grammar is too small; add phrasings")


@pytest.mark.parametrize("count", [1, 4])
def test_named_has_one_row_for_each_text(count: int) -> None:
    assert prompts.draw_named(random.Random(0), SOURCE, count).shape == (count, 3)
