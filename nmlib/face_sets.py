"""Face clips in the layouts of CelebV-HQ, CelebV-Text, VFHQ and HDTF: where each clip lies, whom it shows, what to cut.

Each layout lists `FaceClip`s; `cut_frames` reads one, and `write_people` puts the frames of all clips of a person into
one folder, which is what `clips.build_clips` and `folder_clips.FolderClips` read. Clips of one person stay together, so
that nobody is in both splits.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from torch import Tensor

from nmlib.archives import ArchiveError, inside
from nmlib.conversation import MAX_IMAGE_PIXELS, to_picture
from nmlib.frames import PICTURES, VIDEOS, ClipError, Frame, iterate_frames
from nmlib.readers import ReadError, Record, Rejection
from nmlib.runtime import atomic_path

MARGIN = 0.02  # by which CelebV-HQ widens its boxes, as a share of the frame
MAX_META_BYTES = 1 << 20
VFHQ_NAME = re.compile(r"Clip\+(?P<video>.+)\+P(?P<person>\d+)\+C(?P<clip>\d+)\+F(?P<start>\d+)-(?P<end>\d+)")


@dataclass(frozen=True)
class FaceClip:
    """A stretch of a video that shows one person.

    Args:
        name: unique name of the clip.
        identity: of the person, as far as the data set tells; clips of one identity belong to one split.
        path: a video or a folder of pictures.
        span: start and end in the file; None where the file is the clip, already cut and cropped.
        unit: of `span`: `seconds` or `frames`.
        box: left, top, right, bottom of what is kept; None keeps all.
        box_unit: `share` of width and height, or `pixels`.
    """

    name: str
    identity: str
    path: Path
    span: tuple[float, float] | None = None
    unit: Literal["seconds", "frames"] = "seconds"
    box: tuple[float, float, float, float] | None = None
    box_unit: Literal["share", "pixels"] = "share"


class _FaceRows(ABC):
    """What the layouts share: a list of entries, each of which gives a clip."""

    kind = ""
    evaluation_only = False

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def entries(self) -> Iterator[tuple[str, Callable[[], FaceClip]]]:
        """Where each clip is described, and how to read it (raises Rejection)."""

    def records(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Record[FaceClip]]]:
        """A record for every clip."""
        for number, (where, load) in enumerate(self.entries()):
            if wanted(number):
                yield number, Record(where, load)

    def find(self, *names: str) -> Path | None:
        """The first of some files or folders below the root that is there."""
        for name in names:
            try:
                path = inside(self.root, name)
            except ArchiveError as error:
                raise Rejection("unsafe path", str(error)) from None
            if path.exists():
                return path
        return None


def _number(row: Any, *keys: str) -> float:
    """The first of some fields that is there, as a number."""
    for key in keys:
        value = row.get(key) if isinstance(row, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            return float(value)
    raise Rejection("broken row", f"field {' or '.join(map(repr, keys))} is missing or no number in {row!r:.80}")


def _ordered(start: float, end: float, what: str) -> tuple[float, float]:
    if not 0 <= start < end:
        raise Rejection("broken row", f"{what} is {start:g} to {end:g}; expected 0 <= start < end")
    return start, end


class CelebV(_FaceRows):
    """CelebV-HQ (`celebvhq_info.json`) and CelebV-Text (`celebvtext_info.json`).

    {"clips": {key: {"ytb_id", "duration": {"start_sec", "end_sec"}, "bbox": {"top", "bottom", "left", "right"}, ...}}};
    boxes are shares of the frame in CelebV-HQ and pixels in CelebV-Text, of which some copies lack "clips" around the
    mapping and some durations are `start_frame` and `end_frame`. Videos: `processed/<key>.mp4`, cut and cropped, or
    `raw/<ytb_id>.mp4`, both also below `downloaded_celebvhq/` or `downloaded_celebvtext/`.

    Args:
        root: the folder with the JSON file.

    Raises:
        ReadError: no such file, or no complete JSON.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        names = ("celebvhq_info.json", "celebvtext_info.json")
        self.table = next((root / name for name in names if (root / name).is_file()), root / names[0])
        self.is_text = self.table.name == names[1]
        self.kind = "CelebV-Text" if self.is_text else "CelebV-HQ"
        self.media = f"downloaded_{self.table.stem.removesuffix('_info')}"
        try:
            table = json.loads(self.table.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise ReadError(f"{self.table}: cannot be read ({error}); expected the list of clips") from None
        clips = table.get("clips", table) if isinstance(table, dict) else None
        if not isinstance(clips, dict):
            raise ReadError(f"{self.table}: is no mapping; expected clips by name")
        self._clips: dict[str, Any] = clips

    def entries(self) -> Iterator[tuple[str, Callable[[], FaceClip]]]:
        """A clip for every key."""
        for key, row in self._clips.items():
            if key != "meta_info":
                yield f"{self.table.name}, clip {key!r}", partial(self._clip, key, row)

    def _clip(self, key: str, row: Any) -> FaceClip:
        video = row.get("ytb_id") if isinstance(row, dict) else None
        if not isinstance(video, str) or not video:
            raise Rejection("broken row", f"field 'ytb_id' is {video!r}; expected the name of a video")
        duration = row.get("duration")
        in_frames = isinstance(duration, dict) and "start_frame" in duration
        span = _ordered(
            _number(duration, "start_sec", "start_frame"), _number(duration, "end_sec", "end_frame"), "duration"
        )
        left, right = _ordered(_number(row.get("bbox"), "left"), _number(row["bbox"], "right"), "bbox left to right")
        top, bottom = _ordered(_number(row["bbox"], "top"), _number(row["bbox"], "bottom"), "bbox top to bottom")
        if not self.is_text and max(right, bottom) > 1:
            raise Rejection("broken row", f"bbox reaches {max(right, bottom):g}; expected shares of the frame up to 1")
        cut = self.find(f"processed/{key}.mp4", f"{self.media}/processed/{key}.mp4")
        if cut is not None:
            return FaceClip(key, video, cut)
        raw = self.find(f"raw/{video}.mp4", f"{self.media}/raw/{video}.mp4")
        if raw is None:
            raise Rejection("missing video", f"neither processed/{key}.mp4 nor raw/{video}.mp4")
        if self.is_text:
            return FaceClip(
                key, video, raw, span, "frames" if in_frames else "seconds", (left, top, right, bottom), "pixels"
            )
        box = (max(0.0, left - MARGIN), max(0.0, top - MARGIN), min(1.0, right + MARGIN), min(1.0, bottom + MARGIN))
        return FaceClip(key, video, raw, span, "frames" if in_frames else "seconds", box)


class VFHQ(_FaceRows):
    """VFHQ: a text file for every clip, `Clip+<video>+P<person>+C<number>+F<start>-<end>.txt`.

    Lines begin with H, W, FPS (the last word is the value) or CROP (the last four are x0 y0 x1 y1 in the H x W frame).
    The clip is a folder of pictures of the same name, or lies in `<video>.mp4`, where the frames that count are
    start + 1 to end - 1. A person is a number within a video.

    Args:
        root: the folder of the text files.
    """

    kind = "VFHQ"

    def entries(self) -> Iterator[tuple[str, Callable[[], FaceClip]]]:
        """A clip for every text file."""
        for path in sorted(self.root.rglob("Clip+*.txt")):
            yield str(path.relative_to(self.root)), partial(self._clip, path)

    def _clip(self, path: Path) -> FaceClip:
        named = VFHQ_NAME.fullmatch(path.stem)
        if named is None:
            raise Rejection("broken row", f"named {path.name}; expected Clip+<video>+P<n>+C<n>+F<start>-<end>.txt")
        meta = _meta_lines(path)
        (height,), (width,), (rate,) = _values(meta, "H", 1), _values(meta, "W", 1), _values(meta, "FPS", 1)
        left, top, right, bottom = _values(meta, "CROP", 4)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height) or rate <= 0:
            raise Rejection(
                "broken row", f"CROP {left:g} {top:g} {right:g} {bottom:g} at FPS {rate:g} in {width:g} x {height:g}"
            )
        identity = f"{named['video']}+P{named['person']}"
        below = path.parent.relative_to(self.root).as_posix()
        if (folder := self.find(f"{below}/{path.stem}", path.stem)) is not None:
            return FaceClip(path.stem, identity, folder)
        video = self.find(f"{below}/{named['video']}.mp4", f"{named['video']}.mp4", f"videos/{named['video']}.mp4")
        if video is None:
            raise Rejection("missing video", f"neither a folder {path.stem} nor {named['video']}.mp4")
        start, end = _ordered(int(named["start"]) + 1, int(named["end"]) - 1, "frames")
        box = (left / width, top / height, right / width, bottom / height)
        return FaceClip(path.stem, identity, video, (start / rate, end / rate), "seconds", box)


