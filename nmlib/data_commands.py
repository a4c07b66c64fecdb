"""The commands of `python -m nmlib data`: data sets on disk are looked at, unpacked, cut into clips and imported."""

from pathlib import Path
from typing import Annotated

import typer

from nmlib.pipeline import Project
from nmlib.runtime import RunError

ParamsOption = Annotated[str, typer.Option("--params", help="Name of a file in params/, or the path of one.")]
data_app = typer.Typer(
    help="Look at data sets on disk, and import them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@data_app.command("inspect")
def inspect_data(
    path: Annotated[Path, typer.Argument(help="Folder of a data set, or MagicBrush's test zip.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Read so many rows at most.")] = None,
    pictures: Annotated[
        bool, typer.Option(help="Open every picture, so that damaged ones are counted; otherwise only tables.")
    ] = True,
    password: Annotated[str | None, typer.Option(help="Of a zip file.")] = None,
) -> None:
    """Say what a data set is: size, rounds, bad rows by reason, and how Markov it is."""
    from nmlib.inspection import inspect_path
    from nmlib.readers import ReadError

    try:
        found = inspect_path(path, limit=limit, pictures=pictures, password=password)
    except ReadError as error:
        raise RunError(str(error)) from None
    typer.echo("\n\n".join("\n".join(findings.lines()) for findings in found))


@data_app.command("unpack")
def unpack(
    archive: Annotated[Path, typer.Argument(help="A zip, tar or tar.gz file; of one in parts the name they share.")],
    to: Annotated[Path, typer.Option(help="New or empty folder that it is unpacked to.")],
    password: Annotated[str | None, typer.Option(help="Of a zip file.")] = None,
) -> None:
    """Unpack an archive whole or not at all; names that lead out of the folder, links and bombs are refused."""
    from nmlib.archives import ArchiveError, extract

    to = to.absolute()
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise RunError(f"{to}: is there already and would be replaced as a whole; give a new folder")
    try:
        count = extract(archive, to, password)
    except ArchiveError as error:
        raise RunError(str(error)) from None
    typer.echo(f"{to}: {count} files")


@data_app.command("clips")
def clips_of(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Videos or folders of pictures, one person in each; or folders of CelebV-HQ, CelebV-Text, VFHQ or "
            "HDTF, whose frames go to a folder beside --to first."
        ),
    ],
    to: Annotated[
        Path,
        typer.Option(
            help="Folder that gets a folder of frames for every person. It is replaced as a whole, so it must be new, "
            "empty, or of earlier people (with manifest.json), and hold none of the inputs."
        ),
    ],
    size: Annotated[int, typer.Option(min=16, help="Pixels a side of the frames.")] = 448,
    zoom: Annotated[float, typer.Option(min=1, help="Side of a frame over the side of the face in it.")] = 2.0,
    min_frames: Annotated[int, typer.Option(min=2, max=64, help="Fewest frames of a person that is kept.")] = 4,
    max_rejected: Annotated[
        float, typer.Option(min=0, max=1, help="Share of bad rows of a data set that is accepted.")
    ] = 0.05,
) -> None:
    """Cut people out of videos: frames with one face that is not somebody else's; `data import` makes them talk."""
    from nmlib.clips import build_clips, check_target, write_clips
    from nmlib.config import ClipConfig
    from nmlib.face_clips import people_of
    from nmlib.faces import DlibEmbedder, FaceDetector
    from nmlib.frames import ClipError
    from nmlib.identity import IdentityError
    from nmlib.readers import ReadError

    to = to.absolute()
    try:
        check_target(to, paths)
        found = people_of(paths, to.with_name(f"{to.name}-frames"), max_rejected)
        manifest = build_clips(found.people, ClipConfig(min_frames=min_frames), FaceDetector(), DlibEmbedder())
        write_clips(manifest, to, size, zoom)
    except (ClipError, IdentityError, ReadError) as error:
        raise RunError(str(error)) from None
    for reason, count in sorted(found.rejected.items()):
        typer.echo(f"left out: {count} {reason}")
    typer.echo(f"clips: {manifest.clip_counts}; frames: {manifest.frame_counts}; see {to / 'manifest.json'}")


@data_app.command("import")
def import_data(
    paths: Annotated[list[Path], typer.Argument(help="Folders of editing data sets.")],
    name: Annotated[str, typer.Option(help="Data set of the params file that they become.")],
    params: ParamsOption = "paper",
    max_rejected: Annotated[float, typer.Option(min=0, max=1, help="Share of bad rows that is accepted.")] = 0.05,
    password: Annotated[str | None, typer.Option(help="Of a zip file.")] = None,
    pipeline: Annotated[
        Path | None,
        typer.Option(help="Folder of a diffusers pipeline: new edits, or whole bodies of faces."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that open rows and pictures of chains.")] = 0,
) -> None:
    """Make data sets on disk into one of a params file: chains of edits, with rollbacks where it asks for them."""
    from nmlib.archives import ArchiveError
    from nmlib.conversation import ConversationError
    from nmlib.full_body import FullBodyError
    from nmlib.identity import IdentityError
    from nmlib.imports import import_set
    from nmlib.readers import ReadError

    opened = Project.find().open(params)
    try:
        found = import_set(
            opened,
            name,
            paths,
            max_rejected=max_rejected,
            password=password,
            pipeline=pipeline,
            workers=workers,
        )
    except (ReadError, ArchiveError, ConversationError, FullBodyError, IdentityError) as error:
        raise RunError(str(error)) from None
    typer.echo("\n".join(found.lines()))
