"""Frames of folders and videos: order, sampling, and what is refused in which words."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from toy import raised

from nmlib import frames
from nmlib.conversation import to_picture
from nmlib.frames import ClipError, iterate_frames, read_clip


def write_folder(folder: Path, pictures: dict[str, Tensor]) -> Path:
    """A folder of pictures (3, H, W) by file name."""
    folder.mkdir()
    for name, picture in pictures.items():
        to_picture(picture).save(folder / name)
    return folder


def grey(level: int, height: int = 48, width: int = 64) -> Tensor:
    return torch.full((3, height, width), level, dtype=torch.uint8)


def write_video(path: Path, pictures: list[Tensor], rate: int = 10, index_first: bool = False) -> Path:
    """A video of pictures (3, H, W), `rate` a second; the index lies at the end unless `index_first`."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if index_first else {}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "ultrafast"})
        stream.height, stream.width = pictures[0].shape[1:]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def noise(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, 256, (count, 3, 48, 64), dtype=torch.uint8, generator=generator))


def levels(path: Path, **sampling: float) -> list[int]:
    """Mean grey of the frames read, to the nearest ten."""
    found = [frame.picture for frame in iterate_frames(path, **sampling)]  # type: ignore[arg-type]
    return [round(float(picture.float().mean()), -1) for picture in found if picture is not None]  # type: ignore[misc]


def test_folders_are_read_in_natural_order(tmp_path: Path) -> None:
    names = ["frame10.png", "frame2.png", "frame1.jpg", "Frame3.PNG"]
    folder = write_folder(tmp_path / "clip", {name: grey(number) for number, name in enumerate(names)})
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "sub.png").mkdir()
    assert [frame.name for frame in read_clip(folder)] == ["Frame3.PNG", "frame1.jpg", "frame2.png", "frame10.png"]


def test_pictures_are_read_exactly(tmp_path: Path) -> None:
    picture = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    (frame,) = read_clip(write_folder(tmp_path / "clip", {"a.png": picture}))
    assert frame.picture is not None and torch.equal(frame.picture, picture)


def test_at_most_so_many_evenly_spread(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "clip", {f"{number}.png": grey(number) for number in range(11)})
    assert [frame.name for frame in read_clip(folder, max_frames=3)] == ["0.png", "5.png", "10.png"]
    assert [frame.name for frame in read_clip(folder, max_frames=1)] == ["0.png"]


def test_a_picture_on_its_side_is_set_upright(tmp_path: Path) -> None:
    picture = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter to the right
    (tmp_path / "clip").mkdir()
    to_picture(picture).save(tmp_path / "clip" / "a.png", exif=exif)
    (frame,) = read_clip(tmp_path / "clip")
    assert frame.picture is not None and torch.equal(frame.picture, picture.rot90(-1, (1, 2)))


def test_a_damaged_picture_is_a_fault_of_its_frame(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "clip", {name: noise(1)[0] for name in ("a.png", "b.png", "c.png")})
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    found = list(iterate_frames(folder))
    assert [frame.picture is None for frame in found] == [False, True, False]
    assert found[1].fault.startswith("cannot be read (")
    text = raised(lambda: read_clip(folder), ClipError)
    assert text == f"{folder}: picture 'b.png' {found[1].fault}; mend or remove the file"


def test_a_picture_over_the_limit_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "clip", {"a.png": grey(0, 100, 101)})
    monkeypatch.setattr(frames, "MAX_IMAGE_PIXELS", 10_099)
    monkeypatch.setattr(frames, "from_picture", None)
    text = raised(lambda: read_clip(folder), ClipError)
    assert text == f"{folder}: picture 'a.png' is 101 x 100; at most 10099 pixels; mend or remove the file"


