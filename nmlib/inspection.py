"""What a folder on disk holds: the kind of data set, its size and faults, and how Markov it is.

A round can be answered from the last picture alone if it starts from the picture of the previous round and its words
name no earlier one (`references.earlier_reference`). The share of such rounds, among all that start from some picture,
says how little a data set asks of memory: 1 for a chain of edits, less where people go back.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nmlib.archives import ArchiveError, SafeZip
from nmlib.conversation import Conversation, ConversationError
from nmlib.edit_sets import SESSIONS, InstructPix2Pix, MagicBrushTest, SeedMultiTurn, SeedRealEdits
from nmlib.face_sets import HDTF, VFHQ, CelebV, FaceClip
from nmlib.parquet_sets import ImgEdit, InstructPix2PixTable, MagicBrush, columns_of
from nmlib.readers import Reader, ReadError, Record, Report, Rows
from nmlib.references import earlier_reference
from nmlib.storage import load_json

KNOWN = (
    "MagicBrush (Parquet, test zip), SEED-Data-Edit parts 2 and 3, ImgEdit, InstructPix2Pix, CelebV-HQ, CelebV-Text, "
    "VFHQ, HDTF, conversations of this project"
)


def _same(conversation: Conversation) -> Conversation:
    return conversation


class StoredConversations:
    """Conversations as `storage.save_conversations` stored them, without pictures."""

    kind = "conversations of this project"
    evaluation_only = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def records(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Record[Conversation]]]:
        """A record for every conversation."""
        try:
            conversations = load_json(self.root / "conversations.json")
        except ConversationError as error:
            raise ReadError(str(error)) from None
        for number, conversation in enumerate(conversations):
            if wanted(number):
                yield number, Record(f"conversation {number}", partial(_same, conversation))


class NotRecognised(ReadError):
    """A folder in which nothing is known."""


def recognise(path: Path, image_size: int | None = None, password: str | None = None) -> list[Rows[Any]]:
    """The data sets in a folder or file.

    Args:
        path: the folder that a data set was unpacked to, or MagicBrush's test zip.
        image_size: pixels a side of the pictures kept; None keeps none (`turns.assemble`).
        password: of a zip file.

    Raises:
        ReadError: nothing that is known (`NotRecognised`), or a damaged table.
        ArchiveError: a zip file that is refused.
    """
    if path.is_file() and path.suffix == ".zip":
        if not any(name.rpartition("/")[2] == SESSIONS for name in SafeZip(path, password).names()):
            raise ReadError(
                f"{path}: has no {SESSIONS}; MagicBrush's test set is the only zip file that is read as it is"
            )
        return [MagicBrushTest(path, image_size, password)]
    if not path.is_dir():
        raise ReadError(f"{path}: no such folder; expected one of {KNOWN}")
    if (path / "conversations.json").is_file():
        return [StoredConversations(path)]
    found = [*_tables(path, image_size), *_folders(path, image_size)]
    if not found:
        raise NotRecognised(f"{path}: not recognised; expected one of {KNOWN}, unpacked")
    return found


def _tables(path: Path, image_size: int | None) -> Iterator[Rows[Any]]:
    """Data sets in Parquet files, told apart by their columns and by the word before the first dash of their names."""
    groups: dict[tuple[type[Any], str], list[Path]] = {}
    for file in sorted({*path.glob("*.parquet"), *path.glob("data/*.parquet"), *path.glob("Parquet/*.parquet")}):
        columns = set(columns_of(file))
        for rows, needed in (
            (MagicBrush, {"img_id", "turn_index", "source_img", "target_img"}),
            (InstructPix2PixTable, {"original_image", "edit_prompt", "edited_image"}),
            (ImgEdit, {"data"}),
        ):
            if needed <= columns:
                groups.setdefault((rows, file.name.partition("-")[0].removesuffix(".parquet")), []).append(file)
    for (rows, split), files in groups.items():
        made = rows(path, files, image_size)
        made.kind = f"{rows.kind}, {split}"
        yield made


def _folders(path: Path, image_size: int | None) -> Iterator[Rows[Any]]:
    for folder in (path, path / "test"):
        if (folder / SESSIONS).is_file():
            yield MagicBrushTest(folder, image_size)
    for rows, name in ((SeedMultiTurn, "multi_turn_editing"), (SeedRealEdits, "real_editing")):
        for folder in (path, path / name):
            if folder.name == name and (folder / "annotations").is_dir():
                yield rows(folder, image_size)
    if (path / "seeds.json").is_file():
        yield InstructPix2Pix(path, image_size)
    if any((path / name).is_file() for name in ("celebvhq_info.json", "celebvtext_info.json")):
        yield CelebV(path)
    if next(path.rglob("Clip+*.txt"), None) is not None:
        yield VFHQ(path)
    if next(path.glob("*_annotion_time.txt"), None) is not None:
        yield HDTF(path)


@dataclass
class Markov:
    """How many rounds the last picture can answer.

    Args:
        rounds: that start from some earlier picture.
        base: of these, how many start from the previous one.
        words: of these, how many name no earlier one.
        both: of these, how many do neither: those that the last picture alone can answer.
    """

    rounds: int = 0
    base: int = 0
    words: int = 0
    both: int = 0

    def add(self, conversation: Conversation) -> None:
        """Count the rounds of a conversation."""
        for index, item in enumerate(conversation.rounds):
            if item.base is None:
                continue
            is_previous, is_silent = conversation.depth(index) == 0, earlier_reference(item.instruction) is None
            self.rounds += 1
            self.base += is_previous
            self.words += is_silent
            self.both += is_previous and is_silent

    @property
    def share(self) -> float:
        """Share of rounds that the last picture alone can answer."""
        return self.both / self.rounds if self.rounds else float("nan")


@dataclass
class Findings:
    """What was found in a data set; `lengths` counts conversations by their number of generated pictures."""

    rows: Rows[Any]
    report: Report
    complete: bool = True
    lengths: dict[int, int] = field(default_factory=dict)
    markov: Markov = field(default_factory=Markov)
    identities: set[str] = field(default_factory=set)

    def lines(self) -> list[str]:
        """The findings in words."""
        kept, bad = self.report.kept, self.report.seen - self.report.kept
        whole = "" if self.complete else f" (the first {self.report.seen} rows; more follow)"
        lines = [
            f"{self.rows.root}",
            f"kind        {self.rows.kind}",
            f"rows        {kept} kept, {bad} rejected{whole}",
        ]
        for reason, count in sorted(self.report.rejected.items()):
            lines.append(f"            {count} {reason}, for example {self.report.examples[reason]}")
        if self.identities:
            lines.append(f"people      {len(self.identities)} in {kept} clips")
        if self.lengths:
            spread = ", ".join(f"{count} of {length}" for length, count in sorted(self.lengths.items()))
            lines.append(f"rounds      {sum(n * count for n, count in self.lengths.items())} (conversations {spread})")
        if self.markov.rounds:
            found = self.markov
            lines.append(
                f"Markov      {found.share:.3f}: {found.both} of {found.rounds} rounds can be answered from the last "
                "picture alone"
            )
            lines.append(
                f"            base is the previous round: {found.base}; words name no earlier picture: {found.words}"
            )
        if self.rows.evaluation_only:
            lines.append("note        for evaluation only: its makers ask that nothing is trained on it")
        return lines


def inspect(rows: Rows[Any], limit: int | None = None) -> Findings:
    """Read a data set, or the first `limit` rows that can be read, and count what is in it; bad rows never stop it."""
    reader: Reader[Any] = Reader(rows, max_rejected=1.0)
    found = Findings(rows, reader.report)
    for item in reader:
        if isinstance(item, FaceClip):
            found.identities.add(item.identity)
        else:
            rounds = sum(not round_.is_brought for round_ in item.rounds)
            found.lengths[rounds] = found.lengths.get(rounds, 0) + 1
            found.markov.add(item)
        if limit is not None and found.report.kept >= limit:
            found.complete = False
            break
    return found


def inspect_path(
    path: Path, *, limit: int | None = None, pictures: bool = True, password: str | None = None
) -> list[Findings]:
    """Say of every data set in a folder or file what it holds.

    Args:
        path: see `recognise`.
        limit: rows to read of each.
        pictures: open every picture, so that damaged ones are counted; otherwise only those that tell bases.
        password: of a zip file.

    Raises:
        ReadError: nothing known is there, or a damaged table.
    """
    try:
        return [inspect(rows, limit) for rows in recognise(path, 64 if pictures else None, password)]
    except ArchiveError as error:
        raise ReadError(str(error)) from None
