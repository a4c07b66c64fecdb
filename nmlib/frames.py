"""Frames of clips: a folder of pictures or a video, read one by one, refused in clear words where they are damaged.

Videos are decoded by PyAV (FFmpeg). Only containers that hold their own data are opened, each by its own reader, so
that a file which is a playlist in disguise cannot make the decoder open other files.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nmlib.conversation import MAX_IMAGE_PIXELS, PICTURE_ERRORS, from_picture

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
VIDEOS = {".avi": "avi", ".m4v": "mov", ".mkv": "matroska", ".mov": "mov", ".mp4": "mov", ".webm": "matroska"}
WHOLE_SHARE = 0.9  # of the frames that a video's header counts; editors leave a few out


class ClipError(ValueError):
    """A clip, or a manifest of clips, that cannot be used; the message names file, frame or field."""


class Frame(NamedTuple):
    """One frame: its file name or time, and either its pixels (3, H, W) in uint8 or why they cannot be read."""

    name: str
    picture: Tensor | None
    fault: str = ""


def read_clip(path: str | Path, every_seconds: float = 0.2, max_frames: int = 64) -> list[Frame]:
    """All frames of a clip; `iterate_frames` for those who want to know which are damaged.

    Raises:
        ClipError: as `iterate_frames` does, and where a picture of a folder cannot be read.
    """
    frames = list(iterate_frames(path, every_seconds, max_frames))
    for frame in frames:
        if frame.picture is None:
            raise ClipError(f"{path}: picture {frame.name!r} {frame.fault}; mend or remove the file")
    return frames


def iterate_frames(path: str | Path, every_seconds: float = 0.2, max_frames: int = 64) -> Iterator[Frame]:
    """Frames of a clip in order, each read when it is asked for.

    Args:
        path: a folder of pictures (in natural order: 2 before 10; other files are passed over) or a video.
        every_seconds: time between two frames of a video; a folder has no times and is read picture by picture.
        max_frames: at most so many, spread evenly over the clip.

    Yields:
        Frames; a damaged or oversized picture of a folder has `fault` in place of pixels.

    Raises:
        ClipError: no such file, an empty folder, a file that is no video, without a video stream, truncated or
            damaged, or of more than `MAX_IMAGE_PIXELS` pixels.
    """
    path = Path(path)
    if path.is_dir():
        yield from _folder_frames(path, max_frames)
    elif not path.exists():
        raise ClipError(f"{path}: no such folder or video")
    elif path.suffix.lower() in VIDEOS:
        yield from _video_frames(path, every_seconds, max_frames)
    else:
        raise ClipError(f"{path}: neither a folder nor a video; expected a file that ends in {', '.join(VIDEOS)}")


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to count - 1, evenly spread, first and last among them."""
    return [round(number) for number in np.linspace(0, count - 1, min(count, most))]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key in which digits count as numbers: frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def _check_size(width: int, height: int, where: str = "") -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise ClipError(f"{where}is {width} x {height}; at most {MAX_IMAGE_PIXELS} pixels")


def _folder_frames(folder: Path, max_frames: int) -> Iterator[Frame]:
    files = sorted((file for file in folder.iterdir() if _is_picture(file)), key=_natural)
    if not files:
        raise ClipError(f"{folder}: holds no pictures; expected files that end in {', '.join(PICTURES)}")
    for index in _spread(len(files), max_frames):
        yield _picture_frame(files[index])


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURES and file.is_file() and not file.name.startswith(".")


def _picture_frame(file: Path) -> Frame:
    try:
        with Image.open(file) as picture:
            _check_size(picture.width, picture.height)
            return Frame(file.name, from_picture(picture, str(file)))
    except ClipError as error:
        return Frame(file.name, None, str(error))
    except PICTURE_ERRORS as error:
        return Frame(file.name, None, f"cannot be read ({error})")


def _video_frames(path: Path, every_seconds: float, max_frames: int) -> Iterator[Frame]:
    try:
        with av.open(str(path), format=VIDEOS[path.suffix.lower()]) as container:
            if not container.streams.video:
                raise ClipError(f"{path}: has no video stream; give a video with pictures, or remove the file")
            codec = container.streams.video[0].codec_context
            _check_size(codec.width, codec.height, f"{path}: ")
            yield from _decoded(container, path, every_seconds, max_frames)
    except av.FFmpegError as error:
        raise ClipError(f"{path}: damaged or truncated ({error.strerror}); mend or remove the file") from None


def _decoded(container: Any, path: Path, every_seconds: float, max_frames: int) -> Iterator[Frame]:
    """The first frame at or after every wanted time."""
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    wanted = _wanted_times(_duration(container, path), every_seconds, max_frames)
    start, decoded = None, 0
    for decoded, frame in enumerate(container.decode(stream), start=1):
        if frame.is_corrupt:
            raise ClipError(f"{path}: frame {decoded} is damaged; mend or remove the file")
        if frame.time is None:
            raise ClipError(f"{path}: frame {decoded} has no time; write the video again (ffmpeg -i in out.mp4)")
        start = frame.time if start is None else start
        passed = [time for time in wanted if time <= frame.time - start + 1e-6]  # several where frames are rare
        if passed:
            del wanted[: len(passed)]
            yield Frame(f"{frame.time - start:.3f} s", _pixels(frame, path))
        if not wanted:
            return
    if decoded < WHOLE_SHARE * stream.frames:
        raise ClipError(f"{path}: truncated: {decoded} of {stream.frames} frames are there; mend or remove the file")


def _duration(container: Any, path: Path) -> float:
    """Seconds of the video stream, or of the whole file where the stream does not say."""
    stream = container.streams.video[0]
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is None:
        raise ClipError(f"{path}: its header names no duration; write the video again with one (ffmpeg -i in out.mp4)")
    return float(container.duration / av.time_base)


def _wanted_times(duration: float, every_seconds: float, most: int) -> list[float]:
    """Multiples of `every_seconds` before the end, at most `most` of them."""
    count = max(1, int(np.ceil(duration / every_seconds - 1e-6)))
    return [index * every_seconds for index in _spread(count, most)]


def _pixels(frame: Any, path: Path) -> Tensor:
    """Upright pixels (3, H, W) of a decoded frame."""
    _check_size(frame.width, frame.height, f"{path}: ")  # it may change within a stream
    upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # phones store turned pictures
    return torch.from_numpy(upright.copy()).permute(2, 0, 1)  # (3, H, W)
