"""What a stage reads at each step: conversations with pictures from a mix of data sets, and words alone beside them.

A data set is named in the params file, under `data:` (chains and rollback) or `people:` (names). A batch is a pure
function of the step and the seed.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmlib import data, lookup, personalization, rollback
from nmlib.config import LONGEST_EXERCISE, DataConfig, Params, PeopleConfig, Settings, StageConfig
from nmlib.conversation import Conversation
from nmlib.data import ConversationFeatures
from nmlib.layout import Layout, Template
from nmlib.storage import save_conversations

CONTENT_FIRST = 12.0  # times as often as another reference, while content comes first
WORD_LENGTHS = (6, 8, LONGEST_EXERCISE)  # rounds of an exercise; all numbers of rounds are practised


def set_settings(params: Params, name: str) -> DataConfig | PeopleConfig:
    """The settings of a data set by name."""
    return params.people[name] if name in params.people else params.data[name]


def draw(
    params: Params, name: str, seed: int, split: str, changes: Mapping[str, object] | None = None
) -> list[Conversation]:
    """Conversations of a data set, their pictures not drawn yet.

    Args:
        params: says what the data set is.
        name: of the data set.
        seed: of everything random.
        split: `train` or `heldout`.
        changes: settings to use in place of the data set's own.
    """
    settings = set_settings(params, name).model_copy(update=dict(changes or {}))
    if isinstance(settings, PeopleConfig):
        return personalization.build_conversations(
            data.open_people(params.source), settings, seed=seed, split=split, name=name
        )
    source = data.open_people(params.source) if settings.view else data.open_source(params.source)
    return rollback.build_conversations(source, settings, seed=seed, split=split, name=name)


def build(params: Params, name: str, folder: Path, seed: int, split: str = "train") -> None:
    """Draw a data set with its pictures, and store it in a folder."""
    settings, conversations = set_settings(params, name), draw(params, name, seed, split)
    if isinstance(settings, PeopleConfig):
        people = data.open_people(params.source)
        drawn = personalization.with_images(people, conversations, settings.pairing)
    else:
        source = data.open_people(params.source) if settings.view else data.open_source(params.source)
        drawn = rollback.with_images(source, conversations)
    save_conversations(drawn, folder)


def load(
    params: Params, name: str, folder: Path, encode: Callable[[Tensor], Tensor], encoder_key: str
) -> ConversationFeatures:
    """A stored data set with the features of its pictures and, where faces weigh more, the weights of its tokens."""
    settings = set_settings(params, name)
    if not isinstance(settings, PeopleConfig):
        return data.load_features(folder, encode, encoder_key)
    weigh = personalization.face_weights(data.open_people(params.source), params.tokens_per_image, settings.face_weight)
    return data.load_features(folder, encode, encoder_key, weigh, f"{settings.face_weight:g}")


def predicted_share(stage: StageConfig, step: int) -> float:
    """Share of history images replaced by predictions: zero, then a ramp, then constant."""
    ramp = (step / stage.optim.steps - 0.3) / 0.4
    return stage.predicted_history * min(1.0, max(0.0, ramp))


def pick_set(stage: StageConfig, step: int, seed: int) -> str:
    """The data set that a step reads, drawn from the stage's mix; a pure function of step and seed."""
    weights = torch.tensor(list(stage.data.values()))
    return list(stage.data)[int(torch.multinomial(weights, 1, generator=data.step_generator(seed, step)))]


def _length(lengths: tuple[int, ...], step: int, seed: int) -> int:
    """One of the lengths, a pure function of step and seed."""
    return lengths[int(torch.randint(len(lengths), (1,), generator=data.step_generator(seed, step)))]