def test_a_video_is_sampled_by_time(tmp_path: Path) -> None:
    """20 frames, 10 a second, each 10 lighter than the last: every 0.5 s is every fifth of them."""
    video = write_video(tmp_path / "a.mp4", [grey(10 * number) for number in range(20)])
    assert levels(video, every_seconds=0.5) == [0, 50, 100, 150]
    assert [frame.name for frame in read_clip(video, 0.5)] == ["0.000 s", "0.500 s", "1.000 s", "1.500 s"]
    assert levels(video, every_seconds=0.1, max_frames=3) == [0, 100, 190]
    assert levels(video, every_seconds=0.01) == [10 * number for number in range(20)], "no frame is read twice"
    assert levels(video, every_seconds=9.0) == [0]


@pytest.mark.parametrize("suffix", [".mkv", ".mov", ".avi"])
def test_other_containers_are_read(tmp_path: Path, suffix: str) -> None:
    video = write_video(tmp_path / f"a{suffix}", [grey(20 * number) for number in range(10)])
    assert levels(video, every_seconds=0.5) == [0, 100]


def test_a_video_on_its_side_is_set_upright(tmp_path: Path) -> None:
    """The matrix of the track's header says: show it a quarter to the right."""
    video = write_video(tmp_path / "a.mp4", [torch.cat([grey(200, 48, 32), grey(20, 48, 32)], 2)] * 2)
    raw = bytearray(video.read_bytes())
    place = raw.index(b"tkhd") + 4 + 40
    one = 1 << 16
    raw[place : place + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    video.write_bytes(raw)
    picture = read_clip(video)[0].picture
    assert picture is not None and picture.shape == (3, 64, 48)
    assert picture[:, :28].float().mean() > 190 and picture[:, 36:].float().mean() < 30, "left is now at the top"


def test_a_video_without_its_index_is_refused(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", noise(12))
    raw = video.read_bytes()
    for share in (0.0, 0.5, 0.9):
        video.write_bytes(raw[: int(share * len(raw))])
        assert raised(lambda: read_clip(video), ClipError).startswith(f"{video}: damaged or truncated (")


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_video_cut_in_a_frame_is_refused(tmp_path: Path, share: float) -> None:
    video = write_video(tmp_path / "a.mp4", noise(12), index_first=True)
    raw = video.read_bytes()
    video.write_bytes(raw[: int(share * len(raw))])
    assert "truncated" in raised(lambda: read_clip(video), ClipError)


def test_a_video_cut_between_frames_is_refused(tmp_path: Path) -> None:
    """Nothing is damaged there; only the header knows of more."""
    video = write_video(tmp_path / "a.mp4", noise(12), index_first=True)
    with av.open(str(video)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    position, size = sorted(packets)[6]
    video.write_bytes(video.read_bytes()[: position + size])
    text = raised(lambda: read_clip(video), ClipError)
    assert text == f"{video}: truncated: 7 of 12 frames are there; mend or remove the file"


def test_a_video_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_video(tmp_path / "a.mp4", [grey(0)])
    monkeypatch.setattr(frames, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    assert raised(lambda: read_clip(video), ClipError) == f"{video}: is 64 x 48; at most 3071 pixels"


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16_000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    text = raised(lambda: read_clip(path), ClipError)
    assert text == f"{path}: has no video stream; give a video with pictures, or remove the file"


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = raised(lambda: read_clip(tmp_path / "empty"), ClipError)
    assert text.startswith(f"{tmp_path / 'empty'}: holds no pictures; expected files that end in .bmp, .jpeg")
    assert raised(lambda: read_clip(tmp_path / "none"), ClipError) == f"{tmp_path / 'none'}: no such folder or video"
    (tmp_path / "a.txt").write_text("text")
    assert raised(lambda: read_clip(tmp_path / "a.txt"), ClipError).startswith(f"{tmp_path / 'a.txt'}: neither")


def test_a_list_of_other_files_is_no_video(tmp_path: Path) -> None:
    """A playlist under a video's name must not make the decoder open what it lists."""
    write_video(tmp_path / "secret.mp4", [grey(0)])
    for number, text in enumerate(("#EXTM3U\n#EXTINF:1,\nsecret.mp4\n", "ffconcat version 1.0\nfile secret.mp4\n")):
        path = tmp_path / f"list{number}.mp4"
        path.write_text(text)
        assert raised(lambda path=path: read_clip(path), ClipError).startswith(f"{path}: damaged or truncated (")
