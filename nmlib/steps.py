"""What a notebook depends on, and whether it must run again.

A notebook is up to date when nothing it depends on changed since it last ran: its own source, the settings,
the library modules it imports (and all that they import), the artefacts of the notebooks it needs, and the
artefacts it wrote itself. `state.json` in the run's folder remembers all of that.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from nmlib import runtime
from nmlib.config import Params
from nmlib.runtime import Run, RunError

Snapshot = dict[str, tuple[int, int]]

_NOT_ARTEFACTS = ("state.json", "log.jsonl", "params.yaml")
_NOT_ARTEFACT_FOLDERS = ("chapters", "failed")
_VOLATILE = ("command", "machine", "minutes", "library_hash", "params_hash")
_NOISE = ("papermill", "execution", "collapsed", "ExecuteTime", "jupyter")


@dataclass(frozen=True)
class Step:
    """One notebook of the run.

    Args:
        path: the notebook.
        source: hash of its cells.
        library: hash of the library code it uses.
        needs: names of the notebooks whose artefacts it may read.
        modules: of the library that it imports.
        quiet: whether it measures times, so that nothing may be done beside it.
        about: block of the params file without which it has nothing to show, for example `people`; None for none.
            With a `seedx` block, the models and data of the other notebooks are not those that the file describes.
    """

    path: Path
    source: str
    library: str
    needs: tuple[str, ...]
    modules: tuple[str, ...] = ()
    quiet: bool = False
    about: str | None = None

    def applies(self, params: Params) -> bool:
        """Whether a params file has what the notebook is about."""
        if params.seedx is not None:
            return self.about == "seedx"
        return self.about is None or bool(getattr(params, self.about))

    @property
    def name(self) -> str:
        """File name without its ending, for example `03_tokens`."""
        return self.path.stem


def in_order(steps: Sequence[Step]) -> list[Step]:
    """Steps such that each comes after those it needs, otherwise in the order of their names.

    A chapter that shows results may so stand first in the book and run last.

    Raises:
        RunError: steps need each other in a circle.
    """
    left, done = sorted(steps, key=lambda step: step.name), list[Step]()
    while left:
        ready = next((step for step in left if set(step.needs) <= {other.name for other in done}), None)
        if ready is None:
            raise RunError(f"notebooks {', '.join(step.name for step in left)} need each other in a circle")
        done.append(ready)
        left.remove(ready)
    return done


def read_step(path: Path, names: Sequence[str]) -> Step:
    """Read what decides whether a notebook must run again.

    Args:
        path: the notebook. Its metadata may list the numbers of those it needs, and the block of the params file
            that it is about: `nmlib: {needs: ["02"], about: "people"}`.
            One that measures times says `quiet: true`.
        names: names of all notebooks; without a list it needs all whose names come before its own.

    Raises:
        RunError: the file is no notebook, a code cell is not Python, or it needs an unknown notebook.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        code = "\n".join(_plain_python(cell.source) for cell in notebook.cells if cell.cell_type == "code")
        modules = runtime.imported_modules(code)
    except (OSError, ValueError, SyntaxError) as error:  # nbformat's own errors are ValueErrors
        raise RunError(f"{path}: not a readable notebook of Python cells ({error})") from None
    cells = [
        [cell.cell_type, cell.source, {k: v for k, v in cell.metadata.items() if k not in _NOISE}]
        for cell in notebook.cells
    ]
    told = notebook.metadata.get("nmlib", {})
    listed = told.get("needs")
    others = [name for name in names if name != path.stem]
    if listed is None:
        needs = [name for name in others if name < path.stem]
    else:
        needs = [name for name in others if name[:2] in listed or name in listed]
        if len(needs) != len(listed):
            raise RunError(f"{path}: metadata nmlib.needs lists {listed}; the other notebooks are {others}")
    library = runtime.library_digest(*modules) if modules else ""
    quiet = bool(told.get("quiet"))
    return Step(path, _digest(cells), library, tuple(needs), modules, quiet, told.get("about"))


def _plain_python(source: str) -> str:
    """A cell's source without IPython's magics."""
    if source.startswith("%%"):
        return ""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


