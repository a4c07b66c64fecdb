"""Readers of editing data sets on the real layouts: fields, bases, rejected rows by reason, shards and positions."""

import io
import json
import pickle
import random
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import (
    COLOURS,
    magicbrush_rows,
    magicbrush_schema,
    magicbrush_test_files,
    picture,
    seed_line,
    write,
    write_imgedit,
    write_instructpix2pix,
    write_magicbrush,
    write_parquet,
    write_seed,
    write_seed_pictures,
)
from PIL import Image
from pyarrow import parquet
from test_archives import write_zip
from torch.utils.data import DataLoader
from toy import raised

from nmlib.config import DataConfig
from nmlib.conversation import Conversation
from nmlib.edit_sets import InstructPix2Pix, MagicBrushTest, SeedMultiTurn, SeedRealEdits
from nmlib.inspection import recognise
from nmlib.parquet_sets import ImgEdit, InstructPix2PixTable, MagicBrush
from nmlib.readers import Reader, ReadError, Record, Rejection, Rows, TooManyRejected
from nmlib.rollback import ConversationBuilder, from_chain
from nmlib.turns import decode

SIZE = 16


def read(rows: Rows[Any]) -> tuple[list[Conversation], Reader[Any]]:
    reader: Reader[Any] = Reader(rows, max_rejected=1.0)
    return list(reader), reader


def reasons(rows: Rows[Any]) -> dict[str, int]:
    return read(rows)[1].report.rejected


def colours(conversation: Conversation) -> list[str]:
    """Names of the colours of a conversation's pictures."""
    known = {name: torch.tensor(Image.new("RGB", (1, 1), name).getpixel((0, 0))) for name in COLOURS}
    assert conversation.images is not None
    return [
        min(known, key=lambda name: (known[name] - image.float().mean((1, 2))).norm()) for image in conversation.images
    ]


# ---------------------------------------------------------------------------------------------------------
# MagicBrush


def test_magicbrush_sessions_over_two_files(tmp_path: Path) -> None:
    dev, train = recognise(write_magicbrush(tmp_path), SIZE)
    assert (dev.kind, train.kind) == ("MagicBrush, dev", "MagicBrush, train")
    sessions, reader = read(train)
    assert reader.report.rejected == {}
    assert [(item.id, len(item) - 1) for item in sessions] == [
        ("magicbrush-10", 1),
        ("magicbrush-242679", 3),
        ("magicbrush-7", 2),
    ]
    assert sessions[1].images is not None and sessions[1].images.shape == (4, 3, SIZE, SIZE)
    assert colours(sessions[1]) == ["red", "green", "blue", "yellow"]
    assert [item.kind for item in sessions[1].rounds] == ["upload", "edit", "edit", "edit"]
    assert [item.base for item in sessions[1].rounds] == [None, 0, 1, 2]
    assert sessions[1].rounds[2].instruction == "make it blue"
    assert all(item.is_markov for item in sessions)


def test_magicbrush_bad_rows(tmp_path: Path) -> None:
    rows = magicbrush_rows({"whole": 2, "gap": 3, "silent": 1, "empty": 1, "torn": 1, "other": 2})
    by_id = {id_: [row for row in rows if row["img_id"] == id_] for id_ in ("gap", "silent", "empty", "torn", "other")}
    rows.remove(by_id["gap"][1])
    by_id["silent"][0]["instruction"] = None
    by_id["empty"][0]["target_img"] = {"bytes": None, "path": None}
    by_id["torn"][0]["source_img"]["bytes"] = picture("red")[:40]
    by_id["other"][1]["source_img"]["bytes"] = picture("purple")  # not the target of the turn before
    file = write_parquet(tmp_path, "data/train-00000-of-00001.parquet", rows, magicbrush_schema())
    kept, reader = read(MagicBrush(tmp_path, [file], SIZE))
    assert [item.id for item in kept] == ["magicbrush-whole"]
    assert reader.report.rejected == {
        "missing turn": 1,
        "no instruction": 1,
        "missing picture": 1,
        "damaged picture": 1,
        "base unknown": 1,
    }
    where = f"{file.name}, row group 1, row 2, img_id 'gap'"
    assert (
        reader.report.examples["missing turn"]
        == f"{where}: turn_index [1, 3] of img_id 'gap'; expected 1 to 2, each once"
    )


