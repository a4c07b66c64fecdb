"""The turns that all editing formats come down to, and the conversation that is made of them with its pictures."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from nmlib.archives import MAX_FILE_BYTES, ArchiveError, inside
from nmlib.conversation import PICTURE_ERRORS, Conversation, ConversationError, Round, from_picture
from nmlib.phrases import UPLOADS
from nmlib.readers import Reason, Rejection
from nmlib.references import earlier_reference

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # others of Pillow's start programs, or are never meant
BASE_GRID = 16  # pictures are compared patch by patch, so many patches a side
BASE_TOLERANCE = 0.08  # largest mean difference of a patch, colours from 0 to 1, between two copies of one picture
BASE_SIZE = 64  # pixels a side at which they are compared where pictures are not read otherwise


# ---------------------------------------------------------------------------------------------------------
# pictures


class Folders:
    """Pictures by name below one of several folders; the first that has it counts.

    Args:
        roots: folders; real data sets are unpacked in more than one way.
    """

    def __init__(self, *roots: Path) -> None:
        self.roots = roots

    def read(self, name: str) -> bytes:
        """The bytes of a picture; raises Rejection: a name that leads out, no file, or one too large or unreadable."""
        try:
            for root in self.roots:
                path = inside(root, name)
                if path.is_file():
                    if path.stat().st_size > MAX_FILE_BYTES:
                        raise Rejection("picture too large", f"{name} has {path.stat().st_size} bytes")
                    return path.read_bytes()
        except ArchiveError as error:
            raise Rejection("unsafe path", str(error)) from None
        except OSError as error:
            raise Rejection("missing picture", f"{name} cannot be read ({error.strerror})") from None
        raise Rejection("missing picture", name)


def decode(data: bytes, name: str, size: int) -> Tensor:
    """A picture's pixels.

    Args:
        data: a file in a format that Pillow reads.
        name: for the message.
        size: height and width that it is resized to; other shapes are distorted, as SEED-X does.

    Returns:
        uint8 (3, size, size).

    Raises:
        Rejection: it is damaged, or of more pixels than can be meant.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as picture:
            return from_picture(picture, name, size)
    except ConversationError as error:
        raise Rejection("picture too large", str(error)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejection("picture too large", f"{name}: {error}") from None
    except PICTURE_ERRORS as error:
        raise Rejection("damaged picture", f"{name}: {error}") from None


# ---------------------------------------------------------------------------------------------------------
# conversations


class Turn(NamedTuple):
    """An instruction with the names of the picture it starts from and of the one it gives."""

    instruction: str
    source: str
    target: str


def text_field(row: Any, name: str) -> str:
    """A field of a row that must hold text; raises Rejection."""
    value = row.get(name) if isinstance(row, dict) else None
    if isinstance(value, str) and value.strip():
        if not _is_unicode(value):
            raise Rejection("broken row", f"field {name!r} is {value!r:.60}; expected text without lone surrogates")
        return " ".join(value.split())
    reason: Reason = (
        "no instruction" if "instruction" in name or name in ("prompt", "edit", "edit_prompt") else "broken row"
    )
    raise Rejection(reason, f"field {name!r} is {value!r:.60}; expected text")


def _is_unicode(text: str) -> bool:
    """Whether a text can be stored: JSON can hold halves of a character (lone surrogates), files cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def assemble(
    id_: str, source: str, turns: Sequence[Turn], read: Callable[[str], bytes], image_size: int | None
) -> Conversation:
    """A conversation of an uploaded picture and a round for every turn, each with its true base.

    The base is the earlier picture that the turn starts from: the one of the same name, or else the one whose pixels
    are the same up to resampling (`BASE_TOLERANCE`). Of several that fit, the latest counts.

    Args:
        id_: unique name.
        source: name of the data set.
        turns: in order of time, at least one.
        read: bytes of a picture by its name; raises Rejection.
        image_size: pixels a side of the pictures kept with the conversation; None keeps none, and opens only those
            that are needed to find a base.

    Raises:
        Rejection: a picture cannot be used, or a turn starts from one that the conversation does not have.
    """
    looks: dict[str, Tensor] = {}

    def look(name: str) -> Tensor:
        if name not in looks:
            looks[name] = decode(read(name), name, image_size or BASE_SIZE)
        return looks[name]  # (3, s, s)

    if not turns:
        raise Rejection("broken row", "has no turn; expected at least one")
    names, rounds = [turns[0].source], [Round(UPLOADS[0], "upload")]
    for turn in turns:
        base, last = _find_base(turn.source, names, look), len(names) - 1
        if base == last:
            rounds.append(Round(turn.instruction, "edit", base))
        else:
            rounds.append(
                Round(turn.instruction, "rollback", base, None, earlier_reference(turn.instruction) or "none")
            )
        names.append(turn.target)
    images = None if image_size is None else torch.stack([look(name) for name in names])  # (R, 3, s, s)
    return Conversation(id_, source, tuple(rounds), images).validate()


def _find_base(name: str, earlier: Sequence[str], look: Callable[[str], Tensor]) -> int:
    if name in earlier:
        return len(earlier) - 1 - list(reversed(earlier)).index(name)
    differences = [_difference(look(name), look(other)) for other in earlier]
    least = min(differences)
    if least > BASE_TOLERANCE:
        raise Rejection(
            "base unknown", f"{name} differs by {least:.3f} from every earlier picture; at most {BASE_TOLERANCE}"
        )
    return max(place for place, difference in enumerate(differences) if difference == least)


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of a patch: a local edit stands out, resampling does not."""
    grids = [adaptive_avg_pool2d(picture.float() / 255, BASE_GRID) for picture in (one, other)]  # (3, g, g)
    return float((grids[0] - grids[1]).abs().mean(0).max())