def fresh_conversations(params: Params, stage: StageConfig, step: int, seed: int) -> list[Conversation]:
    """Conversations of one length of the stage's mix, new at every step; a pure function of step and seed.

    Finding a picture by what was said of it is learned slowly, and hardly at all while guessing its distance is
    right as often as not; so it comes first (`content_first`).
    """
    name = pick_set(stage, step, seed + 1)
    settings = set_settings(params, name)
    length = _length(settings.rounds, step, seed)
    changes: dict[str, object] = {"conversations": max(1, stage.word_rounds // length), "rounds": (length,)}
    if isinstance(settings, DataConfig) and step < stage.content_first * stage.optim.steps:
        changes |= {"content_weight": CONTENT_FIRST}
    return draw(params, name, seed * 1_000_003 + step, "train", changes)


def word_batch(params: Params, stage: StageConfig, template: Template, step: int, seed: int) -> Layout:
    """Rounds of which the words alone are learned at a step: fresh conversations, or exercises in finding words."""
    if stage.words == "data":
        return template.packed(fresh_conversations(params, stage, step, seed), pictures=False)
    speaker, length = data.speaker(params), _length(WORD_LENGTHS, step, seed)
    count = max(1, stage.word_rounds // length) if stage.data else stage.optim.batch_size
    words, rng = lookup.spoken_words(speaker), random.Random(seed * 1_000_003 + step)
    return template.spoken(lookup.exercises(words, speaker.names, count, length, rng))


def change_weights(conversations: Sequence[Conversation], features: Tensor, weight: float) -> Tensor:
    """Loss weights that grow where a picture differs from the one it starts from.

    Glasses are few tokens and a wall is many: with equal weights a small edit is learned last. A token that changes as
    much as the mean of its picture keeps weight 1, and the weights of a picture have mean 1.

    Args:
        conversations: B of one length R.
        features: (B, R, N, D_feature) of their pictures.
        weight: of the change against that of all tokens alike.

    Returns:
        (B, R, N); all ones where a picture starts from none or equals the one it starts from.
    """
    bases = torch.tensor([[-1 if item.base is None else item.base for item in c.rounds] for c in conversations])
    start = features[torch.arange(len(features))[:, None], bases.clamp_min(0)]  # (B, R, N, D_feature)
    change = (features - start).square().mean(-1)  # (B, R, N)
    mean = change.mean(-1, keepdim=True)  # (B, R, 1)
    weights = (1 + weight * change / mean.clamp_min(1e-6)) / (1 + weight)  # (B, R, N)
    return torch.where((bases[..., None] >= 0) & (mean > 1e-4), weights, 1.0)


def stage_batches(
    params: Params, stage: StageConfig, features: Mapping[str, ConversationFeatures], template: Template, seed: int
) -> Callable[[int], dict[str, Any]]:
    """Batches of a stage as a function of the step.

    Args:
        params: define the data sets.
        stage: names its mix of them.
        features: every data set of the mix.
        template: lays conversations out.
        seed: of everything random.
    """

    def batch_at(step: int) -> dict[str, Any]:
        if not stage.data:
            return {"words": word_batch(params, stage, template, step, seed + 7)}
        part = features[pick_set(stage, step, seed + 9)]
        indices = part.batch_indices(step, stage.optim.batch_size, seed + 3)
        conversations, true = part.take(indices)
        generator, chance = data.step_generator(seed + 4, step), predicted_share(stage, step)
        replaced = torch.rand(true.shape[:2], generator=generator) < chance if chance else None
        weights = part.take_weights(indices)
        if stage.change_weight:
            changed = change_weights(conversations, true, stage.change_weight)
            weights = changed if weights is None else changed * weights
        return {
            "layout": template.packed(conversations)
            if stage.supervision == "packed"
            else template.prefix(conversations),
            "features": true,
            "weights": weights,
            "replaced": replaced,
            "history_noise": stage.history_noise,
            "words": word_batch(params, stage, template, step, seed + 7) if stage.word_rounds else None,
        }

    return batch_at


def settings_of(params: Params, stage: StageConfig) -> list[Settings]:
    """Everything in a params file that the batches of a stage depend on."""
    return [stage, *(set_settings(params, name) for name in stage.data)]
