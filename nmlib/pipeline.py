"""The ordered run of the notebooks under Papermill, and what it cost.

Executed notebooks are kept in `chapters/` of the run's folder; a notebook that fails leaves none. What is up
to date is skipped, so an interrupted run goes on where it stopped.
"""

import contextlib
import math
import os
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nbformat
import papermill
import psutil
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from nmlib import costs, runtime
from nmlib.kernels import Kernel, Kernels
from nmlib.records import read_records, write_record
from nmlib.runtime import Run, RunError
from nmlib.steps import State, Step, in_order, read_step, snapshot
from nmlib.terminal import Terminal


@dataclass(frozen=True)
class Project:
    """Where things are.

    Args:
        root: the folder with `notebooks/`, `params/` and `book/`.
    """

    root: Path

    @classmethod
    def find(cls, start: str | Path = ".") -> "Project":
        """The project around a folder.

        Raises:
            RunError: no folder above has `notebooks/` and `params/`.
        """
        here = Path(start).resolve()
        for folder in (here, *here.parents):
            if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
                return cls(folder)
        raise RunError(f"{here}: no notebooks/ and params/ here or above; go to the folder of the project")

    def params_file(self, name: str) -> Path:
        """The params file of that name, or the path itself if it is one."""
        return Path(name) if name.endswith((".yaml", ".yml")) else self.root / "params" / f"{name}.yaml"

    def open(self, name: str) -> Run:
        """The run of a params file, by name or path; its folder is `runs/<name>`."""
        return Run.open(self.params_file(name), root=self.root / "runs")

    def steps(self) -> list["Step"]:
        """The notebooks in the order in which they run.

        Raises:
            RunError: there are none, or one cannot be read.
        """
        files = sorted((self.root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
        if not files:
            raise RunError(f"{self.root / 'notebooks'}: no notebooks named like 01_name.ipynb")
        names = [file.stem for file in files]
        return in_order([read_step(file, names) for file in files])


class Cost:
    """Minutes of a `with` block, and peak memory of a process and those below it.

    Args:
        pid: number of the process.
        every: seconds between two looks.
    """

    def __init__(self, pid: int, every: float = 0.5) -> None:
        self._pid = pid
        self.minutes = 0.0
        self.memory_gb = 0.0
        self._every = every
        self._done = threading.Event()

    def __enter__(self) -> "Cost":
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.minutes = (time.monotonic() - self._start) / 60

    def _watch(self) -> None:
        with contextlib.suppress(psutil.Error):  # it ended
            top = psutil.Process(self._pid)
            while not self._done.wait(self._every):
                total = top.memory_info().rss
                for child in top.children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        total += child.memory_info().rss
                self.memory_gb = max(self.memory_gb, total / 2**30)


def execute(step: Step, run: Run, terminal: Terminal, cell_minutes: float, seeds: int, kernel: Kernel) -> None:
    """Execute one notebook into the run's `chapters/`, whole or not at all.

    Args:
        step: the notebook.
        run: the run it belongs to.
        terminal: shows what the notebook writes to stderr.
        cell_minutes: longest time for a cell.
        seeds: trainings of every stage.
        kernel: runs it, and is stopped.

    Raises:
        RunError: the notebook failed; one line with the notebook, the cell and the error.
    """
    folder = step.path.parent
    given = {"params": run.path("params.yaml"), "run": run.folder}
    parameters: dict[str, str | int] = {
        key: Path(os.path.relpath(path, folder)).as_posix() for key, path in given.items()
    }
    failed = run.path("failed", f"{step.name}.txt")
    failed.unlink(missing_ok=True)
    where = f"notebooks/{step.path.name}"
    try:
        with runtime.atomic_path(run.path("chapters", step.path.name)) as temporary:
            papermill.execute_notebook(
                str(step.path),
                str(temporary.resolve()),
                parameters=parameters | {"seeds": seeds},
                kernel_name="python3",
                language="python",
                cwd=str(folder),
                km=kernel,
                progress_bar=False,
                request_save_on_cell_execute=False,
                stderr_file=terminal,
                start_timeout=math.ceil(max(1, cell_minutes) * 60),  # a kernel answers once it has imported
                execution_timeout=math.ceil(cell_minutes * 60),  # 0 would mean no limit
            )
    except PapermillExecutionError as error:
        failed.write_text("\n".join(error.traceback), encoding="utf-8")
        text = " ".join(str(error.evalue).split())
        cell = _source_cell(step.path, error.cell_index) + 1
        raise RunError(f"{where}, cell {cell}: {error.ename}: {text} (traceback: {failed})") from None
    except CellTimeoutError:
        raise RunError(f"{where}: a cell ran longer than {cell_minutes:g} minutes; raise --cell-minutes") from None
    except DeadKernelError:
        raise RunError(f"{where}: its process died; the usual cause is too little memory") from None
    except RunError:  # a full disk has its own words
        raise
    except RuntimeError as error:  # what nbclient says of a kernel that does not answer
        raise RunError(f"{where}: its process did not start ({error})") from None
    finally:
        kernel.stop()


def _source_cell(path: Path, executed: int) -> int:
    """Position in the source of a cell of the executed notebook, which has one more for the parameters."""
    cells = nbformat.read(path, as_version=4).cells
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    injected = tagged[0] + 1 if tagged else 0
    return executed - 1 if executed >= injected else executed


def run_notebooks(
    project: Project,
    run: Run,
    *,
    only: str | None = None,
    force: bool = False,
    cell_minutes: float = 120.0,
    seeds: int = 1,
) -> list[str]:
    """Run the notebooks that are not up to date, in order.

    Args:
        project: where the notebooks are.
        run: the run to bring up to date.
        only: number or name of one notebook.
        force: run even what is up to date, and make its artefacts anew.
        cell_minutes: longest time for a cell.
        seeds: trainings of every stage, for intervals over seeds.

    Returns:
        Names of the notebooks that ran.

    Raises:
        RunError: a notebook failed, or `only` names none.
    """
    steps = [step for step in project.steps() if step.applies(run.params)]
    state = State(run, seeds)
    chosen = steps if only is None else [_choose(steps, only, state)]
    ran = []
    expected = _expected_minutes(project, run, state)
    with Terminal([step.name for step in chosen], expected) as terminal, Kernels(project.root / "notebooks") as kernels:
        for place, step in enumerate(chosen):
            reason = "forced" if force else state.reason(step)
            if reason is None:
                terminal.skip(step.name)
                continue
            terminal.start(step.name, reason)
            state.begin(step, force)
            inputs, before = state.inputs(step), snapshot(run.folder)
            following = _following(step, chosen[place + 1 :], state, force)
            kernel = kernels.take()
            cost = Cost(kernel.pid)
            try:
                with cost:
                    if following is not None:
                        kernels.prepare(following.modules)
                    execute(step, run, terminal, cell_minutes, seeds, kernel)
            except BaseException:
                state.stop(step, cost.minutes)
                raise
            state.finish(step, inputs, before, cost.minutes, cost.memory_gb)
            run.log("notebook", name=step.name, reason=reason, minutes=cost.minutes, memory_gb=cost.memory_gb)
            terminal.finish(cost.minutes, cost.memory_gb)
            ran.append(step.name)
    if ran:
        costs.save(run)
        _record_costs(run, state, steps)
    return ran


def _following(step: Step, later: list[Step], state: State, force: bool) -> Step | None:
    """The notebook that will probably run after this one and may be prepared beside it."""
    if step.quiet:
        return None
    return next((other for other in later if force or step.name in other.needs or state.reason(other)), None)


def _choose(steps: list[Step], only: str, state: State) -> Step:
    """The step of that number or name, once those it needs have run."""
    for step in steps:
        if only in (step.name, step.name[:2]):
            missing = [name for name in step.needs if not state.finished(name)]
            if missing:
                raise RunError(f"{step.name} needs what {', '.join(missing)} make; run those to the end first")
            return step
    raise RunError(f"no notebook {only!r}; there are {', '.join(step.name for step in steps)}")


def _expected_minutes(project: Project, run: Run, state: State) -> dict[str, float]:
    """Minutes of each notebook in the last run here, or else in the published one."""
    published = project.root / "book" / "results" / f"{run.name}.json"
    found: dict[str, float] = {}
    if published.exists():
        prefix = "book.minutes."
        rows = read_records(published).items()
        found = {id.removeprefix(prefix): record.value for id, record in rows if id.startswith(prefix)}
    return found | {name: entry["minutes"] for name, entry in state.entries.items() if "minutes" in entry}


def _record_costs(run: Run, state: State, steps: list[Step]) -> None:
    """Record the minutes and memory of the notebooks, and the totals once all have run."""
    costs = {step.name: state.entries[step.name] for step in steps if state.finished(step.name)}
    note = partial(write_record, run, seeds=state.seeds, modules=())
    for name, entry in costs.items():
        note(f"book.minutes.{name}", entry["minutes"], n=1, unit="minutes")
    if len(costs) == len(steps):
        minutes = sum(entry["minutes"] for entry in costs.values())
        memory = max(entry["memory_gb"] for entry in costs.values())
        note("book.minutes", minutes, n=len(costs), unit="minutes")
        note("book.peak_memory_gb", memory, n=len(costs), unit="GB")