def test_rows_in_any_order_make_a_session(tmp_path: Path) -> None:
    rows = magicbrush_rows({"a": 3, "b": 2})
    file = write_parquet(tmp_path, "x.parquet", [rows[place] for place in (2, 4, 0, 3, 1)], magicbrush_schema())
    kept, _ = read(MagicBrush(tmp_path, [file], SIZE))
    assert [colours(item) for item in kept] == [["red", "green", "blue", "yellow"], ["red", "green", "blue"]]


@pytest.mark.parametrize("unpacked", [False, True])
def test_magicbrush_test_set(tmp_path: Path, unpacked: bool) -> None:
    files = magicbrush_test_files()
    if unpacked:
        for name, data in files.items():
            write(tmp_path, name, data)
    path = tmp_path if unpacked else write_zip(tmp_path / "test.zip", files)
    (rows,) = recognise(path, SIZE)
    assert rows.evaluation_only
    (session,), reader = read(rows)
    assert (session.id, colours(session)) == ("magicbrush-test-261", ["red", "green", "blue"])
    assert [item.base for item in session.rounds] == [None, 0, 1]
    assert reader.report.rejected == {"missing picture": 1}
    assert "5-output1.png" in reader.report.examples["missing picture"]


def test_a_zip_with_a_password_says_so(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "test.zip", magicbrush_test_files())
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # set the flag "encrypted" of every member
        place = data.find(mark)
        while place >= 0:
            data[place + offset] |= 1
            place = data.find(mark, place + 4)
    path.write_bytes(bytes(data))
    assert "has a password, given in its README" in raised(lambda: MagicBrushTest(path, SIZE), ReadError)


# ---------------------------------------------------------------------------------------------------------
# SEED-Data-Edit


def test_seed_multi_turn(tmp_path: Path) -> None:
    lines = [seed_line("one", 5), seed_line("two", 2)]
    root = write_seed(tmp_path, lines)
    write_seed_pictures(root, lines[0])
    write_seed_pictures(root, lines[1], below="images/data")
    (rows,) = recognise(tmp_path, SIZE)
    conversations, reader = read(rows)
    assert reader.report.rejected == {}
    assert [colours(item) for item in conversations] == [list(COLOURS[:6]), list(COLOURS[:3])]
    assert conversations[0].rounds[5].instruction == "make it black"
    assert [item.id for item in conversations] == [
        "seed-data-edit-part-3-split_0001-000001",
        "seed-data-edit-part-3-split_0002-000001",
    ]


def test_seed_bad_lines(tmp_path: Path) -> None:
    gap, silent, torn, lost, out = (seed_line(name, 3) for name in ("gap", "silent", "torn", "lost", "out"))
    del gap["instruction_2"], gap["edit_image_2"]
    silent["instruction_2"] = " "
    out["edit_image_1"] = "../../../../etc/passwd"
    corrupt = {**seed_line("bad", 1), "source_image": "20240330_315P_1323turns/Data/210/x.jpg"}
    bare = {"source_image": "x.jpg"}
    root = write_seed(tmp_path, [gap, silent, torn, lost, out, corrupt, bare, '{"source_image": "x', "[1, 2]"])
    for line in (gap, silent, torn, out):
        write_seed_pictures(root, {key: value for key, value in line.items() if not value.startswith("..")})
    write(root, f"images/{torn['edit_image_3']}", picture("red", kind="JPEG")[:200])
    kept, reader = read(SeedMultiTurn(root, SIZE))
    assert kept == []
    assert reader.report.rejected == {
        "missing turn": 1,
        "no instruction": 1,
        "damaged picture": 1,
        "missing picture": 1,
        "unsafe path": 1,
        "known corrupt": 1,
        "broken row": 3,
    }
    assert reader.report.examples["missing turn"] == "split_0001.jsonl, line 1: turn 2 of 3 is not there"
    assert "'../../../../etc/passwd' leads out of the folder" in reader.report.examples["unsafe path"]


