"""Reading data sets from disk: a stream of rows, in shards, from any position, with every bad row counted by reason.

A `Rows` knows one format and numbers its records; a `Reader` walks through those of its shard, keeps what can be read
and says of the rest why not. `assemble` makes a conversation of the turns that all editing formats come down to.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import IterableDataset, get_worker_info

from nmlib.archives import MAX_FILE_BYTES, ArchiveError, inside
from nmlib.conversation import PICTURE_ERRORS, Conversation, ConversationError, Round, from_picture
from nmlib.phrases import UPLOADS
from nmlib.references import earlier_reference

T = TypeVar("T")
Reason = Literal[
    "broken row",
    "no instruction",
    "missing turn",
    "missing picture",
    "damaged picture",
    "picture too large",
    "unsafe path",
    "base unknown",
    "known corrupt",
    "missing video",
]
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # others of Pillow's start programs, or are never meant
EARLY_ROWS = 100  # rows before which a few bad ones say nothing of the share
BASE_GRID = 16  # pictures are compared patch by patch, so many patches a side
BASE_TOLERANCE = 0.08  # largest mean difference of a patch, colours from 0 to 1, between two copies of one picture
BASE_SIZE = 64  # pixels a side at which they are compared where pictures are not read otherwise


class ReadError(ValueError):
    """A data set that cannot be read; the message names file and row, what was seen and what was expected."""


class TooManyRejected(ReadError):
    """More rows than `max_rejected` were rejected; the message gives the counts."""


class Rejection(Exception):
    """Why one row is left out: a reason to count, and a detail that singles the row out."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Record(Generic[T]):
    """One row that has not been read yet: where it is, and how to read it (raises Rejection)."""

    where: str
    load: Callable[[], T]


class Rows(Protocol[T]):
    """The records of a data set in one format.

    Args:
        kind: name of the format.
        root: its folder or file.
        evaluation_only: its makers ask that nothing is trained on it.
    """

    kind: str
    root: Path
    evaluation_only: bool

    def records(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Record[T]]]:
        """Number and record of every row whose number is wanted, in order; the others are not opened."""
        ...


@dataclass
class Report:
    """Counts of rows: kept, and rejected by reason with the first example of each."""

    kept: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """Rows looked at."""
        return self.kept + sum(self.rejected.values())

    def reject(self, where: str, rejection: Rejection) -> None:
        """Count a row that is left out."""
        self.rejected[rejection.reason] = self.rejected.get(rejection.reason, 0) + 1
        shown = f"{where}: {rejection.detail}".encode("utf-8", "backslashreplace").decode()  # can be printed
        self.examples.setdefault(rejection.reason, shown)

    def listed(self) -> str:
        """The reasons with their counts, in one line."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejected.items())) or "none"


class Reader(IterableDataset[T]):
    """Walks through the rows of a shard; an `IterableDataset`, split once more between the workers of a loader.

    Iterating goes on from `position`; every number below it is done. In the workers of a loader each has its own
    position: note the numbers that `numbered` gives, and start the next run at the smallest of the workers' next ones.

    Args:
        rows: the data set.
        max_rejected: share of rejected rows above which reading stops with an error.
        rank, world: the shard: rows whose number is `rank` modulo `world`.
        position: first row to look at.

    Raises:
        ReadError: a share, shard or position that does not exist.
    """

    def __init__(
        self, rows: Rows[T], max_rejected: float = 0.05, *, rank: int = 0, world: int = 1, position: int = 0
    ) -> None:
        if not 0 <= rank < world or position < 0 or not 0 <= max_rejected <= 1:
            raise ReadError(
                f"{rows.root}: rank {rank} of world {world}, position {position}, max_rejected {max_rejected}; "
                "expected 0 <= rank < world, position >= 0 and a share from 0 to 1"
            )
        self.rows, self.max_rejected, self.rank, self.world = rows, max_rejected, rank, world
        self.position, self.report = position, Report()

    def shard(self, rank: int, world: int) -> "Reader[T]":
        """One of `world` parts of this reader's rows, disjoint and together complete."""
        if not 0 <= rank < world:
            raise ReadError(f"{self.rows.root}: shard {rank} of {world}; expected 0 <= rank < world")
        return Reader(
            self.rows,
            self.max_rejected,
            rank=self.rank + self.world * rank,
            world=self.world * world,
            position=self.position,
        )

    def state(self) -> dict[str, Any]:
        """All that is needed to go on later, as plain values."""
        report = self.report
        return {
            "kind": self.rows.kind,
            "rank": self.rank,
            "world": self.world,
            "position": self.position,
            "kept": report.kept,
            "rejected": dict(report.rejected),
            "examples": dict(report.examples),
        }

    def resume(self, state: dict[str, Any]) -> "Reader[T]":
        """Go on where `state` was taken.

        Raises:
            ReadError: the state is of another format or another shard.
        """
        for name, own in (("kind", self.rows.kind), ("rank", self.rank), ("world", self.world)):
            if state.get(name) != own:
                raise ReadError(f"{self.rows.root}: state has {name} {state.get(name)!r}; this reader has {own!r}")
        self.position = state["position"]
        self.report = Report(state["kept"], dict(state["rejected"]), dict(state["examples"]))
        return self

    def __iter__(self) -> Iterator[T]:
        return (item for _, item in self.numbered())

    def numbered(self) -> Iterator[tuple[int, T]]:
        """Number and content of every row that can be read.

        Raises:
            TooManyRejected: the share of bad rows is above `max_rejected`.
            ReadError: the data set itself is damaged.
        """
        worker = get_worker_info()
        return self._walk() if worker is None else self.shard(worker.id, worker.num_workers)._walk()

    def _walk(self) -> Iterator[tuple[int, T]]:
        for number, record in self.rows.records(self._is_mine):
            self.position = number + 1
            try:
                item = _loaded(record)
            except Rejection as rejection:
                self.report.reject(record.where, rejection)
                self._judge(EARLY_ROWS)
                continue
            self.report.kept += 1
            yield number, item
        self._judge(1)

    def _is_mine(self, number: int) -> bool:
        return number >= self.position and number % self.world == self.rank

    def _judge(self, least: int) -> None:
        """Stop where the share of bad rows, of at least `least` rows, is too high."""
        bad = self.report.seen - self.report.kept
        if bad > self.max_rejected * max(self.report.seen, least):
            reason = max(self.report.rejected, key=self.report.rejected.__getitem__)
            raise TooManyRejected(
                f"{self.rows.root}: {bad} of {self.report.seen} rows rejected, above max_rejected "
                f"{self.max_rejected:g}; {self.report.listed()}; for example {self.report.examples[reason]}"
            )


def _loaded(record: Record[T]) -> T:
    """The content of a row; raises Rejection, also for what a damaged or hostile row makes the system raise."""
    try:
        return record.load()
    except (OSError, RecursionError, UnicodeError) as error:
        raise Rejection("broken row", f"cannot be read ({type(error).__name__}: {error})") from None


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
