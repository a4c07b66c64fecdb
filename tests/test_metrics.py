"""The measures, each against known answers: by hand, by closed form, or by enumeration of everything."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import SOURCE, ToySource, about, conversations, make_round, raised

from nmlib import metrics
from nmlib.config import DataConfig
from nmlib.conversation import Conversation
from nmlib.metrics import Candidates, markov_ceiling, walk_distribution
from nmlib.rollback import ConversationBuilder, ExactEditor
from nmlib.sources import attribute_index, attribute_sizes

State = tuple[int, ...]


class Two(ToySource):
    """Two attributes: a ground of 2 values and a square of 3, on request `brought` with one value."""

    def __init__(self, **brought: str) -> None:
        super().__init__()
        attributes = (self.attributes[1], self.attributes[0])
        self.attributes = tuple(replace(item, brought=brought.get(item.name)) for item in attributes)


TWO = Two()

# ---------------------------------------------------------------------------------------------------------
# pictures


def test_psnr_by_hand() -> None:
    """A difference of 0.1 everywhere is 20 dB, of 0.1 in one of four pixels 26.02 dB, none at all the cap of 100."""
    truth = torch.full((3, 3, 2, 2), 0.5)
    images = truth.clone()
    images[0] += 0.1
    images[1, :, 0, 0] -= 0.1
    assert metrics.psnr(images, truth).tolist() == pytest.approx([20.0, 10 * math.log10(400), 100.0], abs=1e-3)


def test_ssim_by_closed_form() -> None:
    """Of two flat pictures only the means count: (2ab + c) / (aa + bb + c) with c = 0.01 squared."""
    first, second = torch.full((2, 3, 16, 16), 0.2), torch.full((2, 3, 16, 16), 0.6)
    second[1] = 0.2
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert metrics.ssim(first, second).tolist() == pytest.approx([expected, 1.0], abs=1e-4)
    noise = torch.rand(2, 3, 16, 16)
    assert metrics.ssim(noise, noise).tolist() == pytest.approx([1.0, 1.0])
    assert (metrics.ssim(noise, noise.flip(3)) < 0.5).all()


def test_bootstrap_of_constants_and_of_coins() -> None:
    same = metrics.bootstrap(torch.full((37,), 0.25))
    assert (same.value, same.low, same.high, same.n) == (0.25, 0.25, 0.25, 37)
    coins = torch.tensor([1.0, 0.0, 0.0, 0.0] * 100)
    interval = metrics.bootstrap(coins, resamples=2000)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)  # the normal approximation
    assert interval.value == 0.25
    assert (interval.low, interval.high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.1 * half)
    assert metrics.bootstrap(coins, seed=0) == metrics.bootstrap(coins, seed=0) != metrics.bootstrap(coins, seed=1)


def test_intervals_over_trainings_are_as_wide_as_trainings_differ() -> None:
    rows = [
        {"seed": seed, "conversation": f"c{index:03d}", "right": float(seed == 1)}
        for seed in range(2)
        for index in range(101)
    ]
    table = pd.DataFrame(rows)
    one = metrics.column_interval(table[table["seed"] == 1], "right")
    assert (one.value, one.low, one.high, one.n) == (1.0, 1.0, 1.0, 101)
    both = metrics.column_interval(table.sample(frac=1.0, random_state=3), "right")
    assert (both.value, both.low, both.high, both.n) == (0.5, 0.0, 1.0, 101), "a seed alone says nothing of the next"
    same = torch.rand(23)
    alone, twice = metrics.bootstrap(same), metrics.bootstrap(torch.stack([same, same]))
    assert (twice.low, twice.high) == pytest.approx((alone.low, alone.high)), "equal trainings add no width"


# ---------------------------------------------------------------------------------------------------------
# reading a prediction by exact candidates


def encode(images: Tensor) -> Tensor:
    """Pixels as features: one token for each row of pixels."""
    return images.transpose(1, 2).flatten(2)  # (B, H, 3*W)


def exact(conversation: Conversation, values: State) -> Tensor:
    """Features of a state of a conversation's subject."""
    return encode(SOURCE.render(torch.tensor([conversation.rounds[0].subject]), torch.tensor([values])))