def _meta_lines(path: Path) -> dict[str, list[str]]:
    if path.stat().st_size > MAX_META_BYTES:
        raise Rejection("broken row", f"{path.name} has {path.stat().st_size} bytes; expected a few lines")
    lines = (line.split() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines())
    return {words[0].rstrip(":"): words[1:] for words in lines if words}


def _values(meta: dict[str, list[str]], key: str, count: int) -> list[float]:
    try:
        values = [float(word.strip(",()[]")) for word in meta[key][-count:]]
    except (KeyError, ValueError):
        values = []
    if len(values) != count:
        raise Rejection(
            "broken row", f"line {key!r} is {' '.join(meta.get(key, ['missing']))}; expected {count} numbers"
        )
    return values


class HDTF(_FaceRows):
    """HDTF: tables `{RD,WDA,WRA}_{video_url,annotion_time,resolution,crop_wh,crop_ratio}.txt`.

    `_annotion_time`: "name.mp4 mm:ss-mm:ss ...", one clip for every span; `_crop_wh`: "name_k.mp4 left width top
    height" in pixels. One table begins with a byte order mark. Videos: `videos/name_k.mp4`, cut and cropped, or
    `videos/name.mp4`; both may lie in the root. A person is a name.

    Args:
        root: the folder of the tables.
    """

    kind = "HDTF"

    def entries(self) -> Iterator[tuple[str, Callable[[], FaceClip]]]:
        """A clip for every span of every video."""
        for table in sorted(self.root.glob("*_annotion_time.txt")):
            crops = _word_lines(table.with_name(table.name.replace("annotion_time", "crop_wh")))
            boxes = {words[0]: words[1:] for words in crops}
            for place, words in enumerate(_word_lines(table), start=1):
                name = words[0].removesuffix(".mp4")
                for number, span in enumerate(words[1:] or [""]):
                    box = boxes.get(f"{name}_{number}.mp4", [])
                    where = f"{table.name}, line {place}, clip {number}"
                    yield where, partial(self._clip, name, number, span, box)

    def _clip(self, name: str, number: int, span: str, box: list[str]) -> FaceClip:
        found = re.fullmatch(r"(\d+):(\d\d?)-(\d+):(\d\d?)", span)
        if found is None:
            raise Rejection("broken row", f"{name}: span {span!r}; expected mm:ss-mm:ss")
        times = [int(text) for text in found.groups()]
        start, end = _ordered(60 * times[0] + times[1], 60 * times[2] + times[3], f"{name}: span")
        if (cut := self.find(f"videos/{name}_{number}.mp4", f"{name}_{number}.mp4")) is not None:
            return FaceClip(f"{name}_{number}", name, cut)
        raw = self.find(f"videos/{name}.mp4", f"{name}.mp4")
        if raw is None:
            raise Rejection("missing video", f"neither {name}_{number}.mp4 nor {name}.mp4")
        if len(box) != 4 or not all(text.isdecimal() for text in box):
            raise Rejection(
                "broken row", f"{name}_{number}: crop_wh is {' '.join(box) or 'missing'}; expected four numbers"
            )
        left, width, top, height = (float(text) for text in box)
        sides = (left, top, left + width, top + height)
        return FaceClip(f"{name}_{number}", name, raw, (start, end), "seconds", sides, "pixels")


