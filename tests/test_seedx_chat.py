"""SEED-X at the terminal: pictures of any shape, what is said, and what is drawn."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import seedx_toy
import torch
from PIL import Image
from test_seedx_talk import Painter, system
from toy import raised

from nmlib.conversation import ConversationError
from nmlib.seedx_chat import GRIDS, look_at, repl
from nmlib.seedx_checkpoint import System
from nmlib.seedx_vision import tile

SIDE = seedx_toy.SIDE


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture twice as wide as high: its left half is red, its right half blue."""
    path, picture = tmp_path / "photo.png", Image.new("RGB", (4 * SIDE, 2 * SIDE), "red")
    picture.paste("blue", (2 * SIDE, 0, 4 * SIDE, 2 * SIDE))
    picture.save(path)
    return path


def say(made: System, photo: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, painter: Painter | None) -> None:
    coming: Iterator[str] = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(coming))
    repl(made, photo.parent / "drawn", photo, painter, ["2x1"])


def test_a_wide_picture_is_read_in_tiles_and_as_a_whole(photo: Path) -> None:
    vit = system().vit
    assert vit is not None
    shown = look_at(vit, photo, ["1x1", "2x1"])
    assert shown.positions == ((0.25, 0.5), (0.75, 0.5), (0.5, 0.5))
    with Image.open(photo) as picture:
        pixels = tile(picture, ["2x1"], SIDE).pixels  # (3, 3, H, W)
    torch.testing.assert_close(shown.features, vit(pixels))
    whole = look_at(vit, photo, [])
    assert whole.positions == ((0.5, 0.5),)
    torch.testing.assert_close(whole.features, shown.features[2:])
    assert len(look_at(vit, photo, ["1x1"]).features) == 2, "as SEED-X was taught to edit: one tile and the whole"
    assert len(look_at(vit, photo).features) == 3, f"of {GRIDS} the one of its shape"


def test_what_is_said_is_answered_drawn_and_undone(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photo.parent / "a photo.png").write_bytes(photo.read_bytes())
    shown = [f"/show {photo.parent}/a photo.png of him", "/show photo.png", f"/show {photo} and him"]
    lines = [shown[0], "/draw the wall blue", *shown[1:], "/undo", "/other", "", "/quit"]
    say(system(), photo, lines, monkeypatch, Painter())
    out = capsys.readouterr().out
    first = photo.parent / "drawn" / "001.png"
    assert str(first) in out
    with Image.open(first) as picture:
        assert picture.size == (SIDE, SIDE)
    assert "photo.png: no picture that can be read" in out
    assert out.count("Say what to change.") == 3


def test_without_a_detokenizer_pictures_stay_tokens(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(system(), photo, ["/undo", "/undo", "/draw the wall blue", "/quit"], monkeypatch, None)
    out = capsys.readouterr().out
    assert "nothing to undo" in out and "pictures in tokens; drawing them takes `train --stage detokenizer`" in out
    assert not list((photo.parent / "drawn").iterdir())


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    vit = system().vit
    assert vit is not None
    (tmp_path / "no.png").write_bytes(b"PNG and no more")
    assert "no.png: no picture that can be read" in raised(lambda: look_at(vit, tmp_path / "no.png"), ConversationError)
