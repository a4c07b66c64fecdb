"""Editing data sets in Parquet tables: MagicBrush, ImgEdit's conversations, InstructPix2Pix.

A table is read a row group at a time; numbers of rows come from the file's own index, so that a shard or a later
position opens only what it needs.
"""

import bisect
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from nmlib.conversation import Conversation
from nmlib.readers import ReadError, Record, Rejection
from nmlib.turns import Folders, Turn, assemble, text_field


class Tables:
    """Rows of Parquet files, numbered through all files.

    Args:
        root: the data set, for messages and for pictures stored as paths.
        files: in order.
        columns: that are read.

    Raises:
        ReadError: a file that is no Parquet file, or has not these columns.
    """

    def __init__(self, root: Path, files: list[Path], columns: tuple[str, ...]) -> None:
        self.root, self.files, self.columns = root, files, list(columns)
        self._folders = Folders(root)
        self._groups: list[tuple[Path, int]] = []
        self._firsts: dict[Path, int] = {}
        counts: list[int] = []
        for path in files:
            table = _open(path)
            missing = sorted(set(columns) - set(table.schema_arrow.names))
            if missing:
                raise ReadError(f"{path}: columns {missing} are missing; expected {list(columns)}")
            self._firsts[path] = sum(counts)
            for group in range(table.num_row_groups):
                self._groups.append((path, group))
                counts.append(table.metadata.row_group(group).num_rows)
        self._ends = list(accumulate(counts))
        self._group = lru_cache(maxsize=1)(self._read_group)

    def __getstate__(self) -> dict[str, Any]:
        """All but the row group in memory, which stays in its process."""
        return {name: value for name, value in vars(self).items() if name != "_group"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._group = lru_cache(maxsize=1)(self._read_group)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def where(self, number: int) -> str:
        """File and row group of a row."""
        path, group = self._groups[bisect.bisect_right(self._ends, number)]
        return f"{path.name}, row group {group}, row {number}"

    def name(self, number: int) -> str:
        """A row's own name: data set, file and place in the file, whatever other files there are."""
        path, _ = self._groups[bisect.bisect_right(self._ends, number)]
        below = path.relative_to(self.root) if path.is_relative_to(self.root) else Path(path.name)
        folder = os.path.basename(os.path.abspath(self.root))
        return f"{folder}/{below.with_suffix('').as_posix()}-{number - self._firsts[path]:07d}"

    def row(self, number: int) -> dict[str, Any]:
        """A row as plain values; raises Rejection where its row group is damaged."""
        place = bisect.bisect_right(self._ends, number)
        first = self._ends[place - 1] if place else 0
        values: dict[str, Any] = self._group(place).slice(number - first, 1).to_pylist()[0]
        return values

    def _read_group(self, place: int) -> pyarrow.Table:
        path, group = self._groups[place]
        try:
            return _open(path).read_row_group(group, columns=self.columns)
        except (OSError, pyarrow.ArrowException) as error:
            raise Rejection("broken row", f"{path.name}, row group {group}: damaged ({_in_line(error)})") from None

    def column(self, names: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
        """Some small columns of all rows, without the others; raises ReadError where they are damaged."""
        for path in self.files:
            try:
                for batch in _open(path).iter_batches(columns=list(names)):
                    yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)
            except (OSError, pyarrow.ArrowException, UnicodeError) as error:
                raise ReadError(
                    f"{path}: columns {list(names)} are damaged ({_in_line(error)}); fetch it again"
                ) from None

    def picture(self, cell: Any, name: str) -> bytes:
        """The bytes of a picture's cell {bytes, path}; raises Rejection."""
        if isinstance(cell, dict) and cell.get("bytes"):
            return bytes(cell["bytes"])
        if isinstance(cell, dict) and cell.get("path"):
            return self._folders.read(str(cell["path"]))
        raise Rejection("missing picture", f"field {name!r} is empty")


def _open(path: Path) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ReadError(f"{path}: cannot be read as a Parquet file ({_in_line(error)}); fetch it again") from None


def _in_line(error: Exception) -> str:
    return " ".join(str(error).split())  # Arrow's messages have several lines


def columns_of(path: Path) -> list[str]:
    """Names of a file's columns; raises ReadError."""
    return list(_open(path).schema_arrow.names)


class MagicBrush:
    """MagicBrush, training and development sets.

    `data/train-000xx-of-000yy-*.parquet`, `data/dev-*`: img_id (string), turn_index (int32, from 1), source_img and
    target_img (pictures, {bytes, path}), instruction; later copies have mask_img. The rows of one img_id are a session,
    and each starts from the target before it. Source: the data set's card.

    Args:
        root: the data set's folder.
        files: its Parquet files.
        image_size: see `turns.assemble`.

    Raises:
        ReadError: a damaged table, or columns that tell the sessions apart are damaged.
    """

    kind = "MagicBrush"
    evaluation_only = False

    def __init__(self, root: Path, files: list[Path], image_size: int | None) -> None:
        self.root, self.image_size = root, image_size
        self._tables = Tables(root, files, ("img_id", "turn_index", "source_img", "target_img", "instruction"))
        self._sessions: dict[Any, list[tuple[Any, int]]] = {}
        for number, (id_, turn) in enumerate(self._tables.column(("img_id", "turn_index"))):
            self._sessions.setdefault(id_, []).append((turn, number))

    def records(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Record[Conversation]]]:
        """A record for every session, in order of its first row."""
        for number, (id_, rows) in enumerate(self._sessions.items()):
            if wanted(number):
                where = f"{self._tables.where(rows[0][1])}, img_id {id_!r}"
                yield number, Record(where, partial(self._session, id_, rows))

    def _session(self, id_: Any, rows: list[tuple[Any, int]]) -> Conversation:
        found = [turn for turn, _ in rows]
        if not id_ or sorted(found, key=str) != sorted(range(1, len(rows) + 1), key=str):
            raise Rejection(
                "missing turn", f"turn_index {found} of img_id {id_!r}; expected 1 to {len(rows)}, each once"
            )
        pictures: dict[str, bytes] = {}

        def keep(row: dict[str, Any], name: str) -> str:
            data = self._tables.picture(row[name], name)
            key = hashlib.blake2b(data, digest_size=16).hexdigest()  # equal pictures are one picture
            pictures[key] = data
            return key

        turns = []
        for _, number in sorted(rows):
            row = self._tables.row(number)
            turns.append(Turn(text_field(row, "instruction"), keep(row, "source_img"), keep(row, "target_img")))
        return assemble(f"magicbrush-{id_}", self.kind, turns, pictures.__getitem__, self.image_size)


