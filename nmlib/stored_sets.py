"""Data sets too large for memory: written conversation by conversation, read picture by picture.

The files are those of `storage.save_conversations`. What was said is kept in memory, pictures stay on disk until they
are taken.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

import datasets
from pyarrow import parquet

from nmlib.conversation import Conversation, ConversationError
from nmlib.data import ConversationFeatures
from nmlib.runtime import atomic_path, read_json, write_json
from nmlib.storage import FEATURES, from_dataset, load_json, to_dataset, to_json

TOLD = "conversations.json"
NOTE = "note.json"
NOTE_EVERY, NOTE_SECONDS = 500, 300  # conversations, and seconds, between two notes of how far an import is
CHUNK = 32  # conversations whose pictures are in memory at once


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Callable[[Conversation], None]]:
    """A function that adds a conversation to a data set folder, which appears when the block ends without an error."""
    told, waiting = [], list[Conversation]()
    folder.mkdir(parents=True, exist_ok=True)

    with (
        atomic_path(folder / "rounds.parquet") as temporary,
        parquet.ParquetWriter(temporary, FEATURES.arrow_schema) as writer,
    ):

        def flush() -> None:
            if waiting:
                writer.write_table(to_dataset(waiting).data.table.cast(FEATURES.arrow_schema))
            waiting.clear()

        def add(conversation: Conversation) -> None:
            told.append(to_json(conversation))
            waiting.append(conversation)
            if len(waiting) == CHUNK:
                flush()

        yield add
        flush()
    write_json(folder / TOLD, told)


class Parts:
    """A data set under way: parts that are whole, one being written, and a note of how far its source was read.

    A part counts from the note that follows it; what an interrupted writing left behind that is written anew. Leaving
    the block by an error drops the part being written.

    Args:
        folder: of the data set; takes `parts/` until `drop`.
        names: of what is written side by side.
        key: identifies source and settings; parts of another key are dropped, and `is_anew` says so.
    """

    def __init__(self, folder: Path, names: Sequence[str], key: str) -> None:
        self.folder, self._stack = folder / "parts", contextlib.ExitStack()
        self._open: dict[str, Callable[[Conversation], None]] = {}
        note = self.folder / NOTE
        noted = read_json(note) if note.is_file() else {}
        self.is_anew = noted.get("key", key) != key
        if noted.get("key") != key:
            self.drop()
            noted = {"key": key, "whole": dict.fromkeys(names, 0), "source": None}
        self._whole: dict[str, int] = noted["whole"]
        self.key, self.source = key, noted["source"]
        self._added, self._noted_at = 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, name: str, conversation: Conversation) -> None:
        """Add a conversation to what is written under a name."""
        if name not in self._open:
            self._open[name] = self._stack.enter_context(writing(self._part(name, self._whole[name])))
        self._open[name](conversation)
        self._added += 1

    @property
    def is_due(self) -> bool:
        """Whether so much was added, or so much time has passed, since the last note that another is worth it."""
        return self._added >= NOTE_EVERY or (self._added > 0 and time.monotonic() - self._noted_at > NOTE_SECONDS)

    def note(self, source: Any) -> None:
        """Close the parts being written, and note how far the source was read, as plain values: `source` later on."""
        self._stack.close()
        for name in self._open:
            self._whole[name] += 1
        self._open.clear()
        self._added, self._noted_at, self.source = 0, time.monotonic(), source
        write_json(self.folder / NOTE, {"key": self.key, "whole": self._whole, "source": source})

    def told(self) -> Iterator[Conversation]:
        """All conversations in whole parts, without their pictures."""
        for name in self._whole:
            for part in self._parts(name):
                yield from load_json(part / TOLD)

    def join(self, name: str, folder: Path) -> None:
        """Make one data set folder of the whole parts of a name, in order."""
        with (
            atomic_path(folder / "rounds.parquet") as temporary,
            parquet.ParquetWriter(temporary, FEATURES.arrow_schema) as writer,
        ):
            for part in self._parts(name):
                rows = parquet.ParquetFile(part / "rounds.parquet")
                for group in range(rows.num_row_groups):
                    writer.write_table(rows.read_row_group(group))
        write_json(folder / TOLD, [told for part in self._parts(name) for told in read_json(part / TOLD)])

    def drop(self) -> None:
        """Remove the parts; the note first, so that it never speaks of parts that are gone."""
        (self.folder / NOTE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _parts(self, name: str) -> list[Path]:
        return [self._part(name, number) for number in range(self._whole[name])]

    def _part(self, name: str, number: int) -> Path:
        return self.folder / name / f"{number:05d}"


def _require_columns(path: Path) -> None:
    """Raise ConversationError if a data set was written before a column was added to what is stored."""
    try:
        missing = sorted(set(FEATURES) - set(parquet.read_schema(path).names))
    except (OSError, ValueError) as error:
        raise ConversationError(f"{path}: damaged or truncated ({error}); delete it and build it again") from None
    if missing:
        raise ConversationError(f"{path}: written by an earlier version, without {missing}; import it again")


class StoredSet:
    """Conversations of a folder, with their pictures when they are taken.

    Args:
        folder: written by `writing` or by `storage.save_conversations`.
        keep: which conversations are used, judged without their pictures; all by default. They are `told`, without
            their pictures.

    Raises:
        ConversationError: the folder is missing, damaged, or its two files are not of one writing; or none is kept.
    """

    def __init__(self, folder: Path, keep: Callable[[Conversation], bool] = lambda conversation: True) -> None:
        path = folder / "rounds.parquet"
        if path.is_file():
            _require_columns(path)
        told = load_json(folder / TOLD)
        try:
            rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(folder / ".cache"), features=FEATURES)
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            raise ConversationError(f"{path}: damaged or truncated ({error}); delete it and build it again") from None
        self.path, self._rows = path, cast(datasets.Dataset, rows)
        starts = [0]
        for conversation in told:
            starts.append(starts[-1] + len(conversation))
        if starts[-1] != len(self._rows):
            raise ConversationError(
                f"{path}: {len(self._rows)} rows, but conversations.json beside it has {starts[-1]} rounds; "
                "build the data set again"
            )
        chosen = [index for index, conversation in enumerate(told) if keep(conversation)]
        if not chosen:
            raise ConversationError(f"{path}: none of its {len(told)} conversations can be used; build it with others")
        self.dropped = len(told) - len(chosen)
        self._places = [(starts[index], starts[index + 1]) for index in chosen]
        self.told = [told[index] for index in chosen]
        self._lengths = ConversationFeatures(self.told, [])

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, step: int, pictures: int, seed: int) -> list[Conversation]:
        """Conversations of one length, about `pictures` pictures in all; a pure function of step and seed."""
        return self.take(self._lengths.batch_indices(step, pictures, seed))

    def take(self, indices: Sequence[int]) -> list[Conversation]:
        """Conversations with their pictures, every row checked."""
        found = []
        for index in indices:
            start, stop = self._places[index]
            found += from_dataset(self._rows.select(range(start, stop)), f"{self.path}, from row {start}")
        return found
