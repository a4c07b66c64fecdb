"""Conversations as trees of states.

Every round names its *base*, the earlier round whose picture it starts from, and the edit it applies. In a
Markov conversation every base is the previous round; a rollback is a round whose base is older. A person who was
introduced by name can be asked for by name: the base of such a round is the picture that introduced the name. The
same object is a row of the data set, the ground truth of the benchmark, and the picture in the explorer.
"""

import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Kind = Literal["upload", "describe", "edit", "rollback", "introduce", "recall"]
Reference = Literal["none", "count", "ordinal", "content", "start"]
Box = tuple[float, float, float, float]  # left, top, right, bottom
KINDS = ("upload", "describe", "edit", "rollback", "introduce", "recall")
ROOTS = ("upload", "describe", "introduce")  # kinds that start from no earlier picture
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
        kind: `upload` (the person brings the picture), `introduce` (brings it and names whom it shows), `describe`
            (made from words), `edit`, `rollback`, or `recall` (a new picture of somebody by name).
        base: index of the round whose picture this one starts from; None for `upload`, `introduce` and `describe`.
        edit: the change applied to the base, if any (a pure rollback has none, nor has a recall).
        reference: how a rollback names its base.
        values: the exact state, one value index for each attribute, where the source knows it.
        subject: numbers of whom or what the picture shows, and of the view, where the source knows them.
        name: whom an `introduce` or a `describe` introduces, whom a `recall` asks for, or what an `edit` calls the
            person shown from now on.
        named: attributes that the instruction of a recall, or of a description with a name, says.
        face: left, top, right and bottom of the face as shares of width and height, where the pixels alone are known
            and it was found in them; of an exact state it is computed.
    """

    instruction: str
    kind: Kind
    base: int | None = None
    edit: Edit | None = None
    reference: Reference = "none"
    values: tuple[int, ...] | None = None
    subject: tuple[float, ...] | None = None
    name: str | None = None
    named: tuple[str, ...] = ()
    face: Box | None = None

    @property
    def is_brought(self) -> bool:
        """Whether the person brings the picture, so that there is none to generate."""
        return self.kind in ("upload", "introduce")


@dataclass(frozen=True)
class Conversation:
    """A sequence of rounds with, where they are kept, their pictures.

    Args:
        id: unique name.
        source: name of the source of pictures.
        rounds: in order of time.
        images: uint8 (R, 3, H, W) pictures of the rounds, where they are kept.
    """

    id: str
    source: str
    rounds: tuple[Round, ...]
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

    def people(self, index: int) -> dict[str, int]:
        """Names that can be used in a round, each with the round whose picture it stands for.

        A name stands for the newest picture that introduced it. Who gets another name keeps the picture and loses
        the old name.
        """
        known: dict[str, int] = {}
        for number, item in enumerate(self.rounds[:index]):
            if item.name is None or item.kind == "recall":
                continue
            shown = self.path(number)[0]
            if item.kind == "edit":
                known = {name: round_ for name, round_ in known.items() if round_ != shown}
            known[item.name] = shown
        return known

    def introduction(self, name: str, index: int) -> int | None:
        """The round whose picture a name stands for in round `index`; None if nobody has that name there."""
        return self.people(index).get(name)

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
            validate_round(item, index, f"{label}, round {index}")
        for index in range(len(self.rounds)):
            validate_recall(self, index, f"{label}, round {index}")
        if self.images is not None and len(self.images) != len(self.rounds):
            raise ConversationError(f"{label}: {len(self.images)} images for {len(self.rounds)} rounds")
        return self


def validate_round(item: Round, index: int, where: str) -> None:
    """Check what a round says of itself.

    Raises:
        ConversationError: names `where`, the field, the value seen and what was expected.
    """
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
    is_root = item.kind in ROOTS
    if is_root and item.base is not None:
        raise ConversationError(f"{where}: field 'base' is {item.base}; a round of kind {item.kind!r} has none")
    if not is_root and (item.base is None or not 0 <= item.base < index):
        raise ConversationError(
            f"{where}: field 'base' is {item.base}; expected an earlier round, 0 to {index - 1}"
            if index
            else f"{where}: kind {item.kind!r} cannot open a conversation; expected one of {', '.join(ROOTS)}"
        )
    if item.face is not None and not _is_box(item.face):
        raise ConversationError(
            f"{where}: field 'face' is {list(item.face)}; expected left < right and top < bottom from 0 to 1"
        )
    _validate_name(item, where)


def _is_box(numbers: Sequence[object]) -> bool:
    """Whether these are left, top, right and bottom as shares of a picture."""
    shares = [number for number in numbers if isinstance(number, int | float) and 0 <= number <= 1]
    return len(shares) == len(numbers) == 4 and shares[0] < shares[2] and shares[1] < shares[3]


def _validate_name(item: Round, where: str) -> None:
    if item.name is None:
        if item.kind in ("introduce", "recall"):
            raise ConversationError(f"{where}: field 'name' is empty; a round of kind {item.kind!r} needs one")
    elif item.kind in ("upload", "rollback"):
        raise ConversationError(
            f"{where}: field 'name' is {item.name!r}; a round of kind {item.kind!r} has none "
            "(a picture that comes with a name is of kind 'introduce')"
        )
    elif item.name not in item.instruction.split():
        raise ConversationError(
            f"{where}: field 'name' is {item.name!r}; expected a word of the instruction {item.instruction!r}"
        )
    if item.kind == "recall" and item.edit is not None:
        raise ConversationError(
            f"{where}: field 'edit' is {item.edit.value} {item.edit.attribute}; a recall has none, its 'values' say all"
        )


def validate_recall(conversation: Conversation, index: int, where: str) -> None:
    """Check that the base of a recall is the picture that its name stands for; all other rounds pass.

    Raises:
        ConversationError: names `where`, the field, the value seen and what was expected.
    """
    item, people = conversation.rounds[index], conversation.people(index)
    if item.kind != "recall" or item.base == people.get(item.name or ""):
        return
    if item.name not in people:
        known = ", ".join(sorted(people)) or "none yet"
        raise ConversationError(f"{where}: field 'name' is {item.name!r}, whom nobody introduced; names known: {known}")
    raise ConversationError(
        f"{where}: field 'base' is {item.base}; expected {people[item.name]}, the picture that {item.name!r} stands for"
    )


def to_picture(image: Tensor) -> Image.Image:
    """uint8 or [0, 1] float tensor (3, H, W) to a PIL picture."""
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def from_picture(picture: Image.Image, where: str, size: int | None = None) -> Tensor:
    """PIL picture to a uint8 tensor (3, H, W).

    Args:
        picture: opened and, so that one that is too large is never decoded, not loaded yet; where its EXIF says that
            it was taken sideways it is set upright, and one whose EXIF is damaged is taken as it lies.
        where: for the message.
        size: height and width that it is resized to; None keeps them.

    Raises:
        ConversationError: it is too large to be meant.
    """
    if picture.width * picture.height > MAX_IMAGE_PIXELS:
        raise ConversationError(
            f"{where}: image is {picture.width} x {picture.height}; at most {MAX_IMAGE_PIXELS} pixels"
        )
    coloured = picture.convert("RGB")
    with contextlib.suppress(struct.error, *PICTURE_ERRORS):  # of damaged EXIF alone: the pixels are there by now
        ImageOps.exif_transpose(coloured, in_place=True)
    if size is not None:
        coloured = coloured.resize((size, size))
    return torch.from_numpy(np.asarray(coloured).copy()).permute(2, 0, 1)  # (3, H, W)
