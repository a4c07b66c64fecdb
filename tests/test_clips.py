"""Identity clips: which frames are kept, why others are not, and a manifest that is read back strictly."""

import json
from pathlib import Path
from typing import Any

import insightface
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_frames import grey, write_folder, write_video
from torch import Tensor, nn
from toy import raised

from nmlib import faces
from nmlib.__main__ import main
from nmlib.clips import (
    Manifest,
    TooManyRejected,
    build_clips,
    check_target,
    load_clip_frames,
    load_manifest,
    save_manifest,
    write_clips,
)
from nmlib.config import ClipConfig
from nmlib.conversation import from_picture, to_picture
from nmlib.faces import DlibEmbedder, Face, FaceDetector, Square, WholePicture
from nmlib.folder_clips import FolderClips
from nmlib.frames import ClipError
from nmlib.phrases import is_heldout
from nmlib.runtime import RunError
from nmlib.world import WorldSource

SETTINGS = ClipConfig(image_size=16, min_face=16, min_frames=2, max_identity_distance=0.5, max_rejected=1.0)


def hue(images: Tensor) -> Tensor:
    """A fake embedder: the direction of a picture's mean colour."""
    return nn.functional.normalize(images.mean((2, 3)) + 1e-6, dim=1)


def colour(red: int, green: int, blue: int, side: int = 16) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.uint8)[:, None, None].expand(3, side, side).contiguous()


# Shades of red are one person, shades of blue another.
REDS = [colour(level, 0, 0) for level in (90, 150, 210)]
BLUES = [colour(0, 0, level) for level in (100, 200)]


def clip(folder: Path, *pictures: Tensor) -> Path:
    return write_folder(folder, {f"{number}.png": picture for number, picture in enumerate(pictures)})


def build(*paths: Path, detector: Any = None, **changes: Any) -> Manifest:
    return build_clips(paths, SETTINGS.model_copy(update=changes), detector or WholePicture(), hue)


def reasons(manifest: Manifest) -> list[str | None]:
    return [frame.reason for frame in manifest.clips[0].frames]


def test_a_clean_clip_is_kept_whole(tmp_path: Path) -> None:
    manifest = build(clip(tmp_path / "anna", *REDS))
    assert reasons(manifest) == [None, None, None]
    assert manifest.clip_counts == {"kept": 1} and manifest.frame_counts == {"kept": 3}
    assert (manifest.detector, manifest.embedder) == ("WholePicture", "hue")
    row = manifest.clips[0]
    assert (row.name, row.measured, row.threshold) == ("anna", 3, 2)
    assert torch.equal(load_clip_frames(manifest, "anna"), torch.stack(REDS))


def test_another_person_is_left_out_with_the_distance(tmp_path: Path) -> None:
    """Red and blue are at a right angle: unit vectors sqrt(2) apart."""
    manifest = build(clip(tmp_path / "anna", REDS[0], BLUES[0], *REDS[1:], BLUES[1]))
    assert reasons(manifest) == [None, "identity switch", None, None, "identity switch"]
    row = manifest.clips[0].frames[1]
    assert row.measured == pytest.approx(2**0.5, abs=1e-4) and row.threshold == 0.5
    assert row.detail in ("medoid 0.png", "medoid 2.png", "medoid 3.png")
    assert manifest.clips[0].frames[0].measured == pytest.approx(0, abs=1e-5)
    assert torch.equal(load_clip_frames(manifest, "anna"), torch.stack(REDS))


def test_the_medoid_is_of_the_majority_not_of_the_first(tmp_path: Path) -> None:
    manifest = build(clip(tmp_path / "anna", *BLUES, *REDS))
    assert reasons(manifest) == ["identity switch"] * 2 + [None] * 3


def test_a_still_picture_of_someone_else_has_one_voice(tmp_path: Path) -> None:
    """Repeated frames are left out before the medoid is taken."""
    manifest = build(clip(tmp_path / "anna", *[BLUES[0]] * 5, *REDS))
    assert reasons(manifest) == ["identity switch"] + ["near duplicate"] * 4 + [None] * 3