def test_exact_pictures_are_read_exactly() -> None:
    told, candidates = conversations(), Candidates(SOURCE, encode)
    for index in range(4):
        shown = torch.cat([exact(c, c.rounds[index].values or ()) for c in told])
        assert metrics.read_attributes(shown, told, index, candidates).tolist() == [[True] * 3] * 2
        if index:
            assert metrics.base_retrieved(shown, told, index, candidates).tolist() == [True] * 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_wrong_attribute_is_found_and_no_other(place: int) -> None:
    told, candidates = conversations(), Candidates(SOURCE, encode)
    sizes, wrong = attribute_sizes(SOURCE), []
    for conversation in told:
        values = list(conversation.rounds[2].values or ())
        values[place] = (values[place] + 1) % sizes[place]
        wrong.append(exact(conversation, tuple(values)))
    expected = [[index != place for index in range(3)]] * 2
    assert metrics.read_attributes(torch.cat(wrong), told, 2, candidates).tolist() == expected


def test_retrieval_asks_for_the_base_and_not_for_the_picture() -> None:
    """Round 2 of the first conversation: back to round 0, ground dark. From round 1 it would be (0, 0, 1)."""
    told, candidates = conversations()[:1], Candidates(SOURCE, encode)

    def found(shown: Tensor) -> bool:
        return metrics.base_retrieved(shown, told, 2, candidates).item() is True

    right, wrong = exact(told[0], (1, 0, 1)), exact(told[0], (0, 0, 1))
    assert found(right) and not found(wrong)
    assert found(0.6 * right + 0.4 * wrong) and not found(0.4 * right + 0.6 * wrong), "the nearer one counts"
    assert metrics.retrieval_chance(SOURCE, told[0], 2) == 1 / 2
    assert metrics.retrieval_chance(SOURCE, told[0], 1) == 1.0


def test_bases_that_give_the_same_result_are_one() -> None:
    """Red, then blue: setting green from either gives the same picture, so there is nothing to find."""
    rounds = (
        make_round("upload", "here is a picture", values=(0, 0, 0)),
        make_round("edit", "make the square blue", 0, ("square", "blue"), (2, 0, 0)),
        make_round("rollback", "undo that and make the square green", 0, ("square", "green"), (1, 0, 0), "count"),
    )
    told = [Conversation("same", "toy", about((0.0, 0.0), rounds))]
    assert metrics.retrieval_chance(SOURCE, told[0], 2) == 1.0
    assert metrics.base_retrieved(exact(told[0], (1, 0, 0)), told, 2, Candidates(SOURCE, encode)).all()


def test_measures_need_exact_states() -> None:
    first = conversations()[0]
    told = [replace(first, rounds=tuple(replace(item, subject=None) for item in first.rounds))]
    text = raised(
        lambda: metrics.read_attributes(torch.zeros(1, 16, 48), told, 1, Candidates(SOURCE, encode)), ValueError
    )
    assert text == "conversation 'first', round 1: no exact state; exact measures need one"


def test_candidates_are_drawn_once() -> None:
    drawn = []

    def counted(images: Tensor) -> Tensor:
        drawn.append(len(images))
        return encode(images)

    candidates = Candidates(SOURCE, counted)
    wanted = [((0.0, 0.0), (0, 0, 0)), ((0.0, 0.0), (1, 0, 0)), ((0.0, 0.0), (0, 0, 0))]
    first = candidates.features(wanted)
    assert first.shape == (3, 16, 48) and torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    candidates.features([*wanted, ((0.5, 0.0), (0, 0, 0))])
    assert drawn == [2, 1]


# ---------------------------------------------------------------------------------------------------------
# the Markov ceiling


def edits(state: State, sizes: State, known: int | None) -> Iterator[tuple[State, float]]:
    """Every edit of a state with its probability: an attribute, then another value of it."""
    places = [known] if known is not None and known >= 0 else [p for p in range(len(sizes)) if p != -1 - (known or 0)]
    places = list(range(len(sizes))) if known is None else places
    for place in places:
        for value in range(sizes[place]):
            if value != state[place]:
                yield (*state[:place], value, *state[place + 1 :]), 1 / len(places) / (sizes[place] - 1)


def walked(sizes: State, steps: list[int | None]) -> Tensor:
    """Where all sequences of edits lead, one by one."""
    result = torch.zeros(sizes, dtype=torch.float64)

    def go(state: State, chance: float, left: list[int | None]) -> None:
        if not left:
            result[state] += chance
            return
        for other, share in edits(state, sizes, left[0]):
            go(other, chance * share, left[1:])

    go((0,) * len(sizes), 1.0, steps)
    return result


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2, 2)])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_walks_against_all_sequences_of_edits(sizes: State, depth: int) -> None:
    choices: list[int | None] = [None, 0, 1, -1, -2]
    for steps in itertools.product(choices, repeat=depth):
        ours = walk_distribution(sizes, list(steps))
        torch.testing.assert_close(ours, walked(sizes, list(steps)))
        assert float(ours.sum()) == pytest.approx(1.0)


