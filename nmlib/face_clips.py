"""From what `data clips` is given to folders of one person each: face data sets are cut into frames on the way."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nmlib.face_sets import HDTF, PICTURES, VFHQ, CelebV, write_people
from nmlib.frames import ClipError
from nmlib.inspection import recognise
from nmlib.readers import Reader, ReadError

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
        ReadError: a folder that holds neither pictures nor such a data set, or too many bad rows.
        ClipError: no clip of a data set can be read.
    """
    people, rejected = list[Path](), Counter[str]()
    for path in paths:
        if path.is_file() or any(file.suffix.lower() in PICTURES for file in path.glob("*")):
            people.append(path)
            continue
        for found in recognise(path):
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
    return People(people, +rejected)
