"""Stored conversations: there and back, and every way a stored conversation can be wrong."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy import conversations, draw, raised

from nmlib import storage as stored
from nmlib.conversation import KINDS, REFERENCES, ROOTS, Conversation, ConversationError, Edit, Round

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)
WORDS = TEXT.filter(lambda text: bool(text.strip()))
Rows = dict[str, list[Any]]


def _name(draw: st.DrawFn, kind: str, known: list[str]) -> str | None:
    """A name that a round of this kind may have."""
    if kind == "recall":
        return draw(st.sampled_from(known))
    given = st.sampled_from(["ada", "bo", "cy"])
    if kind == "introduce":
        return draw(given)
    return draw(st.none() | given) if kind in ("describe", "edit") else None


@st.composite
def trees(draw: st.DrawFn, id_: str = "c") -> Conversation:
    """Any valid conversation."""
    count = draw(st.integers(1, 5))
    rounds: list[Round] = []
    for index in range(count):
        known = Conversation(id_, "", tuple(rounds)).people(index)
        kind = draw(st.sampled_from([k for k in (KINDS if index else ROOTS) if k != "recall" or known]))
        name = _name(draw, kind, sorted(known))
        base = draw(st.integers(0, index - 1)) if kind in ("edit", "rollback") else known.get(name or "")
        base = None if kind in ROOTS else base
        edit = draw(st.none() | st.builds(Edit, WORDS, WORDS)) if kind in ("edit", "rollback") else None
        values = draw(st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)))
        subject = draw(st.none() | st.tuples(*[st.floats(-1, 1, width=32)] * 3))
        text = f"{draw(WORDS)} {name}" if name else draw(WORDS)
        named = tuple(draw(st.lists(WORDS, max_size=2)))
        reference = draw(st.sampled_from(REFERENCES))
        face = draw(st.none() | st.just((0.0, 0.25, 0.5, 1.0)))
        rounds.append(Round(text, kind, base, edit, reference, values, subject, name, named, face))  # type: ignore[arg-type]
    images = None
    if draw(st.booleans()):
        seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        images = torch.randint(0, 256, (count, 3, 5, 7), generator=seed, dtype=torch.uint8)
    return Conversation(id_, draw(TEXT), tuple(rounds), images)


def same(first: Conversation, second: Conversation) -> bool:
    if (first.images is None) != (second.images is None):
        return False
    pictures = first.images is None or second.images is None or torch.equal(first.images, second.images)
    return pictures and replace(first, images=None) == replace(second, images=None)


# ---------------------------------------------------------------------------------------------------------
# there and back


@settings(max_examples=40, deadline=None)
@given(first=trees("a"), second=trees("b"))
def test_data_set_and_json_give_back_what_was_stored(first: Conversation, second: Conversation) -> None:
    loaded = stored.from_dataset(stored.to_dataset([first, second]))
    assert same(loaded[0], first) and same(loaded[1], second)
    for told in (first, second):
        text = json.dumps(stored.to_json(told))
        assert same(stored.from_json(json.loads(text)), replace(told, images=None))


@settings(max_examples=10, deadline=None)
@given(told=trees())
def test_parquet_gives_back_what_was_stored(tmp_path_factory: pytest.TempPathFactory, told: Conversation) -> None:
    folder = tmp_path_factory.mktemp("set")
    stored.save_conversations([told], folder)
    assert same(stored.load_conversations(folder)[0], told)
    assert same(stored.load_json(folder / "conversations.json")[0], replace(told, images=None))


def test_a_data_set_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    first, second = (draw(conversation) for conversation in conversations())
    for told in ([first, second], [second]):
        stored.save_conversations(told, tmp_path)
        assert all(same(loaded, kept) for loaded, kept in zip(stored.load_conversations(tmp_path), told, strict=True))


def test_the_data_set_has_an_image_column_that_others_can_read(tmp_path: Path) -> None:
    told = draw(conversations()[0])
    stored.save_conversations([told], tmp_path)
    dataset = datasets.Dataset.from_parquet(str(tmp_path / "rounds.parquet"), cache_dir=str(tmp_path / "theirs"))
    assert isinstance(dataset.features["image"], datasets.Image)
    picture = dataset[2]["image"]
    assert isinstance(picture, Image.Image) and told.images is not None
    assert np.array_equal(np.asarray(picture), told.images[2].permute(1, 2, 0).numpy())


# ---------------------------------------------------------------------------------------------------------
# what can be wrong


def changed(row: int, **values: Any) -> datasets.Dataset:
    """Two stored conversations with some values of a row changed."""
    columns = rows()
    for name, value in values.items():
        columns[name][row] = value
    return datasets.Dataset.from_dict(columns, features=stored.FEATURES)


def rows() -> Rows:
    dataset = stored.to_dataset([draw(conversation) for conversation in conversations()])
    columns: Rows = dataset.cast_column("image", datasets.Image(decode=False)).to_dict()
    return columns


def error(dataset: datasets.Dataset) -> str:
    return raised(lambda: stored.from_dataset(dataset, "set.parquet"), ConversationError)


@pytest.mark.parametrize(
    ("row", "values", "text"),
    [
        (2, {"base": 9}, "row 2: field 'base' is 9; expected an earlier round, 0 to 1"),
        (6, {"base": 2}, "row 6: field 'base' is 2; expected an earlier round, 0 to 1"),
        (2, {"base": 3}, "row 2: field 'base' is 3; expected an earlier round, 0 to 1"),
        (2, {"base": -1}, "row 2: field 'base' is -1; expected an earlier round, 0 to 1"),
        (3, {"base": None}, "row 3: field 'base' is None; expected an earlier round, 0 to 2"),
        (0, {"base": 0}, "row 0: field 'base' is 0; a round of kind 'upload' has none"),
        (5, {"kind": "paint"}, "row 5: field 'kind' is 'paint'; expected one of upload, describe, edit, rollback"),
        (5, {"kind": None}, "row 5: field 'kind' is None; expected one of"),
        (
            4,
            {"kind": "edit"},
            "row 4: kind 'edit' cannot open a conversation; expected one of upload, describe, introduce",
        ),
        (1, {"reference": "vague"}, "row 1: field 'reference' is 'vague'; expected one of"),
        (3, {"instruction": ""}, "row 3: field 'instruction' is empty; every round needs one"),
        (3, {"instruction": " \n"}, "row 3: field 'instruction' is empty; every round needs one"),
        (3, {"instruction": None}, "row 3: field 'instruction' is empty; every round needs one"),
        (2, {"round": 3}, "row 2: field 'round' is 3; expected 2 in 'first'"),
        (4, {"conversation": "first"}, "row 4: field 'round' is 0; expected 4 in 'first'"),
        (5, {"edit_value": None}, "row 5: field 'edit_value' is None"),
        (1, {"name": "ada"}, "row 1: field 'name' is 'ada'; expected a word of the instruction 'please make"),
        (2, {"name": "ada"}, "row 2: field 'name' is 'ada'; a round of kind 'rollback' has none"),
        (0, {"kind": "introduce"}, "row 0: field 'name' is empty; a round of kind 'introduce' needs one"),
        (3, {"kind": "recall"}, "row 3: field 'name' is empty; a round of kind 'recall' needs one"),
        (3, {"kind": "recall", "name": "blue"}, "row 3: field 'edit' is blue square; a recall has none"),
        (
            7,
            {"kind": "recall", "name": "over"},
            "row 7: field 'name' is 'over', whom nobody introduced; names known: none yet",
        ),
        (3, {"face": [0.5, 0.0, 0.25, 1.0]}, "row 3: field 'face' is [0.5, 0.0, 0.25, 1.0]; expected left < right and"),
        (3, {"face": [0.0, 0.0, 1.0, 1.5]}, "row 3: field 'face' is [0.0, 0.0, 1.0, 1.5]; expected left < right and"),
        (
            3,
            {"face": [0.0, 1.0]},
            "row 3: field 'face' is [0.0, 1.0]; expected left < right and top < bottom from 0 to 1",
        ),
        (5, {"image": None}, "row 5: field 'image' is empty; expected one in every round of 'second' or in none"),
    ],
)
def test_rows_that_contradict_themselves(row: int, values: dict[str, Any], text: str) -> None:
    assert error(changed(row, **values)).startswith(f"set.parquet: {text}")


def test_missing_columns_are_named() -> None:
    dataset = stored.to_dataset(conversations()).remove_columns(["base", "kind"])
    assert error(dataset).startswith("set.parquet: columns ['base', 'kind'] are missing; expected [")


def png(size: tuple[int, int] = (16, 16), mode: str = "RGB") -> bytes:
    """A picture as a file; coloured ones are noise, which does not compress away."""
    buffer, noise = io.BytesIO(), np.random.default_rng(0)
    picture = Image.new(mode, size)
    if mode == "RGB":
        picture = Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    picture.save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "image",
    [
        {"bytes": b"this is no picture", "path": None},
        {"bytes": png()[:40], "path": None},
        {"bytes": png()[:-200], "path": None},
        {"bytes": png().replace(b"IDAT", b"IDAX"), "path": None},
        {"bytes": png()[:11] + b"\x00" + png()[12:], "path": None},
        {"bytes": None, "path": "/nowhere/at/all.png"},
        {"bytes": b"", "path": None},
    ],
    ids=["text", "header", "truncated", "broken", "no size", "no file", "nothing"],
)
def test_pictures_that_cannot_be_read(image: dict[str, Any]) -> None:
    text = error(changed(6, image=image))
    assert text.startswith("set.parquet: row 6: field 'image' cannot be read (") and text.endswith("remove the row")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_end_in_another_error(data: st.DataObject) -> None:
    whole = png((3, 5))
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(8, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        picture = stored._decode({"bytes": bytes(raw), "path": None}, "row 0")
        assert picture.dtype == torch.uint8 and picture.shape[0] == 3
    except ConversationError as caught:
        assert str(caught).startswith("row 0")


def test_a_picture_too_large_to_be_meant() -> None:
    text = error(changed(0, image={"bytes": png((8000, 8001), "1"), "path": None}))
    assert text == "set.parquet: row 0, field 'image': image is 8000 x 8001; at most 64000000 pixels"
    bomb = error(changed(0, image={"bytes": png((20000, 10000), "1"), "path": None}))
    assert bomb.startswith("set.parquet: row 0") and "pixels" in bomb


def test_pictures_of_unequal_size_are_named() -> None:
    text = error(changed(2, image={"bytes": png((16, 9)), "path": None}))
    assert text == "set.parquet: row 2: field 'image' is 16 x 9; the others of 'first' are 16 x 16"


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "rounds.parquet"
    text = raised(lambda: stored.load_conversations(tmp_path), ConversationError)
    assert text.startswith(f"{path}: no such data set; run the notebook that builds it")
    stored.save_conversations(conversations(), tmp_path)
    whole = path.read_bytes()
    for share in (0, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        text = raised(lambda: stored.load_conversations(tmp_path), ConversationError)
        assert text.startswith(f"{path}: damaged or truncated (") and text.endswith("delete it and build it again")


def test_a_parquet_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "rounds.parquet"
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(path))
    text = raised(lambda: stored.load_conversations(tmp_path), ConversationError)
    assert text.startswith(f"{path}: ") and "missing" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda raw: raw.pop("rounds"), "field 'rounds'; expected `to_json`'s fields"),
        (lambda raw: raw["rounds"][1].pop("edit"), "field 'edit'; expected"),
        (lambda raw: raw["rounds"][1].update(mood="sad"), "unexpected keyword argument 'mood'"),
        (lambda raw: raw["rounds"][1].update(base=7), "round 1: field 'base' is 7; expected an earlier round, 0 to 0"),
        (lambda raw: raw["rounds"][1].update(base="0"), "round 1: field 'base' is '0'; expected the number of a round"),
        (lambda raw: raw["rounds"][1].update(instruction=5), "round 1: field 'instruction' is 5; expected text"),
        (lambda raw: raw["rounds"].clear(), "has no rounds; expected at least one"),
    ],
)
def test_json_that_contradicts_itself(tmp_path: Path, change: Any, text: str) -> None:
    raw = [stored.to_json(conversation) for conversation in conversations()]
    change(raw[1])
    path = tmp_path / "told.json"
    path.write_text(json.dumps(raw))
    message = raised(lambda: stored.load_json(path), ConversationError)
    assert message.startswith(f"{path}: conversation 1") and text in message


def test_json_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "told.json"
    path.write_text('{"id": "not a list"}')
    assert raised(lambda: stored.load_json(path), ConversationError).startswith(f"{path}: conversation 0")