class State:
    """What a run's notebooks did, kept in `state.json`.

    Args:
        run: the run.
        seeds: trainings of every stage; another number makes every notebook run again.
    """

    def __init__(self, run: Run, seeds: int = 1) -> None:
        self.run, self.seeds = run, seeds
        self.file = run.path("state.json")
        self.entries: dict[str, dict[str, Any]] = runtime.read_json(self.file) if self.file.exists() else {}

    def chapter(self, step: Step) -> Path:
        """Where the executed notebook is."""
        return self.run.path("chapters", step.path.name)

    def inputs(self, step: Step) -> dict[str, Any]:
        """Everything a notebook depends on, as hashes."""
        upstream = {name: self.entries.get(name, {}).get("stamp") for name in step.needs}
        settings = f"{self.run.digest}-{self.seeds}"
        return {"source": step.source, "params": settings, "library": step.library, "upstream": upstream}

    def finished(self, name: str) -> bool:
        """Whether a notebook's last run came to its end."""
        return bool(self.entries.get(name, {}).get("finished"))

    def reason(self, step: Step) -> str | None:
        """Why a notebook must run, in a few words; None when it is up to date."""
        changed = self._changed(step)
        if changed is not None:
            return changed
        tampered = self.tampered(step)
        return f"{tampered[0]} is missing or was changed" if tampered else None

    def _changed(self, step: Step) -> str | None:
        """What a notebook depends on that is not as it was when it last ran."""
        if not self.finished(step.name):
            return "not finished yet" if step.name in self.entries else "not run yet"
        now, before = self.inputs(step), self.entries[step.name]["inputs"]
        words = {"source": "its source changed", "params": "the settings changed", "library": "library code changed"}
        for key, reason in words.items():
            if now[key] != before[key]:
                return reason
        changed = [name for name, stamp in now["upstream"].items() if before["upstream"].get(name) != stamp]
        if changed or len(now["upstream"]) != len(before["upstream"]):
            return f"the artefacts of {', '.join(changed) or 'earlier notebooks'} changed"
        return None if self.chapter(step).exists() else "its executed notebook is missing"

    def tampered(self, step: Step) -> list[str]:
        """Artefacts of a notebook that are no longer what it wrote."""
        artefacts = self.entries.get(step.name, {}).get("artefacts", {})
        return [name for name, known in artefacts.items() if _fingerprint(self.run.folder / name) != known]

    def begin(self, step: Step, force: bool = False) -> None:
        """Prepare for a notebook to run: it counts as unfinished until `finish`.

        Artefacts that someone changed are removed, so that it makes them anew. What an unfinished run left, and
        what other settings or code made, stays: the notebook itself knows whether it can go on from there.

        Args:
            step: the notebook.
            force: remove all its artefacts.
        """
        entry = self.entries.setdefault(step.name, {"artefacts": {}})
        doubtful = set(self.tampered(step)) if self._changed(step) is None else set()
        doubtful = set(entry["artefacts"]) if force else doubtful
        # a folder that lost one of its files is not whole: what lies beside a doubtful file goes with it
        folders = {str(Path(name).parent) for name in doubtful} - {".", "records"}
        for name in entry["artefacts"]:
            if name in doubtful or str(Path(name).parent) in folders:
                (self.run.folder / name).unlink(missing_ok=True)
        if force or entry.get("finished"):
            entry["spent"] = 0.0
        entry["finished"] = False
        runtime.write_json(self.file, self.entries)

    def stop(self, step: Step, minutes: float) -> None:
        """Remember what a run cost that did not come to its end."""
        entry = self.entries[step.name]
        entry["spent"] = entry.get("spent", 0.0) + minutes
        runtime.write_json(self.file, self.entries)

    def finish(self, step: Step, inputs: dict[str, Any], before: Snapshot, minutes: float, memory_gb: float) -> None:
        """Remember a notebook that ended well; a file belongs to the notebook that wrote it last.

        The minutes that are kept are those of all its work: interrupted runs count, and a run that found its
        work done does not make it look cheaper than it was.

        Args:
            step: the notebook.
            inputs: what `inputs` said before it ran.
            before: what `snapshot` said before it ran.
            minutes, memory_gb: what this run cost.
        """
        after = snapshot(self.run.folder)
        written = {name for name, mark in after.items() if before.get(name) != mark}
        for name, other in self.entries.items():
            if name != step.name:
                other["artefacts"] = {k: v for k, v in other["artefacts"].items() if k not in written}
        old = self.entries[step.name]
        reused = {name for name in old["artefacts"] if name in after} - written
        minutes += old.get("spent", 0.0)
        if reused:
            minutes, memory_gb = max(minutes, old.get("minutes", 0.0)), max(memory_gb, old.get("memory_gb", 0.0))
        artefacts = {name: _fingerprint(self.run.folder / name) for name in sorted(written | reused)}
        self.entries[step.name] = {
            "finished": True,
            "inputs": inputs,
            "artefacts": artefacts,
            "stamp": _digest(artefacts),
            "minutes": round(minutes, 3),
            "memory_gb": round(memory_gb, 3),
        }
        runtime.write_json(self.file, self.entries)


def snapshot(folder: Path) -> Snapshot:
    """Time and size of every file that may be an artefact."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        ignored = (
            name.parts[0] in _NOT_ARTEFACT_FOLDERS
            or name.name in _NOT_ARTEFACTS
            or name.name.startswith(("events.out.tfevents", "book."))
            or runtime.is_temporary(name)
        )
        if not ignored and path.is_file():
            status = path.stat()
            found[name.as_posix()] = (status.st_mtime_ns, status.st_size)
    return found


def _fingerprint(path: Path) -> list[Any] | None:
    """Size and hash of a file, None if it is missing; a record counts by its numbers alone."""
    try:
        if path.parent.name == "records" and path.suffix == ".json":
            row = json.loads(path.read_bytes())
            return [0, _digest({key: value for key, value in row.items() if key not in _VOLATILE})]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
        return [path.stat().st_size, digest]
    except (OSError, ValueError, AttributeError):
        return None
