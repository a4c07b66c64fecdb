"""Measures with exact truth: which state a prediction shows, which base it came from, and what is at best possible.

No judge is trained. Every candidate picture is drawn, encoded, and compared with the prediction; the nearest
candidate is what the prediction shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from nmlib.conversation import Conversation, Round
from nmlib.sources import Source, attribute_index, attribute_sizes

Encode = Callable[[Tensor], Tensor]


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB: images and truth (B, 3, H, W) in [0, 1] -> (B,)."""
    return -10 * torch.log10((images - truth).square().mean((1, 2, 3)).clamp_min(1e-10))  # (B,)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each picture: (B, 3, H, W) in [0, 1] -> (B,)."""
    scores = structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
    assert isinstance(scores, Tensor)
    return scores  # (B,)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval over n conversations, and over trainings where there are several."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(values: Tensor, resamples: int = 1000, seed: int = 0) -> Interval:
    """Mean and percentile interval over conversations, and over trainings where there are several.

    Every sample draws conversations anew, the same for all trainings, and trainings anew.

    Args:
        values: (n,) one number for each conversation, or (S, n) with a row for each training.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    values = values.double().reshape(-1, values.shape[-1])  # (S, n)
    trainings, count = values.shape
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(count, (resamples, count), generator=generator)  # (resamples, n)
    drawn = torch.randint(trainings, (resamples, trainings), generator=generator)  # (resamples, S)
    means = values[:, picks].mean(2).T.gather(1, drawn).mean(1)  # (resamples,)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high, count)


def column_interval(part: pd.DataFrame, column: str, resamples: int = 1000) -> Interval:
    """Mean of a column with its interval.

    Args:
        part: a row for each conversation, or for each of (`seed`, `conversation`).
        column: what is averaged.
        resamples: bootstrap samples.
    """
    if "seed" in part and part["seed"].nunique() > 1:
        wide = part.pivot_table(index="seed", columns="conversation", values=column, dropna=False)
        return bootstrap(torch.tensor(wide.to_numpy()), resamples)
    return bootstrap(torch.tensor(part[column].to_numpy()), resamples)


class Candidates:
    """Exact pictures, encoded, of the states that a prediction is compared with; drawn once and kept.

    Args:
        source: draws them.
        encode: float images (B, 3, H, W) -> features (B, N, D).
    """

    def __init__(self, source: Source, encode: Encode) -> None:
        self.source, self.encode = source, encode
        self._kept: dict[tuple[object, tuple[int, ...]], Tensor] = {}

    def features(self, wanted: Sequence[tuple[tuple[float, ...], tuple[int, ...]]]) -> Tensor:
        """Features (K, N, D) of (subject, values) pairs."""
        missing = [key for key in dict.fromkeys(wanted) if key not in self._kept]
        for start in range(0, len(missing), 256):
            part = missing[start : start + 256]
            subjects = torch.tensor([subject for subject, _ in part])  # (B, S)
            images = self.source.render(subjects, torch.tensor([values for _, values in part]))  # (B, 3, H, W)
            self._kept.update(zip(part, self.encode(images).half(), strict=True))
        return torch.stack([self._kept[key] for key in wanted]).float()  # (K, N, D)


def _nearest(prediction: Tensor, candidates: Tensor) -> int:
    return int((candidates - prediction).square().mean((1, 2)).argmin())


def _read_state(
    prediction: Tensor,
    subject: tuple[float, ...],
    truth: tuple[int, ...],
    places: Sequence[int],
    candidates: Candidates,
) -> Tensor:
    """Whether each attribute in `places` is right in one prediction (N, D), (len(places),) bool."""
    sizes = [attribute_sizes(candidates.source)[place] for place in places]
    states = [
        (subject, (*truth[:place], value, *truth[place + 1 :]))
        for place, size in zip(places, sizes, strict=True)
        for value in range(size)
    ]
    parts = candidates.features(states).split(sizes)  # len(places) x (size, N, D)
    return torch.tensor([_nearest(prediction, part) == truth[place] for place, part in zip(places, parts, strict=True)])


def read_attributes(
    predictions: Tensor, conversations: Sequence[Conversation], index: int, candidates: Candidates
) -> Tensor:
    """Which attributes of a round's picture are right, by exact candidates.

    For each attribute all its values are drawn on the true state; the nearest one is what the picture shows.

    Args:
        predictions: (B, N, D) of round `index`.
        conversations: B conversations with subject and exact states.
        index: round.
        candidates: draws and encodes.

    Returns:
        (B, A) bool.
    """
    every = range(len(candidates.source.attributes))
    rows = []
    for prediction, conversation in zip(predictions, conversations, strict=True):
        truth, subject = _truth(conversation, index)
        rows.append(_read_state(prediction, subject, truth, every, candidates))
    return torch.stack(rows)  # (B, A)


def pixel_rows(images: Tensor) -> Tensor:
    """Pictures as they are, in the form of features: (B, 3, H, W) -> (B, H, 3*W), for candidates in pixel space."""
    return images.transpose(1, 2).flatten(2)  # (B, H, 3*W)


def attribute_compliance(
    predictions: Tensor, subjects: Tensor, values: Tensor, named: Tensor, candidates: Candidates
) -> Tensor:
    """Whether each attribute that a prompt names is as it asks, by exact candidates.

    For each named attribute all its values are drawn on the asked state; the nearest one is what the picture shows.
    In token space `predictions` are the model's tokens; in pixel space they are `candidates.encode(pictures)` with
    `pixel_rows` as the candidates' encoding.

    Args:
        predictions: (B, N, D).
        subjects: (B, S) who is shown, and in which view.
        values: (B, A) the asked states; for an attribute that is not named, what the picture should keep there.
        named: (B, A) bool, what the prompt names.
        candidates: draws and encodes.

    Returns:
        (B, A) float: 1 where a named attribute is right, 0 where it is not, NaN where it is not named.

    Raises:
        ValueError: shapes that do not belong together.
    """
    count, width = len(predictions), len(candidates.source.attributes)
    if values.shape != (count, width) or named.shape != (count, width) or len(subjects) != count:
        raise ValueError(
            f"{count} predictions with subjects {tuple(subjects.shape)}, values {tuple(values.shape)} and named "
            f"{tuple(named.shape)}; expected ({count}, S) and twice ({count}, {width})"
        )
    right = torch.full((count, width), float("nan"))
    for row in range(count):
        places = named[row].nonzero().flatten().tolist()
        subject, truth = tuple(subjects[row].tolist()), tuple(values[row].tolist())
        if places:
            right[row, places] = _read_state(predictions[row], subject, truth, places, candidates).float()
    return right  # (B, A)


def _truth(conversation: Conversation, index: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    values, subject = conversation.rounds[index].values, conversation.rounds[index].subject
    if values is None or subject is None:
        raise ValueError(f"conversation {conversation.id!r}, round {index}: no exact state; exact measures need one")
    return values, subject


def _edited(source: Source, values: tuple[int, ...], item: Round) -> tuple[int, ...]:
    if item.edit is None:
        return values
    place = attribute_index(source, item.edit.attribute)
    value = source.attributes[place].values.index(item.edit.value)
    return (*values[:place], value, *values[place + 1 :])


def base_retrieved(
    predictions: Tensor, conversations: Sequence[Conversation], index: int, candidates: Candidates
) -> Tensor:
    """Whether the right base was found, whatever became of small features.

    The requested edit is applied to the state of every earlier round; the nearest result must be the true one.

    Args:
        predictions: (B, N, D) of round `index`.
        conversations: B conversations with exact states.
        index: round.
        candidates: draws and encodes.

    Returns:
        (B,) bool.
    """
    found = []
    for row, conversation in enumerate(conversations):
        truth, subject = _truth(conversation, index)
        item = conversation.rounds[index]
        states = [_edited(candidates.source, _truth(conversation, r)[0], item) for r in range(index)]
        distinct = list(dict.fromkeys(states))
        nearest = _nearest(predictions[row], candidates.features([(subject, state) for state in distinct]))
        found.append(distinct[nearest] == truth)
    return torch.tensor(found)  # (B,)


def retrieval_chance(source: Source, conversation: Conversation, index: int) -> float:
    """Chance of finding the right base blindly: one over the number of distinct results."""
    item = conversation.rounds[index]
    return 1 / len({_edited(source, _truth(conversation, r)[0], item) for r in range(index)})


def walk_distribution(sizes: Sequence[int], steps: Sequence[int | None]) -> Tensor:
    """Where a random walk over states is, relative to its start, after the given steps.

    Each step changes one attribute to another value, uniformly. A walk back is as likely as the walk there; so where
    all states are alike at first, this is also how likely each was k rounds ago, given the last one.

    Args:
        sizes: number of values of each attribute.
        steps: for each step, the attribute it is known to change; None for any, -1 - a for any but attribute a.

    Returns:
        Probabilities over states, shape `sizes`; index 0 of each axis is the value of the start.
    """
    probability = torch.zeros(tuple(sizes), dtype=torch.float64)
    probability[(0,) * len(sizes)] = 1.0
    for known in steps:
        if known is None:
            places = list(range(len(sizes)))
        else:
            places = [known] if known >= 0 else [p for p in range(len(sizes)) if p != -1 - known]
        probability = _step(probability, places) / len(places)
    return probability


def markov_ceiling(source: Source, conversation: Conversation, index: int) -> float:
    """The best chance of a policy that sees only the last picture and the instruction to hit the exact state.

    The policy knows how edits are drawn, and which round is the base: `depth` random edits lie between it and the last
    picture. A new edit makes its attribute known, and says that the base had another value there. A reference by
    content says more of the edit after the base: that nothing else changed its attribute ("before you changed the
    wall"), or that no picture before had its value and no other edit set it ("the one before the blue wall"). Where
    both could have been said, either is as likely, and the better counts. Of a picture that was brought, attributes
    with a value `brought` are known. Computed by enumeration over all states.

    Not counted is what a request does not say: that a reference by number is likelier where none by content exists.

    Args:
        source: gives the number of values of each attribute.
        conversation: rounds before `index` are Markov.
        index: the rollback round.

    Returns:
        A chance in 0..1.

    Raises:
        ValueError: no conversation that is drawn here could ask this.
    """
    item, depth, sizes = conversation.rounds[index], conversation.depth(index), attribute_sizes(source)
    base, every = index - 1 - depth, list(range(len(sizes)))
    last, first = torch.zeros(sizes, dtype=torch.float64), torch.ones(sizes, dtype=torch.float64)
    last[_truth(conversation, index - 1)[0]] = 1.0
    for place, attribute in enumerate(source.attributes):  # what is known of the first picture
        if attribute.brought is not None and conversation.rounds[0].kind == "upload":
            first.masked_fill_(~_shown(first, place, attribute.values.index(attribute.brought)), 0)
    named = conversation.rounds[base + 1].edit if item.reference == "content" else None
    if named is None:
        return _best_guess(source, item, _walk(last, every, depth) * _walk(first, every, base))
    place = attribute_index(source, named.attribute)
    value = source.attributes[place].values.index(named.value)
    others = [other for other in every if other != place]
    once = _undone(_walk(last, others, depth - 1), place, value) * _walk(first, others, base)
    looks = _undone(_walk_back(last, place, value, depth - 1), place, value) * _walk_on(first, place, value, base)
    changed = [made.edit.attribute for made in conversation.rounds[1:index] if made.edit is not None]
    readings = [looks - once / 2, *([once] if changed.count(named.attribute) == 1 else [])]
    return max(_best_guess(source, item, weights) for weights in readings)


def _step(weights: Tensor, places: Sequence[int]) -> Tensor:
    """Weights of states, shape `sizes`, after one of `places` got another value; the same way back."""
    moved = torch.zeros_like(weights)
    for place in places:
        moved += (weights.sum(place, keepdim=True) - weights) / (weights.shape[place] - 1)
    return moved


def _walk(weights: Tensor, places: Sequence[int], steps: int) -> Tensor:
    """Weights of states after some steps, each of any of `places`; the same way back."""
    for _ in range(steps):
        weights = _step(weights, places)
    return weights


def _walk_on(weights: Tensor, place: int, value: int, steps: int) -> Tensor:
    """Weights of states after some steps that begin without a value of an attribute, and never set it."""
    shown = _shown(weights, place, value)
    weights = weights.masked_fill(shown, 0)
    for _ in range(steps):
        weights = _step(weights, range(weights.ndim)).masked_fill(shown, 0)
    return weights


def _walk_back(weights: Tensor, place: int, value: int, steps: int) -> Tensor:
    """Weights of states before some steps, of which none set an attribute to a value."""
    shown, others = _shown(weights, place, value), [other for other in range(weights.ndim) if other != place]
    for _ in range(steps):
        weights = _step(weights, others) + _step(weights.masked_fill(shown, 0), [place])
    return weights


def _undone(weights: Tensor, place: int, value: int) -> Tensor:
    """Weights of states before an edit that set an attribute to a value, given those of states after it."""
    return _step(weights.masked_fill(~_shown(weights, place, value), 0), [place])


def _shown(weights: Tensor, place: int, value: int) -> Tensor:
    """Where an attribute has a value: bool, broadcasts against `weights`."""
    shape = [-1 if axis == place else 1 for axis in range(weights.ndim)]
    return (torch.arange(weights.shape[place]) == value).reshape(shape)


def _best_guess(source: Source, item: Round, weights: Tensor) -> float:
    """The likeliest result's share, of weights of states of the base."""
    if item.edit is not None:
        place = attribute_index(source, item.edit.attribute)
        wanted = source.attributes[place].values.index(item.edit.value)
        weights = weights.masked_fill(_shown(weights, place, wanted), 0).sum(place)
    total = float(weights.sum())
    if not total:
        raise ValueError(
            f"request {item.instruction!r}: no conversation leads to it; expected a base without the value that is "
            "asked for, and a picture that was brought with the values that such a picture has"
        )
    return float(weights.max()) / total
