"""Data sets on disk as the data sets of a params file: `python -m nmlib data import`.

What notebooks draw in a world is read here from folders: chains of edits, given ways back where the params file asks
for rollbacks, and clips of faces, which become conversations about people by name. The result lies where a stage looks
for it, with about one conversation in twenty held out beside it. An import that was interrupted goes on.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain as chained
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from tqdm import tqdm

from nmlib import config, personalization
from nmlib.batches import set_settings
from nmlib.chains import Painter, longest_chain, with_rollbacks
from nmlib.config import DataConfig, FullBodyConfig, Params
from nmlib.conversation import Conversation
from nmlib.face_sets import HDTF, VFHQ, CelebV
from nmlib.faces import DlibEmbedder, FaceDetector
from nmlib.folder_clips import BOXES, FolderClips
from nmlib.full_body import DiffusionEditor, open_pipeline, with_full_bodies
from nmlib.inspection import Markov, StoredConversations, recognise
from nmlib.painted_people import paint_conversation, portrait_editor
from nmlib.readers import Reader, ReadError, Rows
from nmlib.runtime import Run, progress, write_json
from nmlib.stored_sets import Parts

TRAIN, HELDOUT = "train", "heldout"
HELDOUT_ONE_IN = 20
OTHER_SPLITS = ("dev", "val", "validation", "test")
LONGEST_POOL = 10_000  # instructions that a painter chooses from


@dataclass
class Imported:
    """What became of a data set.

    Args:
        kept: conversations written, train and held-out.
        heldout: of these, how many are held out.
        short: chains of one picture, which show no edit.
        rejected: rows that could not be read, by reason.
        before, after: how Markov the chains were, and how Markov the conversations made of them are.
    """

    kept: int = 0
    heldout: int = 0
    short: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    before: Markov = field(default_factory=Markov)
    after: Markov = field(default_factory=Markov)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` made of one."""
        return cls(**{**raw, "before": Markov(**raw["before"]), "after": Markov(**raw["after"])})

    def lines(self) -> list[str]:
        """The same in words."""
        bad = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejected.items())) or "none"
        lines = [
            f"kept        {self.kept} conversations, {self.heldout} of them held out",
            f"left out    {self.short} of one picture; rows rejected: {bad}",
        ]
        if self.before.rounds:
            lines.append(f"Markov      {self.before.share:.3f} as it was, {self.after.share:.3f} as it is stored")
        return lines


def is_heldout(id_: str) -> bool:
    """Whether a conversation is kept from training; depends on its name alone."""
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest()) % HELDOUT_ONE_IN == 0


def picture_size(params: Params) -> int:
    """Pixels a side of the pictures that a params file trains on."""
    return params.source.image_size if params.seedx is None else params.seedx.vision.image_size


def import_set(
    run: Run,
    name: str,
    paths: Sequence[Path],
    *,
    max_rejected: float = 0.05,
    password: str | None = None,
    pipeline: Path | None = None,
    workers: int = 0,
) -> Imported:
    """Read folders, make of them what the params file says of a data set, and store it.

    A data set of `data:` is made of editing chains, one of `people:` of folders of face clips (`FolderClips`).

    Args:
        run: takes `data/<name>`, and defines the data set in its params file.
        name: of the data set.
        paths: folders of data sets, read one after the other; of face clips one.
        max_rejected: share of bad rows above which reading stops.
        password: of a zip file.
        pipeline: folder of a diffusers pipeline: it makes new edits after a rollback, and of clips of faces the edits
            between recalls, for which the shares leave room, and the whole bodies that `full_body_share` asks for.
        workers: processes that open rows and pictures; the result stays the same.

    Raises:
        ReadError: no such data set in the params file; nothing readable or trainable in a folder; too many bad rows;
            two conversations of one name. What was imported before stays as it is.
        ArchiveError: a zip file that is refused.
        ConversationError: too few people in a folder of clips, or frames that cannot be used.
    """
    params = run.params
    if name in params.people:
        return _import_people(run, name, paths, pipeline)
    if name not in params.data:
        there = sorted([*params.data, *params.people])
        raise ReadError(f"{params.name}: no data set {name!r}; `data:` and `people:` define {there}")
    folder = run.path("data", name)
    rows = [rows for path in paths for rows in _trainable(path, picture_size(params), password)]
    readers = [Reader(part, max_rejected, workers=workers) for part in rows]
    painter = None if pipeline is None else Painter(open_pipeline(pipeline), _pool(paths, password))
    with _open_parts(folder, _import_key(run, name, rows, pipeline)) as parts:
        found = _gather(run, name, parts, readers, painter)
    if found.kept == found.heldout:  # before anything is joined: it leaves the earlier data set as it is
        parts.drop()
        raise ReadError(f"{paths[0]}: {found.kept} conversations, none of them to train on; expected a larger data set")
    return _finish(folder, parts, found)


