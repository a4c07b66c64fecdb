"""Conversations as trees of states, and how they are stored.

Every round names its *base*, the earlier round whose picture it starts from, and the edit it applies. In a
Markov conversation every base is the previous round; a rollback is a round whose base is older. The same object
is a row of the data set, the ground truth of the benchmark, and the picture in the explorer.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from nmlib.runtime import read_json, write_json

datasets.disable_progress_bars()  # reading and writing takes moments, and bars look like warnings in a notebook

Kind = Literal["upload", "describe", "edit", "rollback"]
Reference = Literal["none", "count", "ordinal", "content", "start"]
KINDS = ("upload", "describe", "edit", "rollback")
REFERENCES = ("none", "count", "ordinal", "content", "start")
MAX_IMAGE_PIXELS = 64_000_000
PICTURE_ERRORS = (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError)  # all that Pillow raises


class ConversationError(ValueError):
    """A conversation that contradicts itself; the message names the row and the field."""


@dataclass(frozen=True)
class Edit:
    """A change of one attribute to one value."""

    attribute: str
    value: str


@dataclass(frozen=True)
class Round:
    """One instruction and the picture that answers it.

    Args:
        instruction: what the person says.
        kind: `upload` (the person brings the picture), `describe` (made from words), `edit` or `rollback`.
        base: index of the round whose picture this one starts from; None for `upload` and `describe`.
        edit: the change applied to the base, if any (a pure rollback has none).
        reference: how a rollback names its base.
        values: the exact state, one value index for each attribute, where the source knows it.
    """

    instruction: str
    kind: Kind
    base: int | None = None
    edit: Edit | None = None
    reference: Reference = "none"
    values: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Conversation:
    """A sequence of rounds with, where known, the subject shown and the pictures.

    Args:
        id: unique name.
        source: name of the source of pictures.
        rounds: in order of time.
        subject: numbers of the subject, where the source knows them.
        images: uint8 (R, 3, H, W) pictures of the rounds, where they are kept.
    """

    id: str
    source: str
    rounds: tuple[Round, ...]
    subject: tuple[float, ...] | None = None
    images: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rounds)

    def depth(self, index: int) -> int:
        """How many rounds before the previous one the base of a round lies; 0 for a Markov round."""
        base = self.rounds[index].base
        return 0 if base is None else index - 1 - base

    def named_edit(self, index: int) -> str:
        """The earlier edit by which a round names its base, in the shortest words that single it out.

        "Go back to the one before the blue wall" gives `background`, or `blue background` if the background was
        changed more than once; a round that names its base otherwise gives an empty text.
        """
        item = self.rounds[index]
        edit = self.rounds[item.base + 1].edit if item.reference == "content" and item.base is not None else None
        if edit is None:
            return ""
        changes = [other.edit.attribute for other in self.rounds[:index] if other.edit is not None]
        return edit.attribute if changes.count(edit.attribute) == 1 else f"{edit.value} {edit.attribute}"

    def children(self, index: int) -> tuple[int, ...]:
        """Rounds that start from a given round."""
        return tuple(number for number, item in enumerate(self.rounds) if item.base == index)

    def path(self, index: int) -> tuple[int, ...]:
        """Rounds from the root of the tree to a given round."""
        steps = [index]
        while (base := self.rounds[steps[-1]].base) is not None:
            steps.append(base)
        return tuple(reversed(steps))

    @property
    def is_markov(self) -> bool:
        """Whether every round starts from the previous one."""
        return all(self.depth(index) == 0 for index in range(len(self)))

    def prefix(self, count: int) -> "Conversation":
        """The first `count` rounds."""
        images = None if self.images is None else self.images[:count]
        return replace(self, rounds=self.rounds[:count], images=images)

    def validate(self, where: str = "") -> "Conversation":
        """Return self if it is consistent.

        Raises:
            ConversationError: names the row (or `where`), the field, the value seen and what was expected.
        """
        label = where or f"conversation {self.id!r}"
        if not self.rounds:
            raise ConversationError(f"{label}: has no rounds; expected at least one")
        for index, item in enumerate(self.rounds):
            _validate_round(item, index, f"{label}, round {index}")
        if self.images is not None and len(self.images) != len(self.rounds):
            raise ConversationError(f"{label}: {len(self.images)} images for {len(self.rounds)} rounds")
        return self


def _validate_round(item: Round, index: int, where: str) -> None:
    if not item.instruction.strip():
        raise ConversationError(f"{where}: field 'instruction' is empty; every round needs one")
    if item.kind not in KINDS:
        raise ConversationError(f"{where}: field 'kind' is {item.kind!r}; expected one of {', '.join(KINDS)}")
    if item.reference not in REFERENCES:
        raise ConversationError(f"{where}: field 'reference' is {item.reference!r}; expected one of {REFERENCES}")
    if item.edit is not None and not item.edit.value:
        raise ConversationError(
            f"{where}: field 'edit_value' is {item.edit.value!r}; expected the value that {item.edit.attribute!r} gets"
        )
    is_root = item.kind in ("upload", "describe")
    if is_root and item.base is not None:
        raise ConversationError(f"{where}: field 'base' is {item.base}; a round of kind {item.kind!r} has none")
    if not is_root and (item.base is None or not 0 <= item.base < index):
        raise ConversationError(
            f"{where}: field 'base' is {item.base}; expected an earlier round, 0 to {index - 1}"
            if index
            else f"{where}: kind {item.kind!r} cannot open a conversation; expected 'upload' or 'describe'"
        )


def to_picture(image: Tensor) -> Image.Image:
    """uint8 or [0, 1] float tensor (3, H, W) to a PIL picture."""
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def from_picture(picture: Image.Image, where: str, size: int | None = None) -> Tensor:
    """PIL picture to a uint8 tensor (3, H, W), resized to `size` if given; refuses pictures too large to be meant."""
    if picture.width * picture.height > MAX_IMAGE_PIXELS:
        raise ConversationError(
            f"{where}: image is {picture.width} x {picture.height}; at most {MAX_IMAGE_PIXELS} pixels"
        )
    coloured = picture.convert("RGB") if size is None else picture.convert("RGB").resize((size, size))
    return torch.from_numpy(np.asarray(coloured).copy()).permute(2, 0, 1)  # (3, H, W)


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
        "image": datasets.Image(),
    }
)


def _rows(conversations: Iterable[Conversation]) -> Iterator[dict[str, Any]]:
    for conversation in conversations:
        for index, item in enumerate(conversation.rounds):
            yield {
                "conversation": conversation.id,
                "source": conversation.source,
                "subject": None if conversation.subject is None else list(conversation.subject),
                "round": index,
                "instruction": item.instruction,
                "kind": item.kind,
                "base": item.base,
                "edit_attribute": item.edit.attribute if item.edit else None,
                "edit_value": item.edit.value if item.edit else None,
                "reference": item.reference,
                "values": None if item.values is None else list(item.values),
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
        edit = Edit(row["edit_attribute"], row["edit_value"]) if row["edit_attribute"] else None
        values = None if row["values"] is None else tuple(row["values"])
        item = Round(row["instruction"] or "", row["kind"], row["base"], edit, row["reference"], values)
        _validate_round(item, expected, label)
        rounds.append(item)
        if row["image"] is not None:
            images.append(_decode(row["image"], label))
            _check_size(images, label, id_)
        elif any(other["image"] is not None for _, other in rows):
            raise ConversationError(
                f"{label}: field 'image' is empty; expected one in every round of {id_!r} or in none"
            )
    subject = None if rows[0][1]["subject"] is None else tuple(rows[0][1]["subject"])
    stacked = torch.stack(images) if images else None  # (R, 3, H, W)
    return Conversation(id_, rows[0][1]["source"], tuple(rounds), subject, stacked)


def _check_size(images: list[Tensor], where: str, id_: str) -> None:
    (_, height, width), (_, usual_height, usual_width) = images[-1].shape, images[0].shape
    if (height, width) != (usual_height, usual_width):
        raise ConversationError(
            f"{where}: field 'image' is {width} x {height}; the others of {id_!r} are {usual_width} x {usual_height}"
        )


def _decode(stored: dict[str, Any], where: str) -> Tensor:
    import io

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
    from nmlib.runtime import atomic_path

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
        "subject": conversation.subject,
        "rounds": [asdict(item) for item in conversation.rounds],
    }


def from_json(raw: dict[str, Any], where: str = "conversation") -> Conversation:
    """Read what `to_json` made; checks every round.

    Raises:
        ConversationError: a missing or unknown field, or a round that contradicts the others.
    """
    try:
        rounds = tuple(_round_from_json(item, f"{where}, round {index}") for index, item in enumerate(raw["rounds"]))
        subject = None if raw["subject"] is None else tuple(raw["subject"])
        conversation = Conversation(raw["id"], raw["source"], rounds, subject)
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
    values = None if raw["values"] is None else tuple(raw["values"])
    return Round(**{**raw, "edit": edit, "values": values})


def load_json(path: Path) -> list[Conversation]:
    """Read a JSON file of conversations (no pictures)."""
    return [from_json(raw, f"{path}: conversation {index}") for index, raw in enumerate(read_json(path))]
