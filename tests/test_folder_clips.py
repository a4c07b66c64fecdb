"""Folders of faces: what is read, which split, and what can be wrong."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy import raised

from nmlib.conversation import ConversationError
from nmlib.folder_clips import FolderClips
from nmlib.phrases import is_heldout
from nmlib.sources import IdentityClips

PERSONS = [f"id{number:02d}" for number in range(30)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Thirty people of three frames, each frame of one colour: (person, frame, 7)."""
    for number, person in enumerate(PERSONS):
        (tmp_path / person).mkdir()
        for frame in range(3):
            Image.new("RGB", (11, 13), (number, frame, 7)).save(tmp_path / person / f"{frame:03d}.png")
    return tmp_path


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def persons(source: FolderClips, count: int, split: str) -> set[str]:
    made = source.clips(count, split, chance())
    return {PERSONS[int(clip.images[0, 0, 0, 0])] for clip in made if clip.images is not None}


def test_frames_are_read_and_people_split_by_the_name_of_their_folder(root: Path) -> None:
    source = FolderClips(root, 16)
    assert isinstance(source, IdentityClips)
    clip = source.clips(1, "train", chance())[0]
    assert clip.images is not None and clip.images.shape == (3, 3, 16, 16) and clip.subjects is clip.boxes is None
    assert clip.images[:, 1, 0, 0].tolist() == [0, 1, 2]
    held = {person for person in PERSONS if is_heldout(person)}
    assert held and persons(source, len(held), "heldout") == held
    assert not persons(source, 30 - len(held), "train") & held


def test_long_clips_are_thinned_out(root: Path) -> None:
    clip = FolderClips(root, 16, frames=2).clips(1, "train", chance())[0]
    assert clip.images is not None and clip.images[:, 1, 0, 0].tolist() == [0, 2]


def test_turned_photographs_are_read_upright(tmp_path: Path) -> None:
    """A phone's file lies on its side and says so: red is on the left in the file, above in the photograph."""
    stored = Image.new("RGB", (32, 16), "blue")
    stored.paste("red", (0, 0, 16, 16))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    for person in PERSONS:
        (tmp_path / person).mkdir()
        for frame in range(2):
            stored.save(tmp_path / person / f"{frame}.jpg", exif=turned, quality=95)
    clip = FolderClips(tmp_path, 16).clips(1, "train", chance())[0]
    assert clip.images is not None
    above, below = clip.images[:, :, 2].float(), clip.images[:, :, 13].float()  # (F, 3, W)
    assert (above[:, 0] > 200).all() and (above[:, 2] < 50).all() and (below[:, 2] > 200).all()


def test_huge_frames_are_refused_before_they_are_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmlib.conversation.MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    text = raised(lambda: FolderClips(root, 16).clips(1, "train", chance()), ConversationError)
    assert text.endswith(".png: image is 11 x 13; at most 100 pixels")


def test_boxes_are_shares_of_the_frame(root: Path) -> None:
    for person in PERSONS:
        boxes = {f"{frame:03d}.png": [0.25, 0.5, 0.75, 1.5] for frame in range(3)}
        (root / person / "faces.json").write_text(json.dumps(boxes))
    clip = FolderClips(root, 16).clips(1, "train", chance())[0]
    assert clip.boxes is not None and clip.boxes.tolist() == [[4.0, 8.0, 12.0, 16.0]] * 3


def test_what_can_be_wrong(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = FolderClips(root, 16)
    assert "people in split 'train'; expected 31 or more" in raised(
        lambda: source.clips(31, "train", chance()), ConversationError
    )
    assert "look-alikes are not known" in raised(lambda: source.clips(1, "train", chance(), 0.5), ConversationError)
    for wrong in (root / "nowhere", tmp_path_factory.mktemp("empty")):
        assert raised(lambda w=wrong: FolderClips(w, 16), ConversationError).startswith(f"{wrong}: no person with two")  # type: ignore[misc]
    for person in PERSONS:
        (root / person / "faces.json").write_text(json.dumps({"000.png": [0, 0, 1]}))
    text = raised(lambda: source.clips(1, "train", chance()), ConversationError)
    assert text.endswith("faces.json: no box of four numbers for 000.png; expected [left, top, right, bottom]")
    for person in PERSONS:
        (root / person / "001.png").write_bytes(b"no picture")
    assert "001.png: cannot be read as a picture (" in raised(
        lambda: source.clips(1, "train", chance()), ConversationError
    )