def test_near_duplicates_name_the_frame_they_repeat(tmp_path: Path) -> None:
    """A colour 12 of 255 lighter in one of three channels differs by 12 / 255 / 3 = 0.0157."""
    manifest = build(clip(tmp_path / "anna", REDS[0], REDS[1], colour(162, 0, 0), REDS[2]))
    assert reasons(manifest) == [None, None, "near duplicate", None]
    row = manifest.clips[0].frames[2]
    assert row.measured == pytest.approx(12 / 255 / 3, abs=1e-6)
    assert (row.threshold, row.detail) == (SETTINGS.min_difference, "of 1.png")
    assert reasons(build(tmp_path / "anna", min_difference=0.01)) == [None] * 4


class Scripted:
    """A detector that finds as many faces as the green channel of the first pixel says."""

    def __call__(self, picture: Tensor) -> list[Face]:
        side = float(picture[2, 0, 0]) or 16.0
        return [Face((0.0, 0.0, side, 20.0), Square(8.0, 8.0, 16.0, 0.0))] * int(picture[1, 0, 0])


def test_no_several_and_small_faces(tmp_path: Path) -> None:
    """Green counts the faces, blue is the width of the box."""
    pictures = [colour(90, 1, 0), colour(200, 1, 0), colour(90, 0, 0), colour(90, 3, 0), colour(90, 1, 15)]
    manifest = build(clip(tmp_path / "anna", *pictures), detector=Scripted())
    found = [(row.reason, row.measured, row.threshold) for row in manifest.clips[0].frames[2:]]
    assert found == [("no face", 0, 1), ("more than one face", 3, 1), ("face too small", 15, 16)]
    assert manifest.clips[0].kept and manifest.detector == "Scripted"


def test_two_pixels_are_too_small_for_any_detector(tmp_path: Path) -> None:
    manifest = build(clip(tmp_path / "tiny", *[grey(9 * number, 2, 2) for number in range(5)]), detector=Scripted())
    assert reasons(manifest) == ["face too small"] * 5
    row = manifest.clips[0].frames[0]
    assert (row.measured, row.threshold, row.detail) == (2, 16, "the whole picture")
    assert manifest.clips[0].reason == "too few frames" and manifest.clips[0].measured == 0


def test_unreadable_frames_and_clips(tmp_path: Path) -> None:
    good, video = clip(tmp_path / "good", *REDS), tmp_path / "film.mp4"
    (good / "1.png").write_bytes((good / "1.png").read_bytes()[:40])
    video.write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    manifest = build(good, video, tmp_path / "empty", tmp_path / "gone")
    assert reasons(manifest) == [None, "unreadable", None] and manifest.clips[0].frames[1].detail
    assert torch.equal(load_clip_frames(manifest, "good"), torch.stack(REDS[::2]))
    assert manifest.clip_counts == {"kept": 1, "unreadable": 3}
    assert manifest.frame_counts == {"kept": 2, "unreadable": 1}
    assert [row.name for row in manifest.clips] == ["good", "film", "empty", "gone"]
    assert manifest.clips[1].detail.startswith(f"{video}: damaged or truncated (")
    assert raised(lambda: load_clip_frames(manifest, "film"), ClipError).startswith("clip 'film' was rejected: ")
    assert raised(lambda: manifest.clip("flim"), ClipError) == "no clip 'flim' in this manifest of 4 clips"


def test_too_many_rejected_clips_are_an_error_with_the_counts(tmp_path: Path) -> None:
    paths = [clip(tmp_path / "a", *REDS), clip(tmp_path / "b", *REDS[:1]), clip(tmp_path / "c", REDS[0], REDS[0])]
    with pytest.raises(TooManyRejected) as caught:
        build(*paths, max_rejected=0.5)
    assert str(caught.value) == (
        "2 of 3 clips rejected, above max_rejected 0.5; clips: 1 kept, 2 too few frames; "
        "frames: 5 kept, 1 near duplicate"
    )
    assert caught.value.manifest.clips[2].frames[1].detail == "of 0.png"
    assert build(*paths, max_rejected=0.67).clip_counts["kept"] == 1