def test_seed_real_edits(tmp_path: Path) -> None:
    row = {"source_image": "a/1.jpg", "target_image": "a/2.jpg", "instruction": "make  it\ngreen"}
    write(tmp_path, "real_editing/annotations/split_0001.jsonl", json.dumps(row) + "\n")
    for number, colour in ((1, "red"), (2, "green")):
        write(tmp_path, f"real_editing/images/a/{number}.jpg", picture(colour, kind="JPEG"))
    (rows,) = recognise(tmp_path, SIZE)
    assert isinstance(rows, SeedRealEdits)
    (found,), _ = read(rows)
    assert (colours(found), found.rounds[1].instruction) == (["red", "green"], "make it green")


# ---------------------------------------------------------------------------------------------------------
# ImgEdit and InstructPix2Pix


def test_imgedit_backtracking_has_true_bases(tmp_path: Path) -> None:
    """Each turn has its own file of its base; the third starts from the result of the first, seen at another size."""
    (rows,) = recognise(write_imgedit(tmp_path), SIZE)
    assert rows.kind == "ImgEdit conversations, version_backtracking_part0"
    for image_size in (SIZE, None):
        (found,), reader = read(ImgEdit(tmp_path, list(tmp_path.glob("Parquet/*")), image_size))
        assert [item.base for item in found.rounds] == [None, 0, 1, 1]
        assert [item.kind for item in found.rounds] == ["upload", "edit", "edit", "rollback"]
        assert found.rounds[3].reference == "ordinal"
        assert not found.is_markov and found.depth(3) == 1
        assert (found.images is None) == (image_size is None)
        assert reader.report.rejected == {"base unknown": 1}


def test_imgedit_rows_that_are_no_turns(tmp_path: Path) -> None:
    rules = {"input_images": [], "output_images": [], "prompt": "all edits use warm colours"}
    two = {"input_images": ["a.png", "b.png"], "output_images": ["c.png"], "prompt": "merge"}
    file = write_parquet(tmp_path, "content_memory.parquet", [{"data": [rules]}, {"data": [two]}, {"data": []}])
    assert reasons(ImgEdit(tmp_path, [file], SIZE)) == {"broken row": 3}


def test_instructpix2pix_folder(tmp_path: Path) -> None:
    kept, reader = read(InstructPix2Pix(write_instructpix2pix(tmp_path), SIZE))
    assert [item.id for item in kept] == ["instructpix2pix-0000000-1038967", "instructpix2pix-0000000-22"]
    assert kept[0].rounds[1].instruction == "make it a dog" and colours(kept[0]) == ["red", "blue"]
    assert reader.report.rejected == {"missing picture": 1, "broken row": 1}


def test_instructpix2pix_table(tmp_path: Path) -> None:
    row = {
        "original_image": {"bytes": picture("red"), "path": None},
        "edit_prompt": "make it blue",
        "edited_image": {"bytes": picture("blue"), "path": None},
        "original_prompt": "a red wall",
    }
    write_parquet(tmp_path, "data/train-00000-of-00001.parquet", [row, {**row, "edit_prompt": ""}])
    (rows,) = recognise(tmp_path, SIZE)
    assert isinstance(rows, InstructPix2PixTable)
    (found,), reader = read(rows)
    assert colours(found) == ["red", "blue"] and reader.report.rejected == {"no instruction": 1}


def test_rows_are_named_by_file_and_place(tmp_path: Path) -> None:
    """Two splits in two places of a folder, and two files of one of them: every row has a name of its own."""
    sides = {"original_image": {"bytes": picture("red")}, "edited_image": {"bytes": picture("blue")}}
    for name in ("data/train-00000-of-00002", "data/train-00001-of-00002", "extra-1", "data/extra-1"):
        write_parquet(tmp_path / "pairs", f"{name}.parquet", [{**sides, "edit_prompt": "make it blue"}] * 2)
    kept = [item.id for rows in recognise(tmp_path / "pairs", SIZE) for item in read(rows)[0]]
    names = ("data/extra-1", "data/train-00000-of-00002", "data/train-00001-of-00002", "extra-1")
    assert sorted(kept) == [f"instructpix2pix-pairs/{name}-{row:07d}" for name in names for row in range(2)]


# ---------------------------------------------------------------------------------------------------------
# damaged tables and pictures