def asked(*edits_: tuple[str, str] | None, base: int, reference: str = "count", first: State = (0, 0)) -> Conversation:
    """A chain over `TWO` from a first state; the last edit (or None) is that of the rollback to `base`."""
    values, rounds = list(first), [make_round("upload", "here is a picture", values=first)]
    for index, edit in enumerate(edits_):
        last = index == len(edits_) - 1
        if last:
            values = list(rounds[base].values or ())
        if edit is not None:
            place = attribute_index(TWO, edit[0])
            values[place] = TWO.attributes[place].values.index(edit[1])
        made = make_round("rollback" if last else "edit", "x", base if last else index, edit, tuple(values))
        rounds.append(replace(made, reference=reference) if last else made)  # type: ignore[arg-type]
    return Conversation("asked", "two", about((0.0, 0.0), rounds)).validate()


GROUND, SQUARE = ("ground", "light"), ("square", "green")


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        # one edit was made: the ground (1/2, and then only one way back) or the square (1/2, two ways back)
        (asked(GROUND, None, base=0), 1 / 2),
        (asked(SQUARE, None, base=0), 1 / 2),
        # named by content: the ground has one way back, the square two
        (asked(GROUND, None, base=0, reference="content"), 1.0),
        (asked(SQUARE, None, base=0, reference="content"), 1 / 2),
        # and then set the ground to what it is now: it was otherwise, so it was the ground that changed
        (asked(GROUND, GROUND, base=0), 1.0),
        # and then set the ground to what it is not now: so it was as now, and the square changed, two ways
        (asked(SQUARE, GROUND, base=0), 1 / 2),
        # and then set the square to what it is now: so it was the square, and what it was does not matter
        (asked(SQUARE, SQUARE, base=0), 1.0),
        # and then set the square to what it is not now: it was as now (ground changed, 1/2) or the third (1/4)
        (asked(GROUND, SQUARE, base=0), 2 / 3),
        # two edits: back where it is now (1/4 + 1/8), or ground and one square (1/4 + ...) each: walks by hand
        (asked(GROUND, SQUARE, None, base=0), 3 / 8),
    ],
)
def test_ceiling_by_hand(conversation: Conversation, expected: float) -> None:
    assert markov_ceiling(TWO, conversation, len(conversation) - 1) == pytest.approx(expected)


def histories(steps: int, source: Two) -> Iterator[tuple[list[State], list[tuple[int, int]], float]]:
    """Every chain of `TWO`: its states, its edits as (place, value), and its chance but for a factor."""
    sizes = attribute_sizes(TWO)

    def go(states: list[State], made: list[tuple[int, int]], chance: float) -> Any:
        if len(made) == steps:
            yield states, made, chance
            return
        for other, part in edits(states[-1], sizes, None):
            place = next(p for p in range(len(sizes)) if other[p] != states[-1][p])
            yield from go([*states, other], [*made, (place, other[place])], chance * part)

    for first in itertools.product(*[range(size) for size in sizes]):
        names = [item.values[value] for item, value in zip(source.attributes, first, strict=True)]
        if all(item.brought in (None, name) for item, name in zip(source.attributes, names, strict=True)):
            yield from go([first], [], 1.0)


def said(states: list[State], made: list[tuple[int, int]], base: int) -> list[str]:
    """The ways to name the picture of `base` by what happened to it next, as the builder has them."""
    place, value = made[base]
    ways = ["once"] if sum(other == place for other, _ in made) == 1 else []
    return ways + (["looks"] if made.count((place, value)) == 1 and states[0][place] != value else [])