def _finish(folder: Path, parts: Parts, found: Imported) -> Imported:
    """Make the data set of its parts, and write what became of its source beside it."""
    parts.join(TRAIN, folder)
    parts.join(HELDOUT, folder / HELDOUT)
    write_json(folder / "import.json", asdict(found))
    parts.drop()
    return found


class _Source(Protocol):
    kind: str
    root: Path


def _import_key(run: Run, name: str, sources: Sequence[_Source], pipeline: Path | None) -> str:
    """Identifies what an import makes: settings, and the data sets by their folders, tables, sizes and times of change.

    Pictures in folders are too many to be asked for; where one is mended, an interrupted import goes on.
    """
    settings, given = set_settings(run.params, name), None if pipeline is None else pipeline.resolve()
    told = [name, str(run.params.seed), str(picture_size(run.params)), str(given), config.digest(settings)]
    for part in sources:
        root = part.root.resolve()
        entries = [root] if root.is_file() else [entry for entry in root.iterdir() if entry.name[0] != "."]
        files = [*(entry for entry in entries if entry.is_file()), *root.glob("*/*.parquet"), *root.glob("*/*.jsonl")]
        told += [part.kind, str(root), *sorted(entry.name for entry in entries)]
        told += sorted(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    return hashlib.blake2b("\n".join(told).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _open_parts(folder: Path, key: str) -> Parts:
    """The parts of an import of that key; says so where those of another are dropped for it."""
    parts = Parts(folder, (TRAIN, HELDOUT), key)
    if parts.is_anew:
        tqdm.write(f"{folder}: settings or files have changed since the import that was interrupted; begun anew")
    return parts


def _own(conversation: Conversation) -> Conversation:
    """The same conversation in memory of this process: what a worker shares takes room that is small in containers."""
    images = conversation.images
    return conversation if images is None else replace(conversation, images=images.clone())


def _gather(
    run: Run, name: str, parts: Parts, readers: Sequence[Reader[Conversation]], painter: Painter | None
) -> Imported:
    """Fill the parts from where they stand; what became of the rows, those of an interrupted import among them."""
    settings, seed, found = run.params.data[name], f"{run.params.seed}.{name}", Imported()
    if parts.source is not None:
        found = Imported.of(parts.source["found"])
        for reader, state in zip(readers, parts.source["readers"], strict=True):
            reader.resume(state)

    def note() -> None:
        found.rejected = dict(sum((Counter(reader.report.rejected) for reader in readers), Counter[str]()))
        parts.note({"found": asdict(found), "readers": [reader.state() for reader in readers]})

    left = settings.conversations - found.kept
    coming = progress(_made(chained.from_iterable(readers), settings, seed, painter, found), left, f"import {name}")
    for conversation in islice(_once(coming, name, {told.id for told in parts.told()}), left):
        held = is_heldout(conversation.id)
        parts.add(HELDOUT if held else TRAIN, _own(conversation))
        found.kept, found.heldout = found.kept + 1, found.heldout + held
        if parts.is_due:
            note()
    note()
    return found


def _import_people(run: Run, name: str, paths: Sequence[Path], pipeline: Path | None) -> Imported:
    """Conversations by name about the people of a folder of clips, a few at a time; what became of bodies beside it."""
    params, folder = run.params, run.path("data", name)
    settings = params.people[name]
    if len(paths) != 1:
        raise ReadError(f"{name}: {len(paths)} folders of clips; expected one, so that no person is in it twice")
    source = FolderClips(paths[0], picture_size(params))
    if settings.face_weight != 1 and (bare := source.without_boxes()):
        raise ReadError(
            f"{bare[0]}: no {BOXES}, but {name}.face_weight is {settings.face_weight:g}; make the clips with "
            "`python -m nmlib data clips`, or set face_weight to 1"
        )
    editors = None if pipeline is None else _editors(pipeline, picture_size(params))
    with _open_parts(folder, _import_key(run, name, [source], pipeline)) as parts:
        found = _tell(run, name, parts, source, editors)
    if editors is not None:
        for what, editor in editors._asdict().items():
            editor.save(folder / f"{what}.json")
            if editor.passed_over:
                found.rejected[f"pictures without exactly one face, for {what}"] = len(editor.passed_over)
    return _finish(folder, parts, found)


def _tell(run: Run, name: str, parts: Parts, source: FolderClips, editors: "Editors | None") -> Imported:
    """Fill the parts with conversations about people from where they stand; each is a function of its number."""
    params, settings, found = run.params, run.params.people[name], Imported()
    if parts.source is not None:
        found = Imported.of(parts.source["found"])
        for what, editor in (editors._asdict() if editors else {}).items():
            editor.resume(parts.source[what])

    def note() -> None:
        made = {what: editor.state() for what, editor in (editors._asdict() if editors else {}).items()}
        parts.note({"found": asdict(found), **made})

    for number in progress(range(found.kept, settings.conversations), desc=f"import {name}"):
        split, id_ = TRAIN if number % HELDOUT_ONE_IN else HELDOUT, f"{name}-{number:06d}"
        one, seed = settings.model_copy(update={"conversations": 1}), params.seed * 1_000_003 + number
        if editors is None:
            (told,) = personalization.build_conversations(source, one, seed=seed, split=split)
        else:
            told = paint_conversation(source, one, editors.edits, seed=seed, split=split, id_=id_)
            (told,) = with_full_bodies([told], editors.bodies, settings.full_body_share, seed, split)
        parts.add(split, replace(told, id=id_).validate())
        found.kept, found.heldout = found.kept + 1, found.heldout + (split == HELDOUT)
        found.after.add(told)
        if parts.is_due:
            note()
    note()
    return found


class Editors(NamedTuple):
    """What a pipeline makes of faces: edits between recalls, and whole bodies."""

    edits: DiffusionEditor
    bodies: DiffusionEditor


def _editors(folder: Path, side: int) -> Editors:
    """Editors that keep what dlib's network takes for the same person; edits are painted at the size of the clips."""
    pipeline = open_pipeline(folder)
    bodies = DiffusionEditor(pipeline, FaceDetector(), DlibEmbedder(), FullBodyConfig())
    return Editors(portrait_editor(pipeline, side), bodies)


def _trainable(path: Path, size: int | None, password: str | None) -> list[Rows[Conversation]]:
    """The data sets in a folder that may be trained on, held to being conversations with pictures."""
    found = [rows for rows in recognise(path, size, password) if rows.kind.rpartition(", ")[2] not in OTHER_SPLITS]
    for rows in found:
        if rows.evaluation_only:
            raise ReadError(f"{rows.root}: {rows.kind}: its makers ask that nothing is trained on it")
        if isinstance(rows, (CelebV, VFHQ, HDTF)):
            raise ReadError(
                f"{rows.root}: {rows.kind}: clips of faces; expected chains of edits. Cut people out of them by "
                "`python -m nmlib data clips`, and import those under a name of `people:`"
            )
        if isinstance(rows, StoredConversations):
            raise ReadError(f"{rows.root}: was imported or drawn already; give the folder that it was made from")
    if not found:
        raise ReadError(f"{path}: holds only the splits {', '.join(OTHER_SPLITS)}, on which nothing is trained")
    return found


def _made(
    conversations: Iterable[Conversation],
    settings: DataConfig,
    seed: str,
    painter: Painter | None,
    found: Imported,
) -> Iterator[Conversation]:
    """Conversations as the settings want them; one that goes back by itself stays as it is, cut to their length.

    What is drawn for one depends on its name, and not on how many came before.
    """
    for conversation in conversations:
        found.before.add(conversation)
        cut = conversation.prefix(max(settings.rounds))
        if len(cut) < 2:
            found.short += 1
            continue
        if settings.rollback_share and cut.is_markov:
            split, rng = HELDOUT if is_heldout(cut.id) else TRAIN, random.Random(f"{seed}.{cut.id}")
            cut = with_rollbacks(longest_chain(conversation), settings, rng, split, painter)
        found.after.add(cut)
        yield cut.validate()


def _once(conversations: Iterable[Conversation], name: str, seen: set[str]) -> Iterator[Conversation]:
    """The same conversations; two of one id could not be told apart when they are read again (raises ReadError)."""
    for conversation in conversations:
        if conversation.id in seen:
            raise ReadError(
                f"{name}: two conversations are named {conversation.id!r}; expected each once: give every folder once, "
                "and rename one of two folders of the same name"
            )
        seen.add(conversation.id)
        yield conversation


def _pool(paths: Sequence[Path], password: str | None) -> list[str]:
    """Instructions of edits in these data sets, their pictures not opened."""
    readers = [Reader(rows, 1.0) for path in paths for rows in _trainable(path, None, password)]
    said: list[str] = []
    for conversation in chained.from_iterable(readers):
        said += [item.instruction for item in conversation.rounds if item.kind == "edit"]
        if len(said) >= LONGEST_POOL:
            break
    return said
