"""Face clips in the layouts of CelebV-HQ, CelebV-Text, VFHQ and HDTF: fields, oddities, what is cut, whom it shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import picture, write
from test_frames import write_video
from test_readers import reasons
from torch import Tensor
from toy import raised

from nmlib.clips import build_clips
from nmlib.config import ClipConfig
from nmlib.face_clips import people_of
from nmlib.face_sets import HDTF, VFHQ, CelebV, FaceClip, cut_frames, write_people
from nmlib.faces import WholePicture
from nmlib.frames import ClipError
from nmlib.inspection import inspect_path, recognise
from nmlib.readers import Reader, ReadError


def clips(path: Path) -> dict[str, FaceClip]:
    (rows,) = recognise(path)
    return {clip.name: clip for clip in Reader(rows, 1.0)}


def halves(levels: tuple[int, ...]) -> list[Tensor]:
    """Frames of 64 x 48, black on the left and grey on the right."""
    frames = torch.zeros(len(levels), 3, 48, 64, dtype=torch.uint8)
    for frame, level in zip(frames, levels, strict=True):
        frame[:, :, 32:] = level
    return list(frames)


def celebv(**changes: Any) -> dict[str, Any]:
    return {
        "ytb_id": "M2Ohb0FAaJU",
        "duration": {"start_sec": 0.1, "end_sec": 0.6},
        "bbox": {"top": 0.0, "bottom": 0.7, "left": 0.5, "right": 1.0},
        "attributes": {"appearance": [0, 1], "action": [0], "emotion": {"sep_flag": False, "labels": "neutral"}},
        "version": "v0.1",
        **changes,
    }


def test_celebv_hq(tmp_path: Path) -> None:
    table = {
        "meta_info": {"appearance_mapping": ["blurry"], "action_mapping": ["blow"]},
        "clips": {
            "M2Ohb0FAaJU_1": celebv(),
            "M2Ohb0FAaJU_2": celebv(),
            "gone_1": celebv(ytb_id="gone"),
            "out_1": celebv(ytb_id="../../secret"),
            "late_1": celebv(duration={"start_sec": 5, "end_sec": 5}),
            "wide_1": celebv(bbox={"top": 0, "bottom": 480, "left": 0, "right": 640}),
            "bare_1": celebv(duration=None),
        },
    }
    write(tmp_path, "celebvhq_info.json", json.dumps(table))
    (tmp_path / "downloaded_celebvhq" / "processed").mkdir(parents=True)
    (tmp_path / "downloaded_celebvhq" / "raw").mkdir()
    cut = write_video(tmp_path / "downloaded_celebvhq/processed/M2Ohb0FAaJU_2.mp4", halves((100,) * 3))
    raw = write_video(
        tmp_path / "downloaded_celebvhq/raw/M2Ohb0FAaJU.mp4", halves((20, 60, 100, 140, 180, 220, 240, 250))
    )
    found = clips(tmp_path)
    assert set(found) == {"M2Ohb0FAaJU_1", "M2Ohb0FAaJU_2"}
    assert {clip.identity for clip in found.values()} == {"M2Ohb0FAaJU"}
    assert found["M2Ohb0FAaJU_2"] == FaceClip("M2Ohb0FAaJU_2", "M2Ohb0FAaJU", cut)
    first = found["M2Ohb0FAaJU_1"]
    assert (first.path, first.span, first.unit, first.box_unit) == (raw, (0.1, 0.6), "seconds", "share")
    assert first.box == pytest.approx((0.48, 0.0, 1.0, 0.72))  # widened by 0.02, within the frame
    assert reasons(CelebV(tmp_path)) == {"missing video": 1, "unsafe path": 1, "broken row": 3}


@pytest.mark.parametrize("flat", [False, True])
def test_celebv_text_with_and_without_clips_around(tmp_path: Path, flat: bool) -> None:
    row = celebv(duration={"start_frame": 2, "end_frame": 6}, bbox={"top": 0, "bottom": 32, "left": 32, "right": 64})
    table = {"M2Ohb0FAaJU_1_0": row}
    write(tmp_path, "celebvtext_info.json", json.dumps(table if flat else {"clips": table}))
    (tmp_path / "raw").mkdir()
    write_video(tmp_path / "raw" / "M2Ohb0FAaJU.mp4", halves((20, 60, 100, 140, 180, 220, 240, 250)))
    (clip,) = clips(tmp_path).values()
    assert (clip.span, clip.unit, clip.box, clip.box_unit) == ((2, 6), "frames", (32, 0, 64, 32), "pixels")
    frames = cut_frames(clip, every_seconds=0.1)
    assert [frame.name for frame in frames] == ["0.200 s", "0.300 s", "0.400 s", "0.500 s"]
    assert frames[0].picture is not None and frames[0].picture.shape == (3, 32, 32)
    levels = [float(frame.picture[:, :, 8:].float().mean()) for frame in frames if frame.picture is not None]
    assert levels == pytest.approx([100, 140, 180, 220], abs=6)


VFHQ_LINES = "H 48\nW 64\nFPS 10.0\nCROP 32 0 64 32\n"


def test_vfhq(tmp_path: Path) -> None:
    names = [f"Clip+-7TMJtnhiPM+P{person}+C{number}+F1-7" for person, number in ((0, 0), (0, 1), (3, 0))]
    for name in names:
        write(tmp_path, f"meta/{name}.txt", VFHQ_LINES)
    write(tmp_path, "meta/Clip+gone+P0+C0+F1-7.txt", VFHQ_LINES)
    write(tmp_path, "meta/Clip+odd+P0.txt", VFHQ_LINES)
    write(tmp_path, "meta/Clip+far+P0+C0+F1-7.txt", VFHQ_LINES.replace("64 32", "640 32"))
    write(tmp_path, "meta/Clip+none+P0+C0+F1-7.txt", "H 48\nW 64\n")
    write(tmp_path, f"{names[2]}/00000000.png", picture("red"))
    video = write_video(tmp_path / "-7TMJtnhiPM.mp4", halves((20, 60, 100, 140, 180, 220, 240, 250)))
    found = clips(tmp_path)
    assert [found[name].identity for name in names] == ["-7TMJtnhiPM+P0", "-7TMJtnhiPM+P0", "-7TMJtnhiPM+P3"]
    assert found[names[2]].path == tmp_path / names[2] and found[names[2]].span is None
    assert (found[names[0]].path, found[names[0]].span) == (video, (0.2, 0.6))
    assert found[names[0]].box == pytest.approx((0.5, 0, 1, 2 / 3))
    assert reasons(VFHQ(tmp_path)) == {"missing video": 1, "broken row": 3}


def test_hdtf_with_a_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path, "WDA_video_url.txt", "\ufeffWDA_Ann_000 https://example.org/a\n")
    write(tmp_path, "WDA_annotion_time.txt", "\ufeffWDA_Ann_000.mp4 00:00-00:01 00:02-00:03\nWDA_Bo.mp4 00:00-0:1\n")
    write(tmp_path, "WDA_crop_wh.txt", "WDA_Ann_000_0.mp4 32 32 0 32\n")
    write(tmp_path, "RD_annotion_time.txt", "RD_Cy.mp4 00:01-00:00 x\nRD_Di.mp4\n")
    (tmp_path / "videos").mkdir()
    video = write_video(tmp_path / "videos" / "WDA_Ann_000.mp4", halves((20, 60, 100, 140)))
    (clip,) = clips(tmp_path).values()
    assert clip == FaceClip("WDA_Ann_000_0", "WDA_Ann_000", video, (0, 1), "seconds", (32, 0, 64, 32), "pixels")
    # no crop for the second span, no video for Bo, a span backwards, none, and no span at all
    assert reasons(HDTF(tmp_path)) == {"broken row": 4, "missing video": 1}
    (found,) = inspect_path(tmp_path)
    assert "people      1 in 1 clips" in found.lines()


def test_damaged_lists_and_videos_are_named(tmp_path: Path) -> None:
    write(tmp_path, "celebvhq_info.json", "{")
    assert "celebvhq_info.json: cannot be read" in raised(lambda: CelebV(tmp_path), ReadError)
    write(tmp_path, "celebvhq_info.json", "[]")
    assert "is no mapping" in raised(lambda: CelebV(tmp_path), ReadError)
    video = write(tmp_path, "a.mp4", b"no video")
    assert "damaged or truncated" in raised(lambda: cut_frames(FaceClip("a", "a", video, (0, 1))), ClipError)
    whole = write_video(tmp_path / "b.mp4", halves((20, 60)))
    assert "has no frame from 8 to 9 seconds" in raised(
        lambda: cut_frames(FaceClip("b", "b", whole, (8, 9))), ClipError
    )


def test_people_of_clips_become_identity_clips(tmp_path: Path) -> None:
    """Both clips of Ann are one person, so that no split can part them; a damaged clip is named and left out."""
    video = write_video(tmp_path / "a.mp4", halves((20, 60, 100, 140, 180, 220, 240, 250)))
    found = [
        FaceClip("ann/1", "ann", video, (0, 0.4), "seconds", (32, 0, 64, 32), "pixels"),
        FaceClip("ann/2", "ann", video, (0.4, 0.8), "seconds", (32, 0, 64, 32), "pixels"),
        FaceClip("bo", "bo", write(tmp_path, "b.mp4", b"no video"), (0, 1)),
    ]
    folders, faults = write_people(found, tmp_path / "people", every_seconds=0.1)
    assert folders == [tmp_path / "people" / "ann"] and set(faults) == {"bo"}
    assert sorted(path.name for path in folders[0].iterdir()) == [f"ann_{n}-{k}.png" for n in (1, 2) for k in range(4)]
    again = {path: path.stat().st_mtime_ns for path in folders[0].iterdir()}
    assert write_people(found, tmp_path / "people", every_seconds=0.1)[0] == folders
    assert {path: path.stat().st_mtime_ns for path in folders[0].iterdir()} == again
    settings = ClipConfig(image_size=16, min_face=16, min_frames=4, min_difference=0.0)

    def same(faces: Tensor) -> Tensor:
        return torch.ones(len(faces), 1)

    manifest = build_clips(folders, settings, WholePicture(), same)
    assert manifest.frame_counts == {"kept": 8}


def test_data_sets_and_single_clips_become_folders_of_one_person_each(tmp_path: Path) -> None:
    """What `data clips` is given: a video stays, a data set is cut, by person; what is cut already is not cut again."""
    root, frames = tmp_path / "celebv", tmp_path / "people-frames"
    table = {"a_1": celebv(ytb_id="a"), "a_2": celebv(ytb_id="a"), "b_1": celebv(ytb_id="b"), "c_1": celebv(ytb_id="c")}
    write(root, "celebvhq_info.json", json.dumps(table))
    (root / "processed").mkdir()
    for name, levels in (("a_1", (20, 60)), ("a_2", (90,)), ("b_1", (30,))):
        write_video(root / "processed" / f"{name}.mp4", halves(levels))
    write(root / "processed", "b_1.mp4", b"no video")
    alone = write_video(tmp_path / "talk.mp4", halves((50,)))
    pictures = write(tmp_path / "dora", "0.png", b"").parent
    found = people_of([alone, root, pictures], frames, 0.3)
    assert found.people == [alone, frames / "a", pictures]
    assert found.rejected == {"missing video": 1, "clips that cannot be read": 1}
    assert sorted(path.name for path in (frames / "a").iterdir()) == ["a_1-0.png", "a_2-0.png"]
    kept = (frames / "a" / "a_1-0.png").stat().st_mtime_ns
    assert people_of([root], frames, 0.3).people == [frames / "a"]
    assert (frames / "a" / "a_1-0.png").stat().st_mtime_ns == kept
    assert "1 missing video" in raised(lambda: people_of([root], frames, 0.1), ReadError)
    kept_videos = {path: path.read_bytes() for path in (root / "processed").iterdir()}
    (root / "processed" / "a_1.mp4").write_bytes(b"no video")
    (root / "processed" / "a_2.mp4").write_bytes(b"no video")
    text = raised(lambda: people_of([root], tmp_path / "new", 0.3), ClipError)
    assert text.startswith(f"{root}: CelebV-HQ: no clip can be read; {root / 'processed' / 'a_1.mp4'}: damaged")
    for path, content in kept_videos.items():
        path.write_bytes(content)
    (tmp_path / "empty").mkdir()
    strange = [tmp_path / "empty", tmp_path / "gone.mp4"]
    assert people_of(strange, frames).people == strange, "the manifest will say what is wrong with them"
    assert people_of([root, root], frames, 0.3).people == [frames / "a"], "one person, listed once"
    write(root, "celebvhq_info.json", "{")
    assert "cannot be read" in raised(lambda: people_of([root], frames), ReadError)
