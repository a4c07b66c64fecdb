"""Editing data sets in folders and archives: MagicBrush's test set, SEED-Data-Edit parts 2 and 3, InstructPix2Pix.

All fields are those of the files as released; what each class expects is said in its docstring. Fields that a format
has and nothing here needs (masks, captions, inverse instructions) are passed over.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from nmlib.archives import ArchiveError, SafeZip
from nmlib.conversation import Conversation
from nmlib.readers import ReadError, Record, Rejection
from nmlib.turns import Folders, Turn, assemble, text_field

MAX_LINE_BYTES = 1 << 22
JSON_ERRORS = (ValueError, RecursionError)  # the latter for brackets within brackets without end
KNOWN_CORRUPT = tuple(f"20240330_315P_1323turns/Data/{number}/" for number in range(208, 213))
SESSIONS = "edit_sessions.json"


def read_table(data: bytes, where: str) -> Any:
    """JSON that a data set cannot do without; raises ReadError."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except JSON_ERRORS as error:
        raise ReadError(f"{where}: not complete JSON ({error}); fetch the file again") from None


class MagicBrushTest:
    """MagicBrush's test set as it is handed out: a zip file with a password, or the folder it unpacks to.

    `edit_sessions.json`: {image id: [{"input", "mask", "output", "instruction"}, ...]}, pictures in `images/<id>/`;
    both may lie in a folder `test/`. Source: MagicBrush, edit_cli_single_multi_turn.py; its makers ask that nothing is
    ever trained on it.

    Args:
        root: the zip file, or a folder with `edit_sessions.json`.
        image_size: see `turns.assemble`.
        password: of the zip file, given in MagicBrush's README.

    Raises:
        ReadError: no sessions, or a table that is not JSON.
        ArchiveError: the zip file is refused.
    """

    kind = "MagicBrush test"
    evaluation_only = True

    def __init__(self, root: Path, image_size: int | None, password: str | None = None) -> None:
        self.root, self.image_size = root, image_size
        archive = SafeZip(root, password) if root.is_file() else None
        names = archive.names() if archive else [path.name for path in root.iterdir()]
        tables = [name for name in names if PurePosixPath(name).name == SESSIONS]
        if not tables:
            raise ReadError(f"{root}: has no {SESSIONS}; expected MagicBrush's test set")
        above = str(PurePosixPath(tables[0]).parent)
        self._above = "" if above == "." else f"{above}/"
        self._read = _zip_reader(archive) if archive else Folders(root).read
        try:
            table = self._read(tables[0])
        except Rejection as error:
            raise ReadError(f"{root}: {error.detail}; the zip file has a password, given in its README") from None
        self._sessions = read_table(table, f"{root}, {tables[0]}")
        if not isinstance(self._sessions, dict):
            raise ReadError(f"{root}, {tables[0]}: is no mapping; expected image ids with their turns")

    def records(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Record[Conversation]]]:
        """A record for every session."""
        for number, (id_, turns) in enumerate(self._sessions.items()):
            if wanted(number):
                yield number, Record(f"{SESSIONS}, session {id_!r}", partial(self._session, id_, turns))

    def _session(self, id_: str, rows: Any) -> Conversation:
        if not isinstance(rows, list):
            raise Rejection("broken row", f"is {type(rows).__name__}; expected a list of turns")
        turns = [
            Turn(text_field(row, "instruction"), text_field(row, "input"), text_field(row, "output")) for row in rows
        ]
        return assemble(
            f"magicbrush-test-{id_}",
            self.kind,
            turns,
            lambda name: self._read(f"{self._above}images/{id_}/{name}"),
            self.image_size,
        )


def _zip_reader(archive: SafeZip) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except KeyError:
            raise Rejection("missing picture", name) from None
        except ArchiveError as error:
            raise Rejection("damaged picture", str(error)) from None

    return read