def test_damaged_tables_are_errors_that_name_the_file(tmp_path: Path) -> None:
    text = raised(lambda: MagicBrush(tmp_path, [write(tmp_path, "a.parquet", b"PAR1 no")], SIZE), ReadError)
    assert text.startswith(f"{tmp_path / 'a.parquet'}: cannot be read as a Parquet file")
    other = write_parquet(tmp_path, "b.parquet", [{"data": 1}])
    assert "columns ['img_id'," in raised(lambda: MagicBrush(tmp_path, [other], SIZE), ReadError)
    write(tmp_path, "seeds.json", "[[")
    assert "seeds.json: not complete JSON" in raised(lambda: InstructPix2Pix(tmp_path, SIZE), ReadError)
    assert "holds no .jsonl files" in raised(lambda: SeedMultiTurn(tmp_path, SIZE), ReadError)
    (tmp_path / "empty").mkdir()
    assert "not recognised; expected one of MagicBrush" in raised(lambda: recognise(tmp_path / "empty"), ReadError)


def damage(path: Path, column: str, group: int) -> Path:
    """Overwrite the pages of a column in a row group."""
    data, chunks = bytearray(path.read_bytes()), parquet.ParquetFile(path).metadata.row_group(group)
    (chunk,) = (c for c in map(chunks.column, range(chunks.num_columns)) if c.path_in_schema == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(bytes(data))
    return path


def test_damaged_columns_are_bad_rows_or_errors_that_name_the_file(tmp_path: Path) -> None:
    rows = magicbrush_rows({"a": 2, "b": 2, "c": 2})
    for column, name in (("instruction", "a"), ("img_id", "b"), ("turn_index", "c")):
        file = damage(write_parquet(tmp_path, f"{name}.parquet", rows, magicbrush_schema()), column, 1)
        if column == "instruction":
            kept, reader = read(MagicBrush(tmp_path, [file], SIZE))
            assert [item.id for item in kept] == ["magicbrush-a", "magicbrush-c"]
            assert reader.report.rejected == {"broken row": 1}
            assert "\n" not in reader.report.examples["broken row"]
        else:
            text = raised(lambda f=file: MagicBrush(tmp_path, [f], SIZE), ReadError)
            assert text.startswith(f"{file}: columns ['img_id', 'turn_index'] are damaged (")
            assert text.endswith("fetch it again")


LONG, HALF = "x" * 300 + ".jpg", "half\ud800.jpg"  # no system takes such names


@pytest.mark.parametrize(("name", "reason"), [(LONG, "unsafe path"), (HALF, "broken row")])
def test_names_that_no_system_takes_are_bad_rows(tmp_path: Path, name: str, reason: str) -> None:
    good = seed_line("good", 1)
    root = write_seed(tmp_path, [{**seed_line("bad", 1), "edit_image_1": name}, {**good, "instruction_1": HALF}, good])
    write_seed_pictures(root, seed_line("bad", 1))
    write_seed_pictures(root, good)
    kept, reader = read(SeedMultiTurn(root, SIZE))
    assert len(kept) == 1 and reader.report.rejected == {"broken row": 1, reason: 2 if reason == "broken row" else 1}
    assert all(text.isascii() for text in reader.report.examples.values())


def test_folders_that_no_system_takes_are_bad_rows(tmp_path: Path) -> None:
    """In a list of folders and in the ids of a zip file; what is said of them can be printed."""
    root = write_instructpix2pix(tmp_path / "folders")
    write(root, "seeds.json", json.dumps([[LONG, [1]], [HALF, [2]], ["0000000", [22]]]))
    kept, reader = read(InstructPix2Pix(root, SIZE))
    assert len(kept) == 1 and reader.report.rejected == {"unsafe path": 2}
    files = magicbrush_test_files()
    sessions = json.loads(files["test/edit_sessions.json"])
    files["test/edit_sessions.json"] = json.dumps({HALF: sessions["5"], "261": sessions["261"]}).encode()
    kept, reader = read(MagicBrushTest(write_zip(tmp_path / "test.zip", files), SIZE))
    assert len(kept) == 1 and reader.report.rejected == {"missing picture": 1}
    assert "half\\ud800" in reader.report.examples["missing picture"]


def test_brackets_without_end_are_bad_rows_or_errors(tmp_path: Path) -> None:
    deep, good = "[" * 100_000, seed_line("good", 1)
    root = write_seed(tmp_path, [deep, good])
    write_seed_pictures(root, good)
    kept, reader = read(SeedMultiTurn(root, SIZE))
    assert len(kept) == 1 and reader.report.rejected == {"broken row": 1}
    pairs = write_instructpix2pix(tmp_path / "pairs")
    write(pairs, "0000000/prompt.json", deep)
    assert reasons(InstructPix2Pix(pairs, SIZE)) == {"broken row": 3, "missing picture": 1}
    write(pairs, "seeds.json", deep)
    assert "seeds.json: not complete JSON (" in raised(lambda: InstructPix2Pix(pairs, SIZE), ReadError)


def test_what_the_system_refuses_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures on a disk that fails, and any other row that cannot be read."""
    line = seed_line("one", 1)
    root = write_seed(tmp_path, [line])
    write_seed_pictures(root, line)

    def failing(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        _, reader = read(SeedMultiTurn(root, SIZE))
    assert reader.report.rejected == {"missing picture": 1}
    assert reader.report.examples["missing picture"].endswith("one.jpg cannot be read (Input/output error)")
    other: Reader[int] = Reader(Numbers(3, frozenset({1}), PermissionError("no")), 1.0)
    assert list(other) == [0, 2]
    assert other.report.examples == {"broken row": "row 1: cannot be read (PermissionError: no)"}


def huge(side: int) -> bytes:
    """A PNG whose header says `side` x `side` pixels; all that it holds is one."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("side", [30_000, 10_000, 8_001])
def test_huge_pictures_are_refused_before_they_are_unpacked(side: int) -> None:
    text = raised(lambda: decode(huge(side), "bomb.png", SIZE), Rejection)
    assert text.startswith("picture too large: bomb.png: ")


def test_formats_that_start_programs_are_not_opened() -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert raised(lambda: decode(script, "a.png", SIZE), Rejection).startswith("damaged picture: a.png")


# ---------------------------------------------------------------------------------------------------------
# shards, positions, shares


def write_seed_session(root: Path) -> Path:
    return write_seed(root, [seed_line("one", 2)])


class Numbers:
    """Rows that are their own numbers; some are bad."""

    kind, root, evaluation_only = "numbers", Path("numbers"), False

    def __init__(self, count: int, bad: frozenset[int] = frozenset(), fault: Exception | None = None) -> None:
        self.count, self.bad, self.fault = count, bad, fault

    def records(self, wanted: Any) -> Iterator[tuple[int, Any]]:
        def load(number: int) -> int:
            if number in self.bad:
                raise self.fault or Rejection("broken row", f"is {number}")
            return number

        for number in filter(wanted, range(self.count)):
            yield number, Record(f"row {number}", lambda n=number: load(n))


@given(
    turns=st.lists(st.sampled_from((0, 1, 2, 5)), max_size=23),
    world=st.integers(1, 5),
    workers=st.integers(1, 3),
    stop=st.integers(0, 7),
)
@settings(max_examples=40, deadline=None)
def test_shards_are_disjoint_and_complete_and_go_on_anywhere(
    turns: list[int], world: int, workers: int, stop: int
) -> None:
    """On a real layout whose rows without a turn are bad: the parts of all shards, each cut in two, are the whole."""
    with TemporaryDirectory() as folder:
        lines = [seed_line(f"n{number}", count) for number, count in enumerate(turns)]
        rows = SeedMultiTurn(write_seed(Path(folder), lines), None)
        whole, reader = read(rows)
        assert (len(whole), reader.report.seen) == (sum(count > 0 for count in turns), len(turns))
        found, seen, bad = [], 0, 0
        for rank in range(world):
            for worker in range(workers):
                first = Reader(rows, 1.0).shard(rank, world).shard(worker, workers)
                part = [item.id for item in islice(first, stop)]
                state = json.loads(json.dumps(first.state()))
                later = Reader(rows, 1.0).shard(rank, world).shard(worker, workers).resume(state)
                found += part + [item.id for item in later]
                seen, bad = seen + later.report.seen, bad + sum(later.report.rejected.values())
        assert sorted(found) == sorted(item.id for item in whole)
        assert (seen, bad) == (len(turns), turns.count(0))


def test_rows_of_other_shards_are_not_opened() -> None:
    reader: Reader[int] = Reader(Numbers(10, frozenset(range(0, 10, 2))), 0.0, rank=1, world=2)
    assert list(reader) == [1, 3, 5, 7, 9]


def test_workers_of_a_loader_share_the_rows() -> None:
    reader: Reader[int] = Reader(Numbers(11), rank=0, world=2)
    assert sorted(DataLoader(reader, batch_size=None, num_workers=2)) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("write", [write_magicbrush, write_imgedit, write_instructpix2pix, write_seed_session])
def test_rows_travel_to_a_process_that_is_spawned(write: Any, tmp_path: Path) -> None:
    for rows in recognise(write(tmp_path), 16):
        there = pickle.loads(pickle.dumps(rows))
        assert [c.rounds for c in Reader(there, 1.0)] == [c.rounds for c in Reader(rows, 1.0)]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("rank", "world", "position"), [(0, 1, 0), (1, 2, 4), (2, 3, 7)])
