"""How conversations are stored: a `datasets` data set with one row a round, a Parquet folder, and readable JSON."""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from nmlib.conversation import (
    PICTURE_ERRORS,
    Conversation,
    ConversationError,
    Edit,
    Round,
    from_picture,
    to_picture,
    validate_recall,
    validate_round,
)
from nmlib.runtime import atomic_path, read_json, write_json

datasets.disable_progress_bars()  # reading and writing takes moments, and bars look like warnings in a notebook

LISTED = ("values", "subject", "named", "face")  # fields of a round that JSON holds as lists
FEATURES = datasets.Features(
    {
        "conversation": datasets.Value("string"),
        "source": datasets.Value("string"),
        "subject": datasets.List(datasets.Value("float32")),
        "round": datasets.Value("int32"),
        "instruction": datasets.Value("string"),
        "kind": datasets.Value("string"),
        "base": datasets.Value("int32"),
        "edit_attribute": datasets.Value("string"),
        "edit_value": datasets.Value("string"),
        "reference": datasets.Value("string"),
        "values": datasets.List(datasets.Value("int32")),
        "name": datasets.Value("string"),
        "named": datasets.List(datasets.Value("string")),
        "face": datasets.List(datasets.Value("float32")),
        "image": datasets.Image(),
    }
)


def _rows(conversations: Iterable[Conversation]) -> Iterator[dict[str, Any]]:
    for conversation in conversations:
        for index, item in enumerate(conversation.rounds):
            yield {
                "conversation": conversation.id,
                "source": conversation.source,
                "subject": None if item.subject is None else list(item.subject),
                "round": index,
                "instruction": item.instruction,
                "kind": item.kind,
                "base": item.base,
                "edit_attribute": item.edit.attribute if item.edit else None,
                "edit_value": item.edit.value if item.edit else None,
                "reference": item.reference,
                "values": None if item.values is None else list(item.values),
                "name": item.name,
                "named": list(item.named),
                "face": None if item.face is None else list(item.face),
                "image": None if conversation.images is None else to_picture(conversation.images[index]),
            }


def to_dataset(conversations: Iterable[Conversation]) -> datasets.Dataset:
    """Conversations as a `datasets` data set, one row a round, pictures in an Image column."""
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for row in _rows(conversations):
        for name, value in row.items():
            columns[name].append(value)
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def from_dataset(dataset: datasets.Dataset, where: str = "data set") -> list[Conversation]:
    """Read conversations from a data set and check every row.

    Args:
        dataset: columns as `FEATURES`.
        where: name used in error messages.

    Raises:
        ConversationError: a missing column, a damaged image, a row that contradicts the others.
    """
    _check_columns(dataset.column_names, where)
    raw = dataset.cast_column("image", datasets.Image(decode=False))
    groups: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, row in enumerate(raw):
        groups.setdefault(row["conversation"], []).append((number, cast(dict[str, Any], row)))
    return [_assemble(id_, rows, where) for id_, rows in groups.items()]


def _check_columns(names: Iterable[str], where: str) -> None:
    missing = sorted(set(FEATURES) - set(names))
    if missing:
        raise ConversationError(f"{where}: columns {missing} are missing; expected {sorted(FEATURES)}")


def _assemble(id_: str, rows: list[tuple[int, dict[str, Any]]], where: str) -> Conversation:
    rounds, images = [], []
    for expected, (number, row) in enumerate(rows):
        label = f"{where}: row {number}"
        if row["round"] != expected:
            raise ConversationError(f"{label}: field 'round' is {row['round']}; expected {expected} in {id_!r}")
        item = _round_from_row(row)
        validate_round(item, expected, label)
        rounds.append(item)
        if row["image"] is not None:
            images.append(_decode(row["image"], label))
            _check_size(images, label, id_)
        elif any(other["image"] is not None for _, other in rows):
            raise ConversationError(
                f"{label}: field 'image' is empty; expected one in every round of {id_!r} or in none"
            )
    stacked = torch.stack(images) if images else None  # (R, 3, H, W)
    conversation = Conversation(id_, rows[0][1]["source"], tuple(rounds), stacked)
    for index, (number, _) in enumerate(rows):
        validate_recall(conversation, index, f"{where}: row {number}")
    return conversation


