"""Reading data sets from disk: a stream of rows, in shards, from any position, with every bad row counted by reason.

A `Rows` knows one format and numbers its records; a `Reader` walks through those of its shard, keeps what can be read
and says of the rest why not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

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
EARLY_ROWS = 100  # rows before which a few bad ones say nothing of the share


class ReadError(ValueError):
    """A data set that cannot be read; the message names file and row, what was seen and what was expected."""


class TooManyRejected(ReadError):
    """More rows than `max_rejected` were rejected; the message gives the counts."""


class Rejection(Exception):
    """Why one row is left out: a reason to count, and a detail that singles the row out."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)  # as they are, so that it can travel between processes
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


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
        workers: processes that open rows; what comes out, its order and its report stay the same.

    Raises:
        ReadError: a share, shard, position or number of workers that does not exist.
    """

    def __init__(
        self,
        rows: Rows[T],
        max_rejected: float = 0.05,
        *,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
        workers: int = 0,
    ) -> None:
        if not 0 <= rank < world or min(position, workers) < 0 or not 0 <= max_rejected <= 1:
            raise ReadError(
                f"{rows.root}: rank {rank} of world {world}, position {position}, workers {workers}, max_rejected "
                f"{max_rejected}; expected 0 <= rank < world, position and workers >= 0 and a share from 0 to 1"
            )
        self.rows, self.max_rejected, self.rank, self.world = rows, max_rejected, rank, world
        self.position, self.workers, self.report = position, workers, Report()

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
            workers=self.workers if get_worker_info() is None else 0,
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
        for number, where, found in self._rows():
            if isinstance(found, ReadError):
                raise found
            self.position = number + 1
            if isinstance(found, Rejection):
                self.report.reject(where, found)
                self._judge(EARLY_ROWS)
                continue
            self.report.kept += 1
            yield number, found
        self._judge(1)

    def _rows(self) -> Iterator["Opened[T]"]:
        """The rows of this shard from `position` on, in order, opened here or by workers that take turns."""
        first = self.position + (self.rank - self.position) % self.world
        if not self.workers:
            return _opened(self.rows, first, self.world)
        rows = _Turns(self.rows, first, self.world)
        return iter(DataLoader(rows, batch_size=None, num_workers=self.workers, collate_fn=_as_it_is))

    def _judge(self, least: int) -> None:
        """Stop where the share of bad rows, of at least `least` rows, is too high."""
        bad = self.report.seen - self.report.kept
        if bad > self.max_rejected * max(self.report.seen, least):
            reason = max(self.report.rejected, key=self.report.rejected.__getitem__)
            raise TooManyRejected(
                f"{self.rows.root}: {bad} of {self.report.seen} rows rejected, above max_rejected "
                f"{self.max_rejected:g}; {self.report.listed()}; for example {self.report.examples[reason]}"
            )


Opened = tuple[int, str, T | Rejection | ReadError]  # number of a row, where it is, and its content or what is wrong


def _opened(rows: Rows[T], first: int, step: int) -> Iterator[Opened[T]]:
    """Rows `first`, `first + step`, ...; where the data set itself is damaged, that is the last."""
    try:
        for number, record in rows.records(lambda n: n >= first and (n - first) % step == 0):
            found: T | Rejection = _outcome(record)
            yield number, record.where, found
    except ReadError as error:
        yield -1, "", error


class _Turns(IterableDataset[Opened[T]]):
    """The same rows, the workers of a loader taking turns, so that it gives them in order."""

    def __init__(self, rows: Rows[T], first: int, step: int) -> None:
        self.rows, self.first, self.step = rows, first, step

    def __iter__(self) -> Iterator[Opened[T]]:
        worker = cast(Any, get_worker_info())
        return _opened(self.rows, self.first + worker.id * self.step, worker.num_workers * self.step)


def _outcome(record: Record[T]) -> T | Rejection:
    """The content of a row, or why it is left out, also for what a damaged or hostile row makes the system raise."""
    try:
        return record.load()
    except Rejection as rejection:
        return rejection
    except (OSError, RecursionError, UnicodeError) as error:
        return Rejection("broken row", f"cannot be read ({type(error).__name__}: {error})")


def _as_it_is(opened: Any) -> Any:
    return opened
