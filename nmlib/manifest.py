"""The manifest of identity clips: what became of every clip and frame, stored as JSON and read back strictly."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from nmlib.config import ClipConfig, Settings
from nmlib.frames import ClipError
from nmlib.runtime import read_json, write_json

FrameReason = Literal[
    "unreadable", "no face", "more than one face", "face too small", "near duplicate", "identity switch"
]
ClipReason = Literal["unreadable", "too few frames"]
PixelCount = Annotated[int, Field(ge=1)]


class FrameRow(Settings):
    """What became of a frame.

    Args:
        name: file name, or seconds from the start of the video.
        reason: why it was left out; None if it was kept.
        measured: the number that decided; for a kept frame its distance to the clip's medoid.
        threshold: what that number was compared to.
        detail: in words what the numbers cannot say, for example which frame it repeats.
        size: width and height of the frame in pixels, where it could be read.
        square: centre x and y, side (pixels) and angle (radians) of the aligned face, where just one was found.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    name: str
    reason: FrameReason | None = None
    measured: float | None = None
    threshold: float | None = None
    detail: str = ""
    size: tuple[PixelCount, PixelCount] | None = None
    square: tuple[float, float, float, float] | None = None

    @property
    def kept(self) -> bool:
        """Whether the frame belongs to the clip."""
        return self.reason is None

    @model_validator(mode="after")
    def _kept_frames_have_a_face(self) -> "FrameRow":
        if self.kept and (self.square is None or self.size is None):
            raise ValueError("a kept frame (reason null) needs its size and square")
        return self


class ClipRow(Settings):
    """What became of a clip: `reason` is None if it was kept; `measured` counts kept frames."""

    name: str
    path: str
    reason: ClipReason | None = None
    measured: int | None = None
    threshold: int | None = None
    detail: str = ""
    frames: tuple[FrameRow, ...]

    @property
    def kept(self) -> bool:
        """Whether the clip can be used."""
        return self.reason is None


class Manifest(Settings):
    """Every clip and every frame that was looked at, with counts by reason ("kept" among them)."""

    settings: ClipConfig
    detector: str
    embedder: str
    clip_counts: dict[str, int]
    frame_counts: dict[str, int]
    clips: tuple[ClipRow, ...]

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        names = [clip.name for clip in self.clips]
        if len(set(names)) < len(names):
            raise ValueError(f"two clips are named {Counter(names).most_common(1)[0][0]!r}")
        for number, clip in enumerate(self.clips):
            kept = sum(frame.kept for frame in clip.frames)
            if clip.kept and kept < self.settings.min_frames:
                raise ValueError(f"clip {number} is kept with {kept} frames; min_frames is {self.settings.min_frames}")
        for field, rows in (("clip_counts", self.clips), ("frame_counts", all_frames(self.clips))):
            if getattr(self, field) != counts(rows):
                raise ValueError(f"{field} is {getattr(self, field)}, but the rows give {counts(rows)}")
        return self

    def clip(self, name: str) -> ClipRow:
        """The row of a clip; raises ClipError if there is none of that name."""
        for clip in self.clips:
            if clip.name == name:
                return clip
        raise ClipError(f"no clip {name!r} in this manifest of {len(self.clips)} clips")


def all_frames(clips: Sequence[ClipRow]) -> list[FrameRow]:
    """The frames of all clips."""
    return [frame for clip in clips for frame in clip.frames]


def counts(rows: Sequence[ClipRow] | Sequence[FrameRow]) -> dict[str, int]:
    """Number of rows by reason, "kept" for those without one."""
    return dict(sorted(Counter(row.reason or "kept" for row in rows).items()))


def save_manifest(manifest: Manifest, path: str | Path) -> None:
    """Store a manifest as readable JSON, with paths from its own folder, so that both can be moved together."""
    folder = Path(path).absolute().parent
    places = [Path(os.path.relpath(clip.path, folder)).as_posix() for clip in manifest.clips]
    write_json(path, _placed(manifest, places).model_dump(mode="json"))


def load_manifest(path: str | Path) -> Manifest:
    """Read what `save_manifest` wrote.

    Raises:
        RunError: the file is missing or no complete JSON.
        ClipError: a row or field that does not fit; names the first one.
    """
    raw = read_json(path)
    try:
        manifest = Manifest.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ClipError(f"{path}: {_explain(error)}; build the manifest again") from None
    folder = Path(path).absolute().parent
    return _placed(manifest, [os.path.normpath(folder / clip.path) for clip in manifest.clips])


def _placed(manifest: Manifest, places: Sequence[str]) -> Manifest:
    """The same manifest with other paths."""
    clips = [clip.model_copy(update={"path": place}) for clip, place in zip(manifest.clips, places, strict=True)]
    return manifest.model_copy(update={"clips": tuple(clips)})


def _explain(error: ValidationError) -> str:
    """The first fault in words: its row, its field, what is wrong and what was found."""
    fault = error.errors()[0]
    *rows, field = fault["loc"] or ("",)
    named = {"clips": "clip", "frames": "frame"}
    where = [f"{named.get(str(name), name)} {row}" for name, row in itertools.pairwise(rows) if isinstance(row, int)]
    if isinstance(field, int):  # a row as a whole, or a number of a list
        where, field = [*where, f"{named.get(str(rows[-1]), rows[-1])} {field}"], ""
    place = ", ".join([*where, *([f"field {field!r}"] if field else [])]) or "whole file"
    seen = "" if isinstance(fault["input"], dict) else f", found {fault['input']!r:.80}"
    return f"{place}: {fault['msg'].removeprefix('Value error, ')}{seen}"
