"""From what `data clips` is given to folders of one person each: face data sets are cut into frames on the way."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nmlib.face_sets import HDTF, PICTURES, VFHQ, CelebV, write_people
from nmlib.frames import ClipError
from nmlib.inspection import NotRecognised, recognise
from nmlib.readers import Reader, ReadError, Rows

UNREADABLE = "clips that cannot be read"


class People(NamedTuple):
    """Videos and folders of one person each, for `clips.build_clips`; and clips of data sets left out, by reason."""

    people: list[Path]
    rejected: Counter[str]


def people_of(paths: Sequence[Path], frames: Path, max_rejected: float = 0.05) -> People:
    """Leave videos and folders of pictures as they are, and cut face data sets into folders of people.

    Args:
        paths: videos, folders of pictures, or folders of CelebV-HQ, CelebV-Text, VFHQ or HDTF.
        frames: takes a folder of frames for every person of a data set; what is there already is not cut again.
        max_rejected: share of bad rows of a data set above which reading stops.

    Raises:
        ReadError: another data set, a damaged table, or too many bad rows.
        ClipError: no clip of a data set can be read.
    """
    people, rejected = list[Path](), Counter[str]()
    for path in paths:
        sets = _data_sets(path)
        for found in sets:
            if not isinstance(found, (CelebV, VFHQ, HDTF)):
                raise ReadError(f"{found.root}: {found.kind}; expected clips of faces, or folders of pictures")
            reader = Reader(found, max_rejected)
            folders, faults = write_people(reader, frames)
            rejected.update(reader.report.rejected)
            rejected[UNREADABLE] += len(faults)
            if not folders:
                first = next(iter(faults.values()), "it lists no clip")
                raise ClipError(f"{found.root}: {found.kind}: no clip can be read; {first}")
            people += folders
        people += [] if sets else [path]
    return People(list(dict.fromkeys(people)), +rejected)


def _data_sets(path: Path) -> list[Rows[Any]]:
    """What is known in a folder; nothing in a video, a folder of pictures, or what `build_clips` will complain of."""
    if not path.is_dir() or any(file.suffix.lower() in PICTURES for file in path.iterdir()):
        return []
    try:
        return recognise(path)
    except NotRecognised:
        return []