class InstructPix2PixTable:
    """InstructPix2Pix as Parquet: original_image, edit_prompt, edited_image (the captions are passed over).

    Args:
        root: the data set's folder.
        files: its Parquet files.
        image_size: see `turns.assemble`.
    """

    kind = "InstructPix2Pix"
    evaluation_only = False

    def __init__(self, root: Path, files: list[Path], image_size: int | None) -> None:
        self.root, self.image_size = root, image_size
        self._tables = Tables(root, files, ("original_image", "edit_prompt", "edited_image"))

    def records(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Record[Conversation]]]:
        """A record for every row."""
        for number in filter(wanted, range(len(self._tables))):
            yield number, Record(self._tables.where(number), partial(self._edit, number))

    def _edit(self, number: int) -> Conversation:
        row = self._tables.row(number)
        names = ("original_image", "edited_image")
        turn = Turn(text_field(row, "edit_prompt"), *names)
        return assemble(
            f"instructpix2pix-{self._tables.name(number)}",
            self.kind,
            [turn],
            lambda name: self._tables.picture(row[name], name),
            self.image_size,
        )


class ImgEdit:
    """ImgEdit's conversations, among them version backtracking.

    `Parquet/version_backtracking_part0.parquet` has one column, `data`: a list of {"input_images": [path],
    "output_images": [path], "prompt"}. Every turn names its own file of the picture it starts from (`origin_2.png`), so
    bases are found by pixels: in version backtracking the third turn starts from the result of the first. Pictures come
    as tar files in parts (`archives.extract`), below the data set's folder, `Multiturn/` or `images/`. Source:
    ImgEdit's README and its dlc_compose_*_version.py.

    In `content_memory` the first entry is a rule for the whole conversation and has no pictures; such rows are
    rejected.

    Args:
        root: the data set's folder.
        files: Parquet files of conversations.
        image_size: see `turns.assemble`.
    """

    kind = "ImgEdit conversations"
    evaluation_only = False

    def __init__(self, root: Path, files: list[Path], image_size: int | None) -> None:
        self.root, self.image_size = root, image_size
        self._tables = Tables(root, files, ("data",))
        self._folders = Folders(root, root / "Multiturn", root / "images")

    def records(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Record[Conversation]]]:
        """A record for every row."""
        for number in filter(wanted, range(len(self._tables))):
            yield number, Record(self._tables.where(number), partial(self._conversation, number))

    def _conversation(self, number: int) -> Conversation:
        entries = self._tables.row(number)["data"]
        if not isinstance(entries, list):
            raise Rejection("broken row", f"field 'data' is {entries!r:.60}; expected a list of turns")
        turns = []
        for place, entry in enumerate(entries):
            pictures = [_only(entry, name, place) for name in ("input_images", "output_images")]
            turns.append(Turn(text_field(entry, "prompt"), *pictures))
        return assemble(f"imgedit-{self._tables.name(number)}", self.kind, turns, self._folders.read, self.image_size)


def _only(entry: Any, name: str, place: int) -> str:
    paths = entry.get(name) if isinstance(entry, dict) else None
    if isinstance(paths, list) and len(paths) == 1 and isinstance(paths[0], str) and paths[0]:
        return paths[0]
    raise Rejection("broken row", f"turn {place}: field {name!r} is {paths!r:.60}; expected one path")
