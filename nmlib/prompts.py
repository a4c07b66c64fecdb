"""Texts about pictures whose truth is known: which attributes they name, and of which pictures they are true."""

import random
from functools import partial

import torch
from torch import Tensor

from nmlib import phrases
from nmlib.sources import Source

MAX_NAMED = 4


def visible(source: Source) -> list[int]:
    """Positions of the attributes that a single picture shows."""
    return [place for place, attribute in enumerate(source.attributes) if not attribute.relative]


def draw_named(rng: random.Random, source: Source, count: int) -> Tensor:
    """Which attributes each of `count` texts names: one to MAX_NAMED of those that show, (B, A) bool."""
    places = visible(source)
    named = torch.zeros(count, len(source.attributes), dtype=torch.bool)
    for row in named:
        row[rng.sample(places, rng.randint(1, min(MAX_NAMED, len(places))))] = True
    return named  # (B, A)


def describe(rng: random.Random, source: Source, values: Tensor, named: Tensor, split: str) -> list[str]:
    """A description of each state that names some of its attributes, in any order.

    Args:
        rng: source of randomness.
        source: gives attributes and phrases.
        values: (B, A) states.
        named: (B, A) bool, at least one in each row.
        split: of the phrasing, see `phrases.draw`; a text that names one attribute has few, perhaps no held-out one.

    Returns:
        B texts, for example `a picture with the smile and a blue wall`.
    """

    def sentence(state: list[int], places: list[int]) -> str:
        order = rng.sample(places, len(places))
        return phrases.describe_sentence(rng, [source.attributes[p] for p in order], [state[p] for p in order])

    texts = []
    for state, wanted in zip(values.tolist(), named, strict=True):
        places = wanted.nonzero().flatten().tolist()
        texts.append(phrases.draw(partial(sentence, state, places), split))
    return texts


def list_choices(rng: random.Random, source: Source, split: str) -> list[str]:
    """A text for every value of every attribute that shows, in order, each of which names nothing else."""
    states, named = [], []
    for place in visible(source):
        row = torch.arange(len(source.attributes)) == place  # (A,)
        for value in range(len(source.attributes[place].values)):
            states.append(row * value)
            named.append(row)
    return describe(rng, source, torch.stack(states), torch.stack(named), split)


def pick_one(rng: random.Random, named: Tensor) -> Tensor:
    """One attribute of those named in each row, (B, A) bool."""
    picked = torch.zeros_like(named)
    for row, wanted in zip(picked, named, strict=True):
        row[rng.choice(wanted.nonzero().flatten().tolist())] = True
    return picked  # (B, A)


def change(rng: random.Random, source: Source, values: Tensor, where: Tensor) -> Tensor:
    """States (B, A) that have another value in every attribute of `where` (B, A) bool, and elsewhere the same."""
    changed = values.clone()
    for row, place in where.nonzero().tolist():
        size = len(source.attributes[place].values)
        changed[row, place] = (values[row, place] + rng.randrange(1, size)) % size
    return changed  # (B, A)


def true_of(values: Tensor, named: Tensor) -> Tensor:
    """Which texts are true of which pictures of a batch.

    Args:
        values: (B, A) states of the pictures.
        named: (B, A) bool, the attributes that text i names of picture i.

    Returns:
        (B, B) bool, text by picture: all that text i names is so in picture j. The diagonal is True.
    """
    agree = values[:, None] == values[None]  # (B, B, A)
    return (agree | ~named[:, None]).all(2)  # (B, B)