def _round_from_row(row: dict[str, Any]) -> Round:
    return Round(
        instruction=row["instruction"] or "",
        kind=row["kind"],
        base=row["base"],
        edit=Edit(row["edit_attribute"], row["edit_value"]) if row["edit_attribute"] else None,
        reference=row["reference"],
        values=None if row["values"] is None else tuple(row["values"]),
        subject=None if row["subject"] is None else tuple(row["subject"]),
        name=row["name"],
        named=tuple(row["named"] or ()),
        face=None if row["face"] is None else tuple(row["face"]),
    )


def _check_size(images: list[Tensor], where: str, id_: str) -> None:
    (_, height, width), (_, usual_height, usual_width) = images[-1].shape, images[0].shape
    if (height, width) != (usual_height, usual_width):
        raise ConversationError(
            f"{where}: field 'image' is {width} x {height}; the others of {id_!r} are {usual_width} x {usual_height}"
        )


def _decode(stored: dict[str, Any], where: str) -> Tensor:
    try:
        source = io.BytesIO(stored["bytes"]) if stored.get("bytes") else Path(stored["path"])
        with Image.open(source) as picture:
            return from_picture(picture, f"{where}, field 'image'")
    except ConversationError:
        raise
    except PICTURE_ERRORS as error:
        raise ConversationError(f"{where}: field 'image' cannot be read ({error}); mend or remove the row") from None


def save_conversations(conversations: list[Conversation], folder: Path) -> None:
    """Store conversations as a data set folder (Parquet) and, without pictures, as readable JSON beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "rounds.parquet") as temporary:
        to_dataset(conversations).to_parquet(str(temporary))
    write_json(folder / "conversations.json", [to_json(conversation) for conversation in conversations])


def load_conversations(folder: Path) -> list[Conversation]:
    """Read what `save_conversations` wrote, pictures included, every row checked."""
    path = folder / "rounds.parquet"
    if not path.is_file():
        raise ConversationError(f"{path}: no such data set; run the notebook that builds it (`python -m nmlib run`)")
    try:
        _check_columns(parquet.read_schema(path).names, str(path))
        dataset = datasets.Dataset.from_parquet(str(path), cache_dir=str(folder / ".cache"), features=FEATURES)
    except ConversationError:
        raise
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise ConversationError(f"{path}: damaged or truncated ({error}); delete it and build it again") from None
    return from_dataset(cast(datasets.Dataset, dataset), str(path))


def to_json(conversation: Conversation) -> dict[str, Any]:
    """A conversation as plain values, without pictures."""
    return {
        "id": conversation.id,
        "source": conversation.source,
        "rounds": [asdict(item) for item in conversation.rounds],
    }


def from_json(raw: dict[str, Any], where: str = "conversation") -> Conversation:
    """Read what `to_json` made; checks every round.

    Raises:
        ConversationError: a missing or unknown field, or a round that contradicts the others.
    """
    try:
        rounds = tuple(_round_from_json(item, f"{where}, round {index}") for index, item in enumerate(raw["rounds"]))
        conversation = Conversation(raw["id"], raw["source"], rounds)
    except (KeyError, TypeError) as error:
        raise ConversationError(
            f"{where}: {json.dumps(raw)[:80]}...: field {error}; expected `to_json`'s fields"
        ) from None
    return conversation.validate(where)


def _round_from_json(raw: dict[str, Any], where: str) -> Round:
    if not isinstance(raw["instruction"], str):
        raise ConversationError(f"{where}: field 'instruction' is {raw['instruction']!r}; expected text")
    if not isinstance(raw["base"], int | None):
        raise ConversationError(f"{where}: field 'base' is {raw['base']!r}; expected the number of a round or null")
    edit = Edit(**raw["edit"]) if raw["edit"] else None
    listed = {field: None if raw[field] is None else tuple(raw[field]) for field in LISTED}
    return Round(**{**raw, **listed, "edit": edit})


def load_json(path: Path) -> list[Conversation]:
    """Read a JSON file of conversations (no pictures)."""
    return [from_json(raw, f"{path}: conversation {index}") for index, raw in enumerate(read_json(path))]