def test_names_must_differ_and_embedders_give_unit_vectors(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    paths = [clip(tmp_path / "anna", *REDS), clip(tmp_path / "x" / "anna", *REDS)]
    assert raised(lambda: build(*paths), ClipError) == "two clips are named 'anna'; rename one"
    assert raised(build, ClipError) == "no clips; give at least one path"
    for wrong in (lambda images: images.mean((2, 3)), lambda images: hue(images)[:1], lambda images: hue(images) / 0):
        text = raised(lambda wrong=wrong: build_clips(paths[:1], SETTINGS, WholePicture(), wrong), ClipError)
        assert text.endswith("for 3 faces; expected a unit vector for each")


def test_an_embedder_for_which_all_people_are_one_is_refused(tmp_path: Path) -> None:
    """Red, blue and green clips: fine for an embedder that reads hue, refused for one whose pairs all score near 1."""
    greens = [colour(0, level, 0) for level in (90, 150, 210)]
    people = {"anna": REDS, "ben": BLUES, "carl": greens}
    paths = [clip(tmp_path / name, *pictures) for name, pictures in people.items()]

    def blind(images: Tensor) -> Tensor:
        return nn.functional.normalize(hue(images) + 100.0, dim=1)

    assert build(*paths).clip_counts == {"kept": 3}
    text = raised(lambda: build_clips(paths, SETTINGS, WholePicture(), blind), ClipError)
    assert text.startswith("blind: the faces of 3 clips are at most 0.0") and "this is no face embedder" in text
    assert build_clips(paths[:2], SETTINGS, WholePicture(), blind).clip_counts == {"kept": 2}, "two may be one person"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([*REDS, *BLUES, colour(152, 0, 0), grey(0, 2, 2)]), min_size=1, max_size=9))
def test_any_clip_is_sorted_without_contradiction(tmp_path_factory: pytest.TempPathFactory, pictures: list) -> None:
    """Kept faces are distinct and of one person, each frame has one row, and the manifest survives its file."""
    folder = tmp_path_factory.mktemp("clips")
    manifest = build(clip(folder / "anna", *pictures))
    row = manifest.clips[0]
    assert [frame.name for frame in row.frames] == [f"{number}.png" for number in range(len(pictures))]
    kept = [picture for picture, frame in zip(pictures, row.frames, strict=True) if frame.kept]
    assert len({tuple(picture[:, 0, 0].tolist()) for picture in kept}) == len(kept)
    assert len({bool(picture[0, 0, 0]) for picture in kept}) <= 1
    assert row.kept == (len(kept) >= 2)
    save_manifest(manifest, folder / "clips.json")
    assert load_manifest(folder / "clips.json") == manifest