def _word_lines(path: Path) -> list[list[str]]:
    if not path.is_file():
        return []
    if path.stat().st_size > MAX_META_BYTES:
        raise ReadError(f"{path}: has {path.stat().st_size} bytes; expected at most {MAX_META_BYTES}")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return [words for line in lines if (words := line.split())]


# ---------------------------------------------------------------------------------------------------------
# frames


def cut_frames(clip: FaceClip, every_seconds: float = 1.0, max_frames: int = 16) -> list[Frame]:
    """Frames of a clip, cropped to a square around its box.

    Args:
        clip: as a layout lists it.
        every_seconds: time between two frames; frames close in time are near duplicates.
        max_frames: at most so many.

    Raises:
        ClipError: the file is damaged, of another kind, or ends before the clip begins.
    """
    if clip.span is None:
        return list(iterate_frames(clip.path, every_seconds, max_frames))
    if clip.path.suffix.lower() not in VIDEOS:
        raise ClipError(f"{clip.path}: is no video; expected a file that ends in {', '.join(VIDEOS)}")
    try:
        with av.open(str(clip.path), format=VIDEOS[clip.path.suffix.lower()]) as container:
            frames = list(_spanned(container, clip, every_seconds, max_frames))
    except av.FFmpegError as error:
        raise ClipError(f"{clip.path}: damaged or truncated ({error.strerror}); mend or remove the file") from None
    if not frames:
        raise ClipError(f"{clip.path}: has no frame from {clip.span[0]:g} to {clip.span[1]:g} {clip.unit}")
    return frames


