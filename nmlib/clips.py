"""Identity clips: which frames of videos and picture folders show one person, and why the others were left out.

`build_clips` looks at every frame and writes nothing but numbers: a manifest says for each frame whether it was kept,
by what measure, and where its aligned face lies. The faces are cut from the files when they are asked for, or written
with what surrounds them as folders of frames, from which conversations by name are made.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nmlib.config import ClipConfig
from nmlib.conversation import to_picture
from nmlib.faces import Detector, Square, cut
from nmlib.folder_clips import BOXES
from nmlib.frames import ClipError, Frame, iterate_frames, read_clip
from nmlib.manifest import ClipRow, FrameReason, FrameRow, Manifest, all_frames, counts, load_manifest, save_manifest
from nmlib.runtime import atomic_folder, progress, write_json

__all__ = [
    "Manifest",
    "TooManyRejected",
    "build_clips",
    "check_target",
    "load_clip_frames",
    "load_manifest",
    "read_clip",
    "save_manifest",
    "write_clips",
]

MANIFEST = "manifest.json"
BLIND_CLIPS = 3  # so many kept clips whose faces all lie within
BLIND_DISTANCE = 0.05  # of one another were looked at by something that cannot tell people apart


class TooManyRejected(ClipError):
    """More clips than `max_rejected` were rejected; `manifest` says why, row by row."""

    def __init__(self, message: str, manifest: Manifest) -> None:
        super().__init__(message)
        self.manifest = manifest


class _Look(NamedTuple):
    """A frame's row so far, and its aligned face (3, s, s) while it is still in the running."""

    row: FrameRow
    face: Tensor | None = None

    def out(self, reason: FrameReason, measured: float, threshold: float, detail: str = "") -> "_Look":
        """The same frame, left out."""
        verdict = {"reason": reason, "measured": float(measured), "threshold": float(threshold), "detail": detail}
        return _Look(self.row.model_copy(update=verdict))


def build_clips(
    paths: Sequence[str | Path], settings: ClipConfig, detector: Detector, embedder: Callable[[Tensor], Tensor]
) -> Manifest:
    """Look at clips frame by frame and say what to keep.

    A frame needs one face of sufficient size that differs from every earlier one; among these the medoid, the one
    nearest to all others, stands for the clip, and frames far from it show somebody else.

    Args:
        paths: folders of pictures or videos, one person in each; a clip is named after its file, so names must differ.
        settings: what is read and what is kept.
        detector: finds faces, for example `faces.FaceDetector`; `faces.WholePicture` where pictures are faces.
        embedder: pictures (B, 3, s, s) in [0, 1] to unit vectors (B, E), for example `faces.DlibEmbedder`.

    Returns:
        The manifest; `save_manifest` stores it.

    Raises:
        ClipError: no paths, two clips of one name, no unit vectors, an embedder for which all clips show one face, or
            more than `settings.max_rejected` of the clips rejected; the last one has the manifest as its attribute
            `manifest`.
    """
    names = [Path(path).stem if Path(path).is_file() else Path(path).name for path in paths]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        raise ClipError(
            f"two clips are named {twice[0]!r}; rename one" if twice else "no clips; give at least one path"
        )
    looked = [
        _build_clip(name, Path(path).absolute(), settings, detector, embedder)
        for name, path in progress(list(zip(names, paths, strict=True)), desc="clips")
    ]
    clips = tuple(row for row, _ in looked)
    _refuse_if_blind([face for row, face in looked if row.kept and face is not None], _name(embedder))
    manifest = Manifest(
        settings=settings,
        detector=_name(detector),
        embedder=_name(embedder),
        clip_counts=counts(clips),
        frame_counts=counts(all_frames(clips)),
        clips=clips,
    )
    return _refuse_if_most_failed(manifest)


def _name(tool: object) -> str:
    return getattr(tool, "__name__", type(tool).__name__)


def _refuse_if_blind(faces: list[Tensor], name: str) -> None:
    """Raise ClipError if the middles (E,) of several clips are one and the same: no identity switch could be found."""
    if len(faces) < BLIND_CLIPS:
        return
    farthest = float(torch.cdist(torch.stack(faces), torch.stack(faces)).max())
    if farthest < BLIND_DISTANCE:
        raise ClipError(
            f"{name}: the faces of {len(faces)} clips are at most {farthest:.3f} apart: this is no face embedder, "
            "or it scales its own input; check it on known pairs (`check`)"
        )