# ---------------------------------------------------------------------------------------------------------
# the file


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A manifest of two clips beside their folders."""
    paths = [clip(tmp_path / "anna", *REDS, BLUES[0]), clip(tmp_path / "ben", *BLUES)]
    save_manifest(build(*paths), tmp_path / "clips.json")
    return tmp_path / "clips.json"


def test_a_manifest_can_be_moved_with_its_clips(stored: Path, tmp_path: Path) -> None:
    assert json.loads(stored.read_text())["clips"][0]["path"] == "anna"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("anna", "ben", "clips.json"):
        (tmp_path / name).rename(moved / name)
    assert torch.equal(load_clip_frames(load_manifest(moved / "clips.json"), "ben"), torch.stack(BLUES))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("clips", 0, "frames", 2, "reason"), "ugly", "clip 0, frame 2, field 'reason': Input should be 'unreadable'"),
        (("clips", 1, "frames", 0, "size"), None, "clip 1, frame 0: a kept frame (reason null) needs its size"),
        (("clips", 0, "frames", 1, "size"), [0, 16], "clip 0, frame 1, size 0: Input should be greater than or equal"),
        (("clips", 0, "frames", 1, "measured"), "1", "clip 0, frame 1, field 'measured': Input should be a valid"),
        (("clips", 1, "nmae"), "x", "clip 1, field 'nmae': Extra inputs are not permitted, found 'x'"),
        (("clips", 1, "name"), "anna", "whole file: two clips are named 'anna'"),
        (("settings", "min_frames"), 3, "whole file: clip 1 is kept with 2 frames; min_frames is 3"),
        (("settings", "min_face"), 0, "field 'min_face': Input should be greater than or equal to 8, found 0"),
        (("clip_counts", "kept"), 1, "whole file: clip_counts is {'kept': 1}, but the rows give {'kept': 2}"),
        (("frame_counts", "kept"), 6, "whole file: frame_counts is"),
    ],
)
def test_faults_name_row_and_field(stored: Path, place: tuple, value: Any, message: str) -> None:
    raw = json.loads(stored.read_text())
    target = raw
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    stored.write_text(json.dumps(raw))
    text = raised(lambda: load_manifest(stored), ClipError)
    assert text.startswith(f"{stored}: ") and text.endswith("; build the manifest again")
    assert message in text


def test_missing_fields_and_damaged_files(stored: Path) -> None:
    raw = json.loads(stored.read_text())
    del raw["clips"][1]["frames"][0]["name"]
    stored.write_text(json.dumps(raw))
    text = raised(lambda: load_manifest(stored), ClipError)
    assert text == f"{stored}: clip 1, frame 0, field 'name': Field required; build the manifest again"
    stored.write_text(json.dumps(raw)[:-9])
    assert "not complete JSON" in raised(lambda: load_manifest(stored), RunError)
    stored.write_text("[]")
    assert raised(lambda: load_manifest(stored), ClipError).startswith(f"{stored}: whole file: ")


def test_files_that_changed_since_are_noticed(stored: Path) -> None:
    manifest, folder = load_manifest(stored), stored.parent / "anna"
    to_picture(grey(0, 20, 20)).save(folder / "1.png")
    text = raised(lambda: load_clip_frames(manifest, "anna"), ClipError)
    assert text == f"{folder}: frame 1 is not as it was; build the manifest again"
    (folder / "1.png").unlink()
    assert "frame 1 is not as it was" in raised(lambda: load_clip_frames(manifest, "anna"), ClipError)
    to_picture(REDS[1]).save(folder / "1.png")
    to_picture(REDS[1]).save(folder / "9.png")
    assert "frame 4 is not as it was" in raised(lambda: load_clip_frames(manifest, "anna"), ClipError)


# ---------------------------------------------------------------------------------------------------------
# people


def test_people_of_a_manifest(stored: Path) -> None:
    manifest = load_manifest(stored)
    faces = load_clip_frames(manifest, "anna")
    assert faces.shape == (3, 3, 16, 16) and faces.dtype == torch.uint8
    assert raised(lambda: load_clip_frames(manifest, "carl"), ClipError).startswith("no clip 'carl'")


def test_no_people_is_an_error(tmp_path: Path) -> None:
    manifest = build(clip(tmp_path / "anna", *REDS[:1]))
    text = raised(lambda: write_clips(manifest, tmp_path / "people", 16), ClipError)
    assert text == "no clip was kept; clips: 1 too few frames" and not (tmp_path / "people").exists()


def test_clips_of_the_world_go_the_same_way(tmp_path: Path) -> None:
    """Whole pictures are faces there; a second person in the middle is found by an embedder that reads skin."""
    source, chance = WorldSource(32), torch.Generator().manual_seed(5)
    people = source.sample_subjects(2, "train", chance)
    frames = [source.render(*source.clip(person, 5, chance)) for person in people]  # (5, 3, 32, 32) each
    pictures = [*frames[0], *frames[1][:2]]

    def known(images: Tensor) -> Tensor:
        """Whose frames these are: the nearest of all that were drawn."""
        drawn = torch.cat(frames).flatten(1)
        nearest = torch.cdist(images.flatten(1), drawn).argmin(1)
        return torch.eye(2)[(nearest >= 5).long()]

    path = clip(tmp_path / "world", *((picture * 255).round().to(torch.uint8) for picture in pictures))
    chosen = ClipConfig(image_size=32, min_face=32, min_difference=0.0, min_frames=4)
    manifest = build_clips([path], chosen, WholePicture(), known)
    assert reasons(manifest) == [None] * 5 + ["identity switch"] * 2
    kept = load_clip_frames(manifest, "world")
    torch.testing.assert_close(kept / 255, frames[0], atol=0.6 / 255, rtol=0)


# ---------------------------------------------------------------------------------------------------------
# frames for conversations by name


def test_people_are_written_as_folders_of_frames(tmp_path: Path) -> None:
    """A picture of 16 x 16 with a white square of 8 where the detector sees the face: it comes to the middle."""

    def shown(level: int) -> Tensor:
        picture = colour(level, 0, 0)
        picture[:, 2:10, 5:13] = 255
        return picture

    def middle(picture: Tensor) -> list[Face]:
        return [Face((5, 2, 13, 10), Square(9.0, 6.0, 8.0, 0.0))]

    pictures = [shown(90), shown(150)]
    settings = SETTINGS.model_copy(update={"min_face": 8, "min_difference": 0.0})
    path = clip(tmp_path / "anna", *pictures)
    manifest = build_clips([path], settings, middle, hue)
    root = tmp_path / "people"
    write_clips(manifest, root, size=16, zoom=2.0)
    boxes = json.loads((root / "anna" / "faces.json").read_text())
    assert boxes == {"000.png": [0.25, 0.25, 0.75, 0.75], "001.png": [0.25, 0.25, 0.75, 0.75]}
    with Image.open(root / "anna" / "001.png") as photo:
        written = from_picture(photo, "001")
    assert written.shape == (3, 16, 16) and (written[:, 5:11, 5:11] == 255).all()
    assert written[:, 13, 7].tolist() == [150, 0, 0] and written[:, 0, 0].tolist() == [0, 0, 0], "black outside"
    loaded = load_manifest(root / "manifest.json")
    assert loaded.clips[0].path == str(path) and loaded.frame_counts == {"kept": 2}
    people = FolderClips(root, 16)
    (made,) = people.clips(1, "train" if not is_heldout("anna") else "heldout", torch.Generator())
    assert made.images is not None and made.boxes is not None
    assert torch.equal(made.images[1], written) and made.boxes.tolist() == [[4.0, 4.0, 12.0, 12.0]] * 2


def test_frames_are_written_whole_or_not_at_all(stored: Path, tmp_path: Path) -> None:
    manifest = load_manifest(stored)
    (tmp_path / "ben" / "1.png").unlink()
    text = raised(lambda: write_clips(manifest, tmp_path / "people", size=16), ClipError)
    assert "frame 1 is not as it was" in text and not (tmp_path / "people").exists()
    assert "zoom 0.5" in raised(lambda: write_clips(manifest, tmp_path / "people", 16, 0.5), ClipError)


def test_a_folder_that_holds_something_else_is_not_replaced(stored: Path, tmp_path: Path) -> None:
    """Neither videos, nor a folder of something else, nor a file; earlier people may go, and an empty folder."""
    manifest, videos = load_manifest(stored), tmp_path / "videos"
    videos.mkdir()
    check_target(videos, [tmp_path / "anna"])
    (videos / "a.mp4").write_bytes(b"a")
    text = raised(lambda: check_target(videos, [tmp_path / "anna"]), ClipError)
    assert text == (
        f"{videos}: holds 'a.mp4' but no manifest.json of earlier people, and is replaced as a whole; give a new folder"
    )
    assert text == raised(lambda: write_clips(manifest, videos, 16), ClipError) and (videos / "a.mp4").exists()
    (videos / "manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to(videos)
    for root, path in ((videos, videos / "a.mp4"), (videos, tmp_path / "link" / "a.mp4"), (tmp_path, videos)):
        text = raised(lambda r=root, p=path: check_target(r, [p]), ClipError)
        assert text == f"{root}: holds the clip {path} and is replaced as a whole; give a new folder"
    assert "is a file" in raised(lambda: check_target(videos / "a.mp4", [tmp_path / "anna"]), ClipError)
    for _ in range(2):
        write_clips(manifest, tmp_path / "people", 16)
    text = raised(lambda: write_clips(manifest, tmp_path, 16), ClipError)
    assert f"holds the clip {tmp_path / 'anna'}" in text and (tmp_path / "anna").is_dir()


def test_the_command_line_keeps_the_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before a detector is loaded."""

    def loaded() -> None:
        raise AssertionError("the detector was loaded")

    monkeypatch.setattr(faces, "FaceDetector", loaded)
    video = tmp_path / "videos" / "a.mp4"
    video.parent.mkdir()
    video.write_bytes(b"a")
    with pytest.raises(SystemExit) as ended:
        main(["data", "clips", str(video), "--to", str(video.parent)])
    err = capsys.readouterr().err
    assert ended.value.code == 1 and video.exists()
    assert err == f"{video.parent}: holds the clip {video} and is replaced as a whole; give a new folder\n"