def test_workers_change_neither_order_nor_report(workers: int, rank: int, world: int, position: int) -> None:
    rows, where = Numbers(29, frozenset({3, 4, 17})), {"rank": rank, "world": world, "position": position}
    alone, shared = Reader[int](rows, 1.0, **where), Reader[int](rows, 1.0, **where, workers=workers)
    assert list(shared) == list(alone)
    assert shared.state() == alone.state()


def test_workers_pass_on_what_stops_the_reading() -> None:
    bad: Reader[int] = Reader(Numbers(200, frozenset(range(50, 61))), 0.1, workers=2)
    assert raised(lambda: list(bad), TooManyRejected) == (
        "numbers: 11 of 61 rows rejected, above max_rejected 0.1; 11 broken row; for example row 50: is 50"
    )
    damaged: Reader[int] = Reader(Numbers(9, frozenset({5}), ReadError("numbers: damaged")), 0.1, workers=2)
    assert raised(lambda: list(damaged), ReadError) == "numbers: damaged"
    assert "workers -1" in raised(lambda: Reader(Numbers(4), workers=-1), ReadError)


def test_a_state_of_another_shard_is_refused() -> None:
    state = Reader(Numbers(4), rank=0, world=2).state()
    assert "state has rank 0; this reader has 1" in raised(
        lambda: Reader(Numbers(4), rank=1, world=2).resume(state), ReadError
    )
    assert "expected 0 <= rank < world" in raised(lambda: Reader(Numbers(4)).shard(2, 2), ReadError)