def _refuse_if_most_failed(manifest: Manifest) -> Manifest:
    rejected, total = sum(not clip.kept for clip in manifest.clips), len(manifest.clips)
    if rejected <= manifest.settings.max_rejected * total:
        return manifest
    raise TooManyRejected(
        f"{rejected} of {total} clips rejected, above max_rejected {manifest.settings.max_rejected}; "
        f"clips: {_listed(manifest.clip_counts)}; frames: {_listed(manifest.frame_counts)}",
        manifest,
    )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"


def _build_clip(
    name: str, path: Path, settings: ClipConfig, detector: Detector, embedder: Callable[[Tensor], Tensor]
) -> tuple[ClipRow, Tensor | None]:
    """The row of a clip, and its medoid as a unit vector (E,), where there is one."""
    try:
        frames = _read(path, settings)
        looks = [_look(frame, settings, detector) for frame in frames]
    except ClipError as error:
        return ClipRow(name=name, path=str(path), reason="unreadable", detail=str(error), frames=()), None
    looks, middle = _without_switches(_without_duplicates(looks, settings), settings, embedder)
    kept = sum(look.row.kept for look in looks)
    row = ClipRow(
        name=name,
        path=str(path),
        reason=None if kept >= settings.min_frames else "too few frames",
        measured=kept,
        threshold=settings.min_frames,
        frames=tuple(look.row for look in looks),
    )
    return row, middle


def _read(path: Path, settings: ClipConfig) -> Iterator[Frame]:
    return iterate_frames(path, settings.every_seconds, settings.max_frames)


def _look(frame: Frame, settings: ClipConfig, detector: Detector) -> _Look:
    """Find the one face of a frame."""
    if frame.picture is None:
        return _Look(FrameRow(name=frame.name, reason="unreadable", detail=frame.fault))
    height, width = frame.picture.shape[1:]
    blank = _Look(FrameRow.model_construct(name=frame.name, size=(width, height)))
    if min(width, height) < settings.min_face:
        return blank.out("face too small", min(width, height), settings.min_face, "the whole picture")
    found = detector(frame.picture)
    if len(found) != 1:
        return blank.out("more than one face" if found else "no face", len(found), 1)
    if found[0].size < settings.min_face:
        return blank.out("face too small", found[0].size, settings.min_face)
    square = Square(*map(float, found[0].square))
    return _Look(
        blank.row.model_copy(update={"square": tuple(square)}), cut(frame.picture, square, settings.image_size)
    )


def _without_duplicates(looks: list[_Look], settings: ClipConfig) -> list[_Look]:
    """Leave out faces that repeat an earlier one which was not left out."""
    result: list[_Look] = []
    for look in looks:
        earlier = [(_difference(look.face, other.face), other) for other in result if look.face is not None]
        nearest, other = min(earlier, key=lambda pair: pair[0], default=(torch.inf, look))
        if nearest < settings.min_difference:
            look = look.out("near duplicate", nearest, settings.min_difference, f"of {other.row.name}")
        result.append(look)
    return result


def _difference(face: Tensor | None, other: Tensor | None) -> float:
    """Mean absolute difference of two faces, pixels counted from 0 to 1."""
    if face is None or other is None:
        return torch.inf
    return float((face.float() - other.float()).abs().mean() / 255)


def _without_switches(
    looks: list[_Look], settings: ClipConfig, embedder: Callable[[Tensor], Tensor]
) -> tuple[list[_Look], Tensor | None]:
    """Leave out faces far from the medoid, and note the distance of the others; the medoid (E,) comes with them."""
    places = [(index, look.face) for index, look in enumerate(looks) if look.face is not None]
    if not places:
        return looks, None
    vectors = _embedded(torch.stack([face for _, face in places]), embedder)  # (F, E)
    distances = (vectors[:, None] - vectors[None]).norm(dim=-1)  # (F, F)
    medoid = int(distances.sum(1).argmin())
    result, limit = list(looks), settings.max_identity_distance
    for (index, _), distance in zip(places, distances[medoid].tolist(), strict=True):
        if distance > limit:
            middle = looks[places[medoid][0]].row.name
            result[index] = looks[index].out("identity switch", distance, limit, f"medoid {middle}")
        else:
            row = looks[index].row.model_copy(update={"measured": distance, "threshold": limit})
            result[index] = _Look(row, looks[index].face)
    return result, vectors[medoid]


def _embedded(faces: Tensor, embedder: Callable[[Tensor], Tensor]) -> Tensor:
    vectors = embedder(faces.float() / 255).float().cpu()  # (F, E)
    if vectors.ndim != 2 or len(vectors) != len(faces) or not bool(((vectors.norm(dim=1) - 1).abs() < 1e-3).all()):
        raise ClipError(
            f"{_name(embedder)} gave {tuple(vectors.shape)} for {len(faces)} faces; expected a unit vector for each"
        )
    return vectors