def best_of_all(told: Conversation, base: int, source: Two, spoken: list[str]) -> float:
    """The best guess of the last round, by going through every conversation that ends in its last picture.

    `spoken`: the ways in which it may have named its picture.
    """
    item, last = told.rounds[-1], told.rounds[-2].values
    place, value = (-1, -1)
    if item.edit is not None:
        place = attribute_index(TWO, item.edit.attribute)
        value = TWO.attributes[place].values.index(item.edit.value)
    named = told.rounds[base + 1].edit
    assert named is not None
    where = attribute_index(TWO, named.attribute)
    change = (where, TWO.attributes[where].values.index(named.value))
    weights: dict[str, dict[State, float]] = {}
    for states, made, chance in histories(len(told) - 2, source):
        target = states[base]
        if states[-1] != last or (place >= 0 and target[place] == value):
            continue
        if place >= 0:
            target = (*target[:place], value, *target[place + 1 :])
        ways = said(states, made, base)
        if item.reference == "content":
            fits = {"once": made[base][0] == where, "looks": made[base] == change}
            known = [(way, 1 / len(ways)) for way in ways if way in spoken and fits[way]]
        else:
            known = [("told", 1.0)]
        for way, share in known:
            of_way = weights.setdefault(way, {})
            of_way[target] = of_way.get(target, 0.0) + chance * share
    return max(max(part.values()) / sum(part.values()) for part in weights.values())


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    before=st.integers(0, 2),
    depth=st.integers(1, 4),
    brought=st.fixed_dictionaries({}, optional={a.name: st.sampled_from(a.values) for a in TWO.attributes}),
    content=st.booleans(),
)
def test_ceiling_against_all_conversations(
    data: st.DataObject, before: int, depth: int, brought: dict[str, str], content: bool
) -> None:
    """Of what is brought some values are known; `before` edits precede the base."""
    source = Two(**brought)
    free = [[item.brought] if item.brought else item.values for item in source.attributes]
    names = data.draw(st.tuples(*map(st.sampled_from, free)))
    first = tuple(item.values.index(name) for item, name in zip(source.attributes, names, strict=True))

    def edit(state: State) -> tuple[str, str]:
        place = data.draw(st.integers(0, 1))
        options = [v for i, v in enumerate(TWO.attributes[place].values) if i != state[place]]
        return TWO.attributes[place].name, data.draw(st.sampled_from(options))

    chain: list[Any] = []
    for _ in range(before + depth):
        chain.append(edit(asked(*chain, None, base=len(chain), first=first).rounds[-1].values or ()))
    plain = asked(*chain, None, base=before, first=first)
    final = edit(plain.rounds[before].values or ()) if data.draw(st.booleans()) else None
    told = asked(*chain, final, base=before, first=first, reference="content" if content else "count")
    states = [item.values or () for item in told.rounds[:-1]]
    changes = [(p, b[p]) for a, b in itertools.pairwise(states) for p in (0, 1) if a[p] != b[p]]
    spoken = said(states, changes, before)
    builder = ConversationBuilder(
        source.attributes, ExactEditor(source, "any"), DataConfig(conversations=1, rounds=(3,)), "any"
    )
    assert len(spoken) == len(builder._content_references(told.prefix(len(told) - 1), before, random.Random(0)))
    assume(spoken or not content)
    ours = markov_ceiling(source, told, before + depth + 1)
    assert ours == pytest.approx(best_of_all(told, before, source, spoken))


def test_a_picture_made_from_words_may_start_anyhow() -> None:
    """Ground or square was edited, 1/2 each; but a picture that is brought has a dark ground, which is light now."""
    told = asked(GROUND, None, base=0)
    described = replace(told, rounds=(replace(told.rounds[0], kind="describe"), *told.rounds[1:]))
    assert markov_ceiling(Two(ground="dark"), told, 2) == pytest.approx(1.0)
    assert markov_ceiling(Two(ground="dark"), described, 2) == pytest.approx(1 / 2)


def test_what_changed_twice_is_not_named_by_its_noun() -> None:
    """The square was set twice, from what it is in pictures that are brought: only its look names the picture."""
    told = asked(("square", "blue"), SQUARE, None, base=1, reference="content")
    assert markov_ceiling(Two(square="red"), told, 3) == pytest.approx(1 / 2)
    once = asked(GROUND, SQUARE, None, base=1, reference="content")
    assert markov_ceiling(Two(square="red"), once, 3) == pytest.approx(1.0)


def test_a_request_that_nobody_could_make_is_refused() -> None:
    told = asked(SQUARE, None, base=0, reference="content", first=(1, 0))
    message = raised(lambda: markov_ceiling(Two(ground="dark"), told, 2), ValueError)
    assert (
        message.startswith("request 'x': no conversation leads to it; expected a base")
        and "that was brought" in message
    )