class _JsonLines(ABC):
    """Files with one JSON object a line; lines that are not wanted are not parsed."""

    kind = ""
    evaluation_only = False

    def __init__(self, root: Path, image_size: int | None) -> None:
        self.root, self.image_size = root, image_size
        self.files = sorted((root / "annotations").glob("*.jsonl"))
        if not self.files:
            raise ReadError(f"{root / 'annotations'}: holds no .jsonl files; expected split_0001.jsonl, ...")
        self._folders = Folders(root / "images", root / "images" / "data")  # both are seen in unpacked copies

    def records(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Record[Conversation]]]:
        """A record for every line that is not blank."""
        number = 0
        for file in self.files:
            with file.open("rb") as stream:
                place = 0
                while line := stream.readline(MAX_LINE_BYTES):
                    place += 1
                    if not line.strip():
                        continue
                    if wanted(number):
                        where = f"{file.name}, line {place}"
                        id_ = f"{self.kind.lower().replace(' ', '-')}-{file.stem}-{place:06d}"
                        yield number, Record(where, partial(self._row, id_, line))
                    number += 1

    def _row(self, id_: str, line: bytes) -> Conversation:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except JSON_ERRORS as error:
            raise Rejection("broken row", f"not complete JSON ({error})") from None
        if not isinstance(row, dict):
            raise Rejection("broken row", f"is {type(row).__name__}; expected an object")
        source = row.get("source_image")
        if isinstance(source, str) and any(prefix in source for prefix in KNOWN_CORRUPT):
            raise Rejection("known corrupt", f"source_image {source}")
        return assemble(id_, self.kind, self.turns(row), self._folders.read, self.image_size)

    @abstractmethod
    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The turns of a row; raises Rejection."""


class SeedMultiTurn(_JsonLines):
    """SEED-Data-Edit part 3, conversations of up to five turns.

    `annotations/split_000k.jsonl`: {"source_image", "instruction_1", "edit_image_1", "instruction_2", ...}; turn i
    starts from the picture of turn i - 1. `inverse_instruction_i` may be there. Pictures lie below `images/` or
    `images/data/`.

    Args:
        root: the folder `multi_turn_editing`.
        image_size: see `turns.assemble`.
    """

    kind = "SEED-Data-Edit part 3"

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """Turns 1, 2, ... as long as there is an instruction or a picture."""
        source, turns = text_field(row, "source_image"), []
        numbers = [_number(key) for key in row if key.startswith(("instruction_", "edit_image_"))]
        last = max((number for number in numbers if number is not None), default=0)
        for number in range(1, last + 1):
            if f"instruction_{number}" not in row and f"edit_image_{number}" not in row:
                raise Rejection("missing turn", f"turn {number} of {last} is not there")
            target = text_field(row, f"edit_image_{number}")
            turns.append(Turn(text_field(row, f"instruction_{number}"), source, target))
            source = target
        return turns


def _number(key: str) -> int | None:
    digits = key.rpartition("_")[2]
    return int(digits) if digits.isdecimal() and len(digits) < 4 else None


class SeedRealEdits(_JsonLines):
    """SEED-Data-Edit part 2, single edits made by people.

    `annotations/split_000k.jsonl`: {"source_image", "target_image", "instruction"}; pictures below `images/`.

    Args:
        root: the folder `real_editing`.
        image_size: see `turns.assemble`.
    """

    kind = "SEED-Data-Edit part 2"

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The one turn."""
        return [Turn(text_field(row, "instruction"), text_field(row, "source_image"), text_field(row, "target_image"))]


class InstructPix2Pix:
    """InstructPix2Pix as its own code reads it.

    `seeds.json`: [[folder, [seed, ...]], ...]; `<folder>/prompt.json`: {"input", "edit", "output"}; pictures
    `<folder>/<seed>_0.jpg` (before) and `<folder>/<seed>_1.jpg` (after). Source: InstructPix2Pix, edit_dataset.py.

    Args:
        root: the folder with `seeds.json`.
        image_size: see `turns.assemble`.
    """

    kind = "InstructPix2Pix"
    evaluation_only = False

    def __init__(self, root: Path, image_size: int | None) -> None:
        self.root, self.image_size = root, image_size
        self._seeds = read_table((root / "seeds.json").read_bytes(), f"{root / 'seeds.json'}")
        if not isinstance(self._seeds, list):
            raise ReadError(f"{root / 'seeds.json'}: is no list; expected [[folder, [seed, ...]], ...]")

    def records(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Record[Conversation]]]:
        """A record for every seed of every folder; an entry that is no such pair is one record."""
        number = 0
        for place, entry in enumerate(self._seeds):
            pairs = _pairs(entry)
            for folder, seed in pairs or [("", "")]:
                if wanted(number):
                    where = f"seeds.json, entry {place}" + (f", {folder}/{seed}" if pairs else "")
                    yield number, Record(where, partial(self._edit, folder, seed, entry))
                number += 1

    def _edit(self, folder: str, seed: str, entry: Any) -> Conversation:
        if not folder:
            raise Rejection("broken row", f"is {entry!r:.60}; expected [folder, [seed, ...]]")
        folders = Folders(self.root)
        try:
            prompt = json.loads(folders.read(f"{folder}/prompt.json"))
        except JSON_ERRORS as error:
            raise Rejection("broken row", f"{folder}/prompt.json: not complete JSON ({error})") from None
        turn = Turn(text_field(prompt, "edit"), f"{folder}/{seed}_0.jpg", f"{folder}/{seed}_1.jpg")
        return assemble(f"instructpix2pix-{folder}-{seed}", self.kind, [turn], folders.read, self.image_size)


def _pairs(entry: Any) -> list[tuple[str, str]]:
    """Folder and seed of every pair that an entry of `seeds.json` lists; none where it is malformed."""
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], list)):
        return []
    return [(entry[0], str(seed)) for seed in entry[1] if isinstance(seed, str | int)]