def load_clip_frames(manifest: Manifest, clip: str) -> Tensor:
    """The aligned faces of a kept clip, cut from its files.

    Returns:
        uint8 (F, 3, s, s), s the manifest's `image_size`.

    Raises:
        ClipError: no such clip, a rejected one, or files that are no longer as they were.
    """
    size = manifest.settings.image_size
    return torch.stack([cut(picture, square, size) for picture, square in _kept(manifest, clip)])  # (F, 3, s, s)


def _kept(manifest: Manifest, clip: str) -> Iterator[tuple[Tensor, Square]]:
    """The whole pictures (3, H, W) of the kept frames of a kept clip, each with the square of its face."""
    row = manifest.clip(clip)
    if not row.kept:
        raise ClipError(f"clip {clip!r} was rejected: {row.detail or row.reason}; take one that was kept")
    for number, (seen, frame) in enumerate(zip_longest(row.frames, _read(Path(row.path), manifest.settings))):
        if seen is None or frame is None or seen.name != frame.name or seen.size != _size(frame):
            raise ClipError(f"{row.path}: frame {number} is not as it was; build the manifest again")
        if seen.square is not None and seen.kept and frame.picture is not None:
            yield frame.picture, Square(*seen.square)


def check_target(root: Path, paths: Sequence[str | Path]) -> None:
    """Refuse a folder that would take something else with it when `write_clips` replaces it as a whole.

    Args:
        root: where the people shall go.
        paths: the clips that they are cut from.

    Raises:
        ClipError: it is a file, holds one of the clips, or holds files without the `manifest.json` of earlier people.
    """
    homes = _places(root)
    lost = [path for path in paths if any(place.is_relative_to(home) for place in _places(path) for home in homes)]
    if lost:
        raise ClipError(f"{root}: holds the clip {lost[0]} and is replaced as a whole; give a new folder")
    if root.exists() and not root.is_dir():
        raise ClipError(f"{root}: is a file; give a new folder")
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if names and MANIFEST not in names:
        raise ClipError(
            f"{root}: holds {names[0]!r} but no {MANIFEST} of earlier people, and is replaced as a whole; "
            "give a new folder"
        )


def _places(path: str | Path) -> set[Path]:
    """Where a path lies, with links as they are and with links followed."""
    return {Path(os.path.abspath(path)), Path(path).resolve()}


def write_clips(manifest: Manifest, root: Path, size: int, zoom: float = 2.0) -> None:
    """Write the people of all kept clips as `folder_clips.FolderClips` reads them, and `manifest.json` beside them.

    A person becomes `<root>/<clip>/000.png` and so on, upright squares around the face, black where a square leaves
    its frame, and `faces.json`, which says where the face is: the middle, since faces were aligned.

    Args:
        manifest: as `build_clips` made it.
        root: new folder; an older one of people is replaced as a whole (`check_target`).
        size: pixels a side of the pictures.
        zoom: side of a picture over the side of its aligned face, at least 1.

    Raises:
        ClipError: `zoom` below 1, no kept clip, a folder that is not to be replaced, or files that are no longer as
            they were.
    """
    if zoom < 1:
        raise ClipError(f"zoom {zoom:g}: the picture would be smaller than the face; expected 1 or more")
    kept, edge = [clip.name for clip in manifest.clips if clip.kept], 0.5 / zoom
    if not kept:
        raise ClipError(f"no clip was kept; clips: {_listed(manifest.clip_counts)}")
    check_target(root, [clip.path for clip in manifest.clips])
    with atomic_folder(root) as folder:
        for name in progress(kept, desc="faces"):
            boxes: dict[str, list[float]] = {}
            (folder / name).mkdir(parents=True)
            for number, (picture, square) in enumerate(_kept(manifest, name)):
                file = f"{number:03d}.png"
                around = cut(picture, square._replace(side=square.side * zoom), size)  # (3, size, size)
                to_picture(around).save(folder / name / file)
                boxes[file] = [0.5 - edge, 0.5 - edge, 0.5 + edge, 0.5 + edge]
            write_json(folder / name / BOXES, boxes)
        save_manifest(manifest, folder / MANIFEST)


def _size(frame: Frame) -> tuple[int, int] | None:
    return None if frame.picture is None else (frame.picture.shape[2], frame.picture.shape[1])