def _spanned(container: Any, clip: FaceClip, every_seconds: float, max_frames: int) -> Iterator[Frame]:
    if not container.streams.video:
        raise ClipError(f"{clip.path}: has no video stream; give a video with pictures, or remove the file")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    scale = float(stream.average_rate) if clip.unit == "frames" else 1.0
    assert clip.span is not None
    start, end = clip.span[0] / scale, clip.span[1] / scale
    count = min(max_frames, max(1, int((end - start) / every_seconds + 1e-6)))
    wanted = [start + (end - start) * place / count for place in range(count)]
    first = float((stream.start_time or 0) * stream.time_base)
    container.seek(int((start + first) / stream.time_base), stream=stream)
    for frame in container.decode(stream):
        if not wanted or frame.time is None or frame.time - first > end:
            return
        if frame.time - first >= wanted[0] - 1e-6:
            wanted = [time for time in wanted if time > frame.time - first + 1e-6]
            yield Frame(f"{frame.time - first:.3f} s", _cropped(frame, clip))


def _cropped(frame: Any, clip: FaceClip) -> Tensor:
    """The square around the box, as far as the frame reaches: uint8 (3, S, S)."""
    width, height = frame.width, frame.height
    if width * height > MAX_IMAGE_PIXELS:
        raise ClipError(f"{clip.path}: is {width} x {height}; at most {MAX_IMAGE_PIXELS} pixels")
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24").copy()).permute(2, 0, 1)  # (3, H, W)
    if clip.box is None:
        return picture
    scale = (width, height) if clip.box_unit == "share" else (1, 1)
    left, top, right, bottom = (clip.box[side] * scale[side % 2] for side in range(4))
    side = min(round(max(right - left, bottom - top)), width, height)
    x = min(max(round((left + right - side) / 2), 0), width - side)
    y = min(max(round((top + bottom - side) / 2), 0), height - side)
    if side < 1:
        raise ClipError(f"{clip.path}: box {clip.box} has no pixels in {width} x {height}")
    return picture[:, y : y + side, x : x + side]  # (3, S, S)


def write_people(
    clips: Iterable[FaceClip], folder: Path, every_seconds: float = 1.0, max_frames: int = 16
) -> tuple[list[Path], dict[str, str]]:
    """Put the frames of each person's clips into one folder, `<folder>/<person>/<clip>-<number>.png`.

    Args:
        clips: of any number of people.
        folder: where to; pictures that are there stay as they are, so that an interrupted run goes on.
        every_seconds, max_frames: see `cut_frames`.

    Returns:
        The people's folders, for `clips.build_clips`; and for every clip that cannot be read why not.
    """
    people: dict[str, Path] = {}
    faults: dict[str, str] = {}
    for clip in clips:
        person = folder / re.sub(r"[^\w+-]", "_", clip.identity)
        try:
            if not (person / f"{_file_stem(clip)}-0.png").exists():
                _write_frames(cut_frames(clip, every_seconds, max_frames), person, _file_stem(clip))
            people[clip.identity] = person
        except ClipError as error:
            faults[clip.name] = str(error)
    return [person for person in people.values() if any(path.suffix in PICTURES for path in person.iterdir())], faults


def _file_stem(clip: FaceClip) -> str:
    return re.sub(r"[^\w+-]", "_", clip.name)


def _write_frames(frames: list[Frame], person: Path, stem: str) -> None:
    """Write the first picture last: where it is, all are."""
    pictures = [frame.picture for frame in frames if frame.picture is not None]
    if not pictures:
        raise ClipError(f"{stem}: no frame can be read: {frames[0].name} {frames[0].fault}")
    for number in reversed(range(len(pictures))):
        with atomic_path(person / f"{stem}-{number}.png") as temporary:
            to_picture(pictures[number]).save(temporary)
