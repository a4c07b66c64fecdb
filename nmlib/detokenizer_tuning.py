"""The detokenizer on people: after general reconstruction it learns faces, then the tokens that a model predicts.

Predicted tokens are not those of any picture: they are blurred where the model was unsure. A detokenizer that has
read many of them knows what they mean (the paper fine-tunes its own on pictures of people). Each step is kept beside
the detokenizer it started from, so that identity and PSNR can be told before and after it.
"""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from nmlib import batches, checkpoint, codec, data, experiments, metrics, people_experiments, personalization, train
from nmlib.chat import System
from nmlib.config import OptimConfig, TuningConfig
from nmlib.conversation import Conversation
from nmlib.curriculum import model_name
from nmlib.detokenizer import Detokenizer
from nmlib.experiments import load_system, record_column
from nmlib.identity import SubjectEmbedder
from nmlib.people import PeopleSource
from nmlib.runtime import Run
from nmlib.sources import attribute_index
from nmlib.train import History

STEPS = {"general": "detokenizer", "faces": "detokenizer-faces", "predicted": "detokenizer-predicted"}
SEED = 40


def tuning_settings(run: Run) -> TuningConfig:
    """The params' `tuning:` block.

    Raises:
        ValueError: the params have none.
    """
    if run.params.tuning is None:
        raise ValueError(f"params {run.params.name!r}: no `tuning:` block; add one, as params/people.yaml has")
    return run.params.tuning


def load_step(run: Run, step: str) -> Detokenizer:
    """The detokenizer after a step of STEPS."""
    return codec.load_detokenizer(run, STEPS[step])