# ---------------------------------------------------------------------------------------------------------
# real photographs


def moved(picture: Tensor, zoom: float, right: int) -> Tensor:
    """A photograph zoomed and moved on a canvas of 288 x 256 pixels."""
    photo = to_picture(picture)
    photo = photo.resize((round(photo.width * zoom), round(photo.height * zoom)))
    canvas = to_picture(grey(90, 288, 256))
    canvas.paste(photo, ((256 - photo.width) // 2 + right, 10))
    return from_picture(canvas, "canvas")


@pytest.fixture(scope="module")
def portraits(photographs: Path) -> dict[str, Tensor]:
    """Heads of about 100 pixels: three pictures of one person and one of another, each 3 x 240 x 240."""
    detector, heads = FaceDetector(), {}
    for name in ("obama", "obama2", "obama3", "biden"):
        with Image.open(photographs / f"{name}.jpg") as photo:
            photo.thumbnail((800, 800))
            (face,) = detector(from_picture(photo, name))
            x, y, reach = face.square.x, face.square.y, face.square.side
            box = (round(x - reach), round(y - reach), round(x + reach), round(y + reach))
            heads[name] = from_picture(photo.crop(box), name, size=240)
    return heads


def test_a_video_with_a_switch_and_a_repetition(portraits: dict[str, Tensor], tmp_path: Path) -> None:
    """Three views of one person, each repeated moved and zoomed, then another person, then a bare wall."""
    shown = [
        moved(portraits[name], zoom, right)
        for name in ("obama", "obama2", "obama3", "biden")
        for zoom, right in ((1.0, 0), (0.95, 6))
    ]
    video = write_video(tmp_path / "talk.mp4", [*shown, shown[0], grey(90, 288, 256)], rate=5)
    manifest = build_clips([video], ClipConfig(min_frames=3), FaceDetector(), DlibEmbedder())
    expected = [None, "near duplicate"] * 3 + ["identity switch", "near duplicate", "near duplicate", "no face"]
    assert reasons(manifest) == expected
    faces = load_clip_frames(manifest, "talk")
    assert faces.shape == (3, 3, 112, 112) and manifest.clips[0].frames[8].detail == "of 0.000 s"
    everything = build_clips([video], ClipConfig(min_difference=0.0), FaceDetector(), DlibEmbedder())
    assert reasons(everything) == [None] * 6 + ["identity switch"] * 2 + [None, "no face"]


def test_the_command_line_cuts_people_out(
    portraits: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = clip(tmp_path / "talk", *(portraits[name] for name in ("obama", "obama2", "obama3", "biden")))
    command = ["data", "clips", str(path), "--to", str(tmp_path / "people"), "--size", "64", "--min-frames", "3"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0 and "frames: {'identity switch': 1, 'kept': 3}" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "people" / "talk").iterdir()) == [
        "000.png", "001.png", "002.png", "faces.json",
    ]  # fmt: skip
    with Image.open(tmp_path / "people" / "talk" / "002.png") as photo:
        written = from_picture(photo, "002")
    found = FaceDetector(0.5)(written)
    assert written.shape == (3, 64, 64) and len(found) == 1, "one face, in the middle"
    assert abs(found[0].square.x - 32) < 4 and abs(found[0].square.y - 32) < 6
    with pytest.raises(SystemExit) as ended:
        main([*command[:-2], "--min-frames", "5"])
    assert ended.value.code == 1 and "1 of 1 clips rejected" in capsys.readouterr().err


def test_a_group_and_two_pixels_are_no_clips(tmp_path: Path) -> None:
    with Image.open(Path(insightface.__file__).parent / "data" / "images" / "t1.jpg") as photo:
        group = clip(tmp_path / "group", from_picture(photo, "t1"))
    tiny = clip(tmp_path / "tiny", *[grey(number, 2, 2) for number in range(4)])
    with pytest.raises(TooManyRejected, match="2 of 2 clips rejected") as caught:
        build_clips([group, tiny], ClipConfig(), FaceDetector(), DlibEmbedder())
    assert caught.value.manifest.frame_counts == {"face too small": 4, "more than one face": 1}
    assert caught.value.manifest.clips[0].frames[0].measured == 6


def test_settings_that_keep_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="min_frames 9 is above max_frames 8: no clip can be kept"):
        ClipConfig(min_frames=9, max_frames=8)