def test_too_many_bad_rows_stop_the_reading() -> None:
    reader: Reader[int] = Reader(Numbers(200, frozenset(range(50, 61))), 0.1)
    text = raised(lambda: list(reader), TooManyRejected)
    assert text == ("numbers: 11 of 61 rows rejected, above max_rejected 0.1; 11 broken row; for example row 50: is 50")
    assert len(list(Reader(Numbers(200, frozenset(range(50, 60))), 0.1))) == 190
    assert "2 of 10 rows" in raised(lambda: list(Reader(Numbers(10, frozenset({0, 9})), 0.1)), TooManyRejected)


# ---------------------------------------------------------------------------------------------------------
# what chains are for


class NoEditor:
    """Makes no new edits, so that every added round is a pure rollback."""

    def propose(self, conversation: Conversation, base: int, rng: random.Random) -> None:
        return None

    def apply(self, *_: Any) -> Any:
        raise AssertionError("there is no edit to apply")


def test_chains_become_rollback_conversations(tmp_path: Path) -> None:
    chain = next(item for item in read(recognise(write_magicbrush(tmp_path), SIZE)[1])[0] if len(item) == 4)
    builder = ConversationBuilder((), NoEditor(), DataConfig(conversations=1, rounds=(6,), rollback_share=1.0), "any")
    made = from_chain(chain, builder, random.Random(0), 6).validate()
    assert len(made) == 6 and not made.is_markov
    base = made.rounds[5].base
    assert base is not None and made.images is not None and torch.equal(made.images[5], made.images[base])
