"""Does a SEED-X that was trained here find the picture that it is sent back to? Asked on held-out real conversations.

Photographs have no exact state. But a round that only goes back shows its base again, so the prediction is right if it
lies nearer to the base than to any other picture of the conversation. Only rounds whose base is not what the last
picture shows are asked: a model that knows only that one scores nothing, and a guess one over the number of pictures.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from nmlib.conversation import Conversation
from nmlib.curriculum import model_name
from nmlib.imports import HELDOUT
from nmlib.layout import Layout
from nmlib.metrics import bootstrap
from nmlib.records import write_record
from nmlib.runtime import Run, device, progress
from nmlib.seedx_checkpoint import System
from nmlib.seedx_training import PictureReader, open_stage
from nmlib.stored_sets import StoredSet

HISTORIES = ("own", "clean")
COLUMNS = ("history", "depth", "right", "chance", "conversation", "round", "base", "nearest")


@torch.no_grad()
def predict_rounds(reader: PictureReader, layout: Layout, features: Tensor, own: bool) -> Tensor:
    """What the model makes of every round.

    Args:
        reader: the model.
        layout: `packed`, of B conversations of R rounds.
        features: (B, R, M, D_feature) of the true pictures.
        own: read predictions in the history, round by round, in place of the true pictures.

    Returns:
        (B, R, N, D_feature); zeros where a picture was brought.
    """
    agent, (rows, rounds) = reader.agent, layout.queries.T  # (Q,), (Q,)
    read = features.clone()  # (B, R, M, D_feature)
    made = features.new_zeros(*features.shape[:2], agent.tokens_per_image, features.shape[-1])  # (B, R, N, D_feature)
    for step in range(int(rounds.max()) + 1) if own else [int(rounds.max())]:
        images = agent.predict(layout, read[layout.history[:, 0], layout.history[:, 1]]).images.float()
        made[rows, rounds] = images  # (Q, N, D_feature)
        if own:
            now = rounds == step
            read[rows[now], rounds[now]] = agent.to_history(images[now])
    return made


def nearest_picture(predicted: Tensor, earlier: Tensor) -> int:
    """The latest of the pictures (P, N, D_feature) whose tokens are nearest to a prediction (N, D_feature)."""
    distances = (earlier - predicted).square().mean((1, 2))  # (P,)
    return int((distances == distances.min()).nonzero()[-1])


def retrieval_rows(
    reader: PictureReader, layout: Layout, conversations: Sequence[Conversation]
) -> list[dict[str, object]]:
    """One row for every round of conversations of one length that only goes back, and every kind of history."""
    images = torch.stack([c.images for c in conversations if c.images is not None])  # (B, R, 3, H, W)
    images = images.to(layout.input_ids.device)
    features = reader.encode(layout, images)  # (B, R, M, D_feature)
    targets = torch.stack([reader.agent.to_target(part) for part in features])  # (B, R, N, D_feature)
    found: list[dict[str, object]] = []
    for history in HISTORIES:
        made = predict_rounds(reader, layout, features, history == "own")
        for row, conversation in enumerate(conversations):
            found += [
                judged(conversation, index, made[row, index], targets[row]) | {"history": history}
                for index in ways_back(conversation)
            ]
    return found


def ways_back(conversation: Conversation) -> list[int]:
    """Rounds that only go back, to what the last picture does not show."""
    images, found = conversation.images, list[int]()
    assert images is not None
    for index, item in enumerate(conversation.rounds):
        if item.base is None or item.kind != "rollback":
            continue
        is_branch = not torch.equal(images[index], images[item.base])
        if not is_branch and not torch.equal(images[index - 1], images[item.base]):
            found.append(index)  # a branch shows what no earlier picture shows, and the last one is no way back
    return found


def judged(conversation: Conversation, index: int, predicted: Tensor, targets: Tensor) -> dict[str, object]:
    """One row of `retrieval_table`, without its history.

    Args:
        conversation: with pictures.
        index: of the round, one of `ways_back`.
        predicted: (N, D_feature) what was made in it.
        targets: (R, N, D_feature) of the true pictures.
    """
    assert conversation.images is not None
    pictures, base = conversation.images[:index], conversation.rounds[index].base  # (P, 3, H, W)
    assert base is not None
    nearest = nearest_picture(predicted, targets[:index])
    return {
        "round": index,
        "base": base,
        "nearest": nearest,
        "depth": conversation.depth(index),
        "right": torch.equal(pictures[nearest], pictures[base]),
        "chance": 1 / len(torch.unique(pictures.flatten(1), dim=0)),
        "conversation": conversation.id,
    }


def retrieval_table(system: System, stored: StoredSet, limit: int | None = None) -> pd.DataFrame:
    """Base retrieval on stored conversations: a row for every rollback without a new edit and every kind of history.

    Args:
        system: with its encoder.
        stored: conversations.
        limit: how many of them; all by default.
    """
    assert system.vit is not None
    reader = PictureReader(system.agent.to(device()), system.vit).eval()
    rows: list[dict[str, object]] = []
    for index in progress(range(min(len(stored), limit or len(stored))), desc="retrieval"):
        conversations = stored.take([index])
        layout = system.template.packed(conversations).to(device())
        rows += retrieval_rows(reader, layout, conversations)
    return pd.DataFrame(rows, columns=COLUMNS)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Shares with their 95% intervals, by history and depth, beside a guess; every conversation counts the same."""
    rows = []
    for (history, depth), part in table.groupby(["history", "depth"]):
        told = part.groupby("conversation")[["right", "chance"]].mean()
        interval = bootstrap(torch.tensor(told["right"].to_numpy(dtype=float)))
        span = (interval.value, interval.low, interval.high)
        rows.append((history, depth, *span, told["chance"].mean(), len(told), len(part)))
    return pd.DataFrame(rows, columns=["history", "depth", "right", "low", "high", "chance", "conversations", "rounds"])


def evaluate(run: Run, stage: str, name: str, weights: Path, seed: int = 0) -> pd.DataFrame:
    """Ask a trained stage on the held-out part of a data set; writes a record for every line of the summary.

    Args:
        run: holds the stage and the data set.
        stage: name of the stage.
        name: of the data set.
        weights: folder that the training began with.
        seed: of the training.

    Returns:
        Rows of `retrieval_table`.

    Raises:
        ValueError: the model's `history` is not `repeat`.
    """
    if run.params.seedx is not None and (kind := run.params.seedx.history) != "repeat":
        raise ValueError(
            f"{run.params.name}: evaluate puts predictions in the places of encoded pictures, so seedx.history must be "
            f"'repeat'; it is {kind!r}"
        )
    stored = StoredSet(run.path("data", name, HELDOUT))
    command = f"python -m nmlib evaluate --params {run.name} --stage {stage} --name {name}"
    table = retrieval_table(open_stage(run, stage, weights, seed), stored, run.params.experiments.conversations)
    for row in summary(table).itertuples():
        write_record(
            run,
            f"seedx.retrieval.{name}.{row.history}.depth{row.depth}.{Path(model_name(stage, seed)).name}",
            row.right,
            low=row.low,
            high=row.high,
            n=row.conversations,
            modules=("seedx_evaluation",),
            unit="share",
            command=command,
        )
    return table