def face_pictures(source: PeopleSource, count: int, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) of people of the training split in every pose and framing but the full body."""
    subjects = source.sample_subjects(count, "train", generator)  # (B, S)
    values = data.sample_values(source, count, generator)  # (B, A)
    place = attribute_index(source, "framing")
    near = len(source.attributes[place].values) - 1  # `full body` is the last one
    values[:, place] = torch.randint(near, (count,), generator=generator)
    return source.render(subjects, values)


def train_faces(run: Run) -> History:
    """Go on from general reconstruction with faces alone; writes `detokenizer-faces.safetensors`."""
    optim, source, encoder = tuning_settings(run).faces, data.open_people(run.params.source), codec.load_encoder(run)

    def batch_at(step: int) -> dict[str, Tensor]:
        images = face_pictures(source, optim.batch_size, data.step_generator(run.params.seed + SEED, step))
        with torch.no_grad():
            return {"tokens": encoder(images), "images": images}

    return _go_on(run, "general", "faces", batch_at, optim)


def train_predicted(run: Run) -> History:
    """Go on with what the model predicts of fresh conversations; writes `detokenizer-predicted.safetensors`."""
    tuning, source = tuning_settings(run), data.open_people(run.params.source)
    system = load_system(run, tuning.stage)

    def batch_at(step: int) -> dict[str, Tensor]:
        told = fresh_conversations(run, source, step)
        tokens, images = predicted_pairs(system, told)
        return {"tokens": tokens, "images": images}

    model = run.path(f"{model_name(tuning.stage)}.safetensors")
    return _go_on(run, "faces", "predicted", batch_at, tuning.predicted, [checkpoint.load(model)[1].get("key", "")])


def _go_on(
    run: Run,
    before: str,
    after: str,
    batch_at: Callable[[int], dict[str, Tensor]],
    optim: OptimConfig,
    keys: Sequence[str] = (),
) -> History:
    """Train the detokenizer of one step further, unless the same was done already."""
    start = run.path(f"{STEPS[before]}.safetensors")
    _, metadata = checkpoint.load(start)
    own = train.training_key(run, "detokenizer_tuning", 0, run.params.source, tuning_settings(run))
    key = "-".join([own, metadata["key"], *keys])
    if (made := train.made(run.path(f"{STEPS[after]}.safetensors"), key)) is not None:
        return made
    module = load_step(run, before).requires_grad_(True)
    history = train.run_training(run, STEPS[after], module, batch_at, optim, run.params.seed, key)
    train.finish(run, STEPS[after], module.state_dict(), metadata | {"history": history, "key": key})
    return history


def fresh_conversations(run: Run, source: PeopleSource, step: int) -> list[Conversation]:
    """Conversations of one length of the people data set, with about as many pictures as a step learns from."""
    tuning = tuning_settings(run)
    settings = run.params.people[tuning.data]
    seed = run.params.seed + SEED + 1
    pick = int(torch.randint(len(settings.rounds), (1,), generator=data.step_generator(seed, step)))
    length = settings.rounds[pick]
    count = max(1, tuning.predicted.batch_size // length)
    # a face that was only described has no exact picture to learn from
    changes = {"conversations": count, "rounds": (length,), "describe_share": 0.0}
    told = batches.draw(run.params, tuning.data, train.step_seed(seed, step), "train", changes)
    return personalization.with_images(source, told, settings.pairing)


@torch.no_grad()
def predicted_pairs(system: System, told: list[Conversation]) -> tuple[Tensor, Tensor]:
    """What a model predicts for every picture that it is asked for, beside the exact picture.

    The history that it reads is what it predicted itself from true history, as in training.

    Args:
        system: encoder and model.
        told: conversations of one length, with images.

    Returns:
        Tokens (Q, N, D_feature) and pictures (Q, 3, H, W) in [0, 1].
    """
    pictures = torch.stack([c.images for c in told if c.images is not None])  # (B, R, 3, H, W)
    true = system.encode(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])  # (B, R, N, D_feature)
    layout, own = system.template.packed(told), true.clone()
    asked = (layout.queries[:, 0], layout.queries[:, 1])
    for _ in range(2):
        history = own[layout.history[:, 0], layout.history[:, 1]]  # (C, N, D_feature)
        own[asked] = system.model.to_history(system.model.predict(layout, history).images).to(own)
    return own[asked], pictures[asked].float() / 255


def tuning_table(run: Run, embedder: SubjectEmbedder) -> pd.DataFrame:
    """PSNR and identity of the detokenizer after every step, on requests for held-out people by held-out names.

    Returns:
        One row for every (step, tokens, conversation): `tokens` is `true` (of the exact picture) or `predicted` (by
        the model, reading its own pictures); `psnr` and `identity` compare the decoded picture with the exact one.
    """
    system = load_system(run, tuning_settings(run).stage)
    told = people_experiments.probes(run, run.params.experiments.conversations)
    features = data.encode_conversations(told, system.encode)
    _, true = features.take(range(len(told)))
    kinds = {"true": true[:, -1], "predicted": people_experiments.answer(system, features)[0]}
    exact = torch.stack([c.images[-1] for c in told if c.images is not None]).float() / 255  # (B, 3, H, W)
    faces, rows = embedder(exact), []
    for step in STEPS:
        detokenizer = load_step(run, step)
        for kind, tokens in kinds.items():
            pictures = torch.cat([detokenizer.decode(part) for part in tokens.split(experiments.BATCH)])
            columns = {"psnr": metrics.psnr(pictures, exact), "identity": (embedder(pictures) * faces).sum(1)}
            rows += [
                {"step": step, "tokens": kind, "conversation": conversation.id}
                | {name: float(column[row]) for name, column in columns.items()}
                for row, conversation in enumerate(told)
            ]
    return pd.DataFrame(rows)


def record_tuning(run: Run, table: pd.DataFrame, minutes: float) -> None:
    """Write the records of `tuning_table`."""
    units: Mapping[str, str] = {"psnr": "dB", "identity": "cosine"}
    for (step, kind), part in table.groupby(["step", "tokens"]):
        for column, unit in units.items():
            id_ = f"detokenizer.{column}_faces.{step}.{kind}_tokens"
            record_column(run, id_, part, column, minutes, unit, "detokenizer_tuning")


def shown_after(run: Run, told: list[Conversation]) -> dict[str, list[Tensor]]:
    """What the last request of each conversation looks like after every step, (3, H, W) each, and the exact answer."""
    system = load_system(run, tuning_settings(run).stage)
    tokens, _ = people_experiments.answer(system, data.encode_conversations(told, system.encode))
    shown = {step: list(load_step(run, step).decode(tokens)) for step in STEPS}
    return {"exact": [c.images[-1] for c in told if c.images is not None], **shown}
