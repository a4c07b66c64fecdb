"""The ordered run: what runs again and what is skipped, failures and interruptions, costs."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import nbformat
import psutil
import pytest
from conftest import FIRST, SECOND, write_notebook
from nbclient.exceptions import DeadKernelError

from nmlib import pipeline, records, runtime
from nmlib.kernels import Kernel, Kernels
from nmlib.pipeline import Cost, Project, run_notebooks
from nmlib.runtime import Run, RunError
from nmlib.steps import State, Step
from nmlib.terminal import Terminal


@pytest.fixture
def project(project_root: Path) -> Project:
    return Project(project_root)


class NoKernels:
    """In the place of `Kernels`: what would have been prepared is noted."""

    prepared: ClassVar[list[tuple[str, ...]]] = []

    def __init__(self, folder: Path) -> None:
        self.prepared.clear()

    def __enter__(self) -> "NoKernels":
        return self

    def __exit__(self, *error: object) -> None: ...

    def take(self) -> SimpleNamespace:
        return SimpleNamespace(pid=os.getpid())

    def prepare(self, modules: tuple[str, ...]) -> None:
        self.prepared.append(modules)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run notebooks inside this process: the rules are the same and nothing has to start."""

    def execute(step: Step, run: Run, terminal: Terminal, cell_minutes: float, seeds: int, kernel: object) -> None:
        code = [cell.source for cell in nbformat.read(step.path, as_version=4).cells if cell.cell_type == "code"]
        names: dict[str, Any] = {"params": str(run.path("params.yaml")), "run": str(run.folder), "seeds": seeds}
        for source in code[1:]:
            exec(source, names)
        run.path("chapters", step.path.name).write_text("executed")

    monkeypatch.setattr(pipeline, "execute", execute)
    monkeypatch.setattr(pipeline, "Kernels", NoKernels)


@pytest.fixture
def go(project: Project, in_process: None) -> Callable[..., list[str]]:
    """Bring the run up to date and say which notebooks ran."""
    return lambda **options: run_notebooks(project, project.open("tiny"), **options)


# ---------------------------------------------------------------------------------------------------------
# the rules


def test_everything_runs_once(go: Callable[..., list[str]]) -> None:
    assert go() == ["01_one", "02_two"]
    assert go() == []


def test_changed_prose_runs_its_notebook_only(go: Callable[..., list[str]], project: Project) -> None:
    go()
    write_notebook(project.root / "notebooks" / "01_one.ipynb", "One, said better", FIRST)
    assert go() == ["01_one"]


def test_changed_artefact_runs_what_follows(go: Callable[..., list[str]], project: Project) -> None:
    go()
    code = FIRST.replace('write_text("1")', 'write_text("5")')
    write_notebook(project.root / "notebooks" / "01_one.ipynb", "One", code)
    assert go() == ["01_one", "02_two"]
    assert (project.root / "runs" / "tiny" / "two.txt").read_text() == "6"


def test_needs_can_be_listed(go: Callable[..., list[str]], project: Project) -> None:
    path = project.root / "notebooks" / "03_three.ipynb"
    write_notebook(path, "Three", "from pathlib import Path\nPath(run, 'three.txt').write_text('3')")
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["nmlib"] = {"needs": ["02"]}
    nbformat.write(notebook, path)
    go()
    write_notebook(project.root / "notebooks" / "01_one.ipynb", "One", FIRST + 'opened.path("more.txt").write_text("")')
    assert go() == ["01_one", "02_two"]
    notebook.metadata["nmlib"] = {"needs": ["07"]}
    nbformat.write(notebook, path)
    with pytest.raises(RunError, match=r"nmlib.needs lists \['07'\]; the other notebooks are"):
        go()


def test_changed_settings_run_everything(
    go: Callable[..., list[str]], project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    go()
    path = project.params_file("tiny")
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    assert go() == ["01_one", "02_two"]
    assert "01_one: running (the settings changed)" in capsys.readouterr().err


def test_changed_library_runs_the_notebooks_that_use_it(
    go: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go()
    digest = runtime.library_digest
    monkeypatch.setattr(runtime, "library_digest", lambda *names: digest(*names) + ("!" if "records" in names else ""))
    assert go() == ["01_one"]


def test_tampered_artefact_is_made_anew(
    go: Callable[..., list[str]], project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    go()
    one = project.root / "runs" / "tiny" / "numbers" / "one.txt"
    one.write_text("7")
    assert go() == ["01_one"]
    assert one.read_text() == "1"
    assert "01_one: running (numbers/one.txt is missing or was changed)" in capsys.readouterr().err
    one.unlink()
    assert go() == ["01_one"]


def test_tampered_file_takes_its_folder_along_but_nothing_of_others(
    go: Callable[..., list[str]], project: Project
) -> None:
    code = (
        FIRST + 'if not opened.path("numbers", "b.txt").exists():\n    opened.path("numbers", "b.txt").write_text("b")'
    )
    write_notebook(project.root / "notebooks" / "01_one.ipynb", "One", code)
    go()
    folder = project.root / "runs" / "tiny" / "numbers"
    (folder / "mine.txt").write_text("a file that no notebook made")
    before = (folder / "b.txt").stat().st_mtime_ns
    (folder / "one.txt").write_text("7")
    go()
    assert (folder / "b.txt").stat().st_mtime_ns > before
    assert (folder / "mine.txt").exists()


def test_changed_number_of_a_record_counts_its_minutes_do_not(go: Callable[..., list[str]], project: Project) -> None:
    go()
    path = project.root / "runs" / "tiny" / "records" / "tiny.one.json"
    runtime.write_json(path, runtime.read_json(path) | {"minutes": 3.0})
    assert go() == []
    runtime.write_json(path, runtime.read_json(path) | {"value": 2.0})
    assert go() == ["01_one"]


def test_missing_chapter_and_force(go: Callable[..., list[str]], project: Project) -> None:
    go()
    (project.root / "runs" / "tiny" / "chapters" / "02_two.ipynb").unlink()
    assert go() == ["02_two"]
    assert go(force=True) == ["01_one", "02_two"]


def test_only(go: Callable[..., list[str]]) -> None:
    with pytest.raises(RunError, match="02_two needs what 01_one make; run those to the end first"):
        go(only="02")
    assert go(only="01") == ["01_one"]
    assert go(only="02_two") == ["02_two"]
    with pytest.raises(RunError, match="no notebook '09'; there are 01_one, 02_two"):
        go(only="09")


def test_failed_run_keeps_its_work_and_its_cost(go: Callable[..., list[str]], project: Project) -> None:
    path = project.root / "notebooks" / "02_two.ipynb"
    write_notebook(path, "Two", "from pathlib import Path\nPath(run, 'part.txt').write_text('1')\n1 / 0")
    with pytest.raises(ZeroDivisionError):
        go()
    state = State(project.open("tiny"))
    assert not state.finished("02_two")
    assert state.entries["02_two"]["spent"] > 0
    write_notebook(path, "Two", SECOND)
    assert go() == ["02_two"]
    assert (project.root / "runs" / "tiny" / "part.txt").exists()


def test_minutes_of_work_found_done_are_not_forgotten(go: Callable[..., list[str]], project: Project) -> None:
    code = "from pathlib import Path\nimport time\nif not Path(run, 'slow').exists():\n    time.sleep(0.6)\n"
    code += "Path(run, 'slow').touch(exist_ok=False) if not Path(run, 'slow').exists() else None"
    write_notebook(project.root / "notebooks" / "02_two.ipynb", "Slow", code)
    go()
    write_notebook(project.root / "notebooks" / "02_two.ipynb", "Slow, said better", code)
    assert go() == ["02_two"]
    found = records.read_records(project.root / "runs" / "tiny")
    assert found["book.minutes.02_two"].value >= 0.6 / 60


def test_costs_become_records(go: Callable[..., list[str]], project: Project) -> None:
    go(only="01")
    assert "book.minutes" not in records.read_records(project.root / "runs" / "tiny")
    go()
    found = records.read_records(project.root / "runs" / "tiny")
    parts = found["book.minutes.01_one"].value + found["book.minutes.02_two"].value
    assert found["book.minutes"].value == pytest.approx(parts)
    assert found["book.peak_memory_gb"].unit == "GB"
    assert found["book.minutes"].library_hash == runtime.library_digest()
    go(seeds=3)
    found = records.read_records(project.root / "runs" / "tiny")
    assert {record.seeds for id_, record in found.items() if id_.startswith("book.")} == {3}
    assert found["book.minutes"].command == "python -m nmlib run --params tiny --seeds 3"


def test_costs_are_of_the_code_that_had_them(
    go: Callable[..., list[str]], project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that finds all done measures nothing, so it does not claim today's code for yesterday's minutes."""
    go()
    before = records.read_records(project.root / "runs" / "tiny")
    digest = runtime.library_digest
    monkeypatch.setattr(runtime, "library_digest", lambda *names: digest(*names) + ("" if names else "!"))
    assert go() == []
    assert records.read_records(project.root / "runs" / "tiny") == before


def test_truncated_state_is_named(go: Callable[..., list[str]], project: Project) -> None:
    go()
    path = project.root / "runs" / "tiny" / "state.json"
    path.write_text(path.read_text()[:30])
    with pytest.raises(RunError, match=r"state\.json: not complete JSON"):
        go()


def test_unreadable_notebooks_are_named(go: Callable[..., list[str]], project: Project) -> None:
    path = project.root / "notebooks" / "02_two.ipynb"
    write_notebook(path, "Two", "%matplotlib inline\nfor")
    with pytest.raises(RunError, match=r"02_two\.ipynb: not a readable notebook of Python cells \(invalid syntax"):
        go()
    path.write_text("{")
    with pytest.raises(RunError, match=r"02_two\.ipynb: not a readable notebook"):
        go()


def test_project_is_found_from_below(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert Project.find(project.root / "notebooks") == project
    with pytest.raises(RunError, match="go to the folder of the project"):
        Project.find(tmp_path_factory.mktemp("elsewhere"))


def test_the_kernel_of_the_notebook_that_follows_is_prepared(go: Callable[..., list[str]], project: Project) -> None:
    second, prepared = project.root / "notebooks" / "02_two.ipynb", NoKernels.prepared
    write_notebook(second, "Two", SECOND + "from nmlib import measured, runtime")
    go()
    assert prepared == [("measured", "runtime")], "nothing follows the second"
    go()
    assert prepared == [], "everything is up to date"
    write_notebook(second, "Two, said better", SECOND)
    go()
    assert prepared == [], "nothing runs before the second"
    go(force=True)
    assert prepared == [()], "it imports nothing of the library"


def test_nothing_is_prepared_beside_a_notebook_that_measures_times(
    go: Callable[..., list[str]], project: Project
) -> None:
    path = project.root / "notebooks" / "01_one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["nmlib"] = {"needs": [], "quiet": True}
    nbformat.write(notebook, path)
    assert go() == ["01_one", "02_two"] and NoKernels.prepared == []


# ---------------------------------------------------------------------------------------------------------
# real processes


def test_a_run_of_no_notebook_is_up_to_date(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "applies", lambda *_: False)
    assert run_notebooks(project, project.open("tiny")) == []


def test_memory_is_that_of_the_process_watched() -> None:
    """Not of others that were started beside it."""
    code = "import time; held = bytearray(400 * 2**20); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]) as beside:
        watched = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
        with Cost(watched.pid, every=0.05) as cost:
            watched.wait()
        beside.kill()
    assert 0 < cost.memory_gb < 0.2 and cost.minutes > 0


@pytest.mark.parametrize("fault", [OSError("no port is free"), KeyboardInterrupt()])
def test_no_kernel_is_left_where_preparing_the_next_fails(
    project: Project, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*_: object) -> None:
        assert len(kernels_below()) == 1
        raise fault

    monkeypatch.setattr(Kernels, "prepare", prepare)
    with pytest.raises(type(fault)):
        run_notebooks(project, project.open("tiny"))
    assert not kernels_below()


def test_a_kernel_that_does_not_answer_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute_notebook(*_: object, **__: object) -> None:
        raise RuntimeError("Kernel didn't respond in 60 seconds")

    monkeypatch.setattr(pipeline.papermill, "execute_notebook", execute_notebook)
    with pytest.raises(RunError, match=r"01_one\.ipynb: its process did not start \(Kernel didn't respond"):
        run_notebooks(project, project.open("tiny"))


def test_a_full_disk_is_not_blamed_on_the_kernel(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute_notebook(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline.papermill, "execute_notebook", execute_notebook)
    with pytest.raises(RunError) as caught:
        run_notebooks(project, project.open("tiny"))
    chapter = project.root / "runs" / "tiny" / "chapters" / "01_one.ipynb"
    assert str(caught.value) == f"{chapter}: the disk is full; free some space and run again, finished work is kept"
    assert not kernels_below()


def test_a_failed_run_leaves_no_kernel_that_waits(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[bool] = []

    def execute_notebook(*_: object, km: Kernel, **__: object) -> None:
        waiting.extend(process.is_running() for process in kernels_below())
        raise DeadKernelError("gone")

    monkeypatch.setattr(pipeline.papermill, "execute_notebook", execute_notebook)
    with pytest.raises(RunError, match="its process died"):
        run_notebooks(project, project.open("tiny"))
    assert waiting == [True, True], "one runs the notebook, one is prepared for the next"
    assert not kernels_below()


def test_the_kernel_of_a_notebook_ends_with_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many notebooks there are, one kernel runs and one waits."""
    counts: list[int] = []

    def execute_notebook(source: str, target: str, **_: object) -> None:
        Path(target).write_text("executed")
        counts.append(len(kernels_below()))

    monkeypatch.setattr(pipeline.papermill, "execute_notebook", execute_notebook)
    monkeypatch.setattr(pipeline.costs, "save", lambda _: None)
    write_notebook(project.root / "notebooks" / "03_three.ipynb", "Three", "three = 3")
    assert run_notebooks(project, project.open("tiny")) == ["01_one", "02_two", "03_three"]
    assert counts == [2, 2, 1]


def kernels_below() -> list[psutil.Process]:
    """Kernels that this process started and that have not ended."""
    below = psutil.Process().children(recursive=True)
    return [child for child in below if any("ipykernel" in word for word in child.cmdline())]


def test_real_run(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_notebooks(project, project.open("tiny")) == ["01_one", "02_two"]
    run = project.root / "runs" / "tiny"
    assert (run / "two.txt").read_text() == "2"
    notebook = nbformat.read(run / "chapters" / "01_one.ipynb", as_version=4)
    injected = [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert '"../runs/tiny/params.yaml"' in injected[0].source
    text = capfd.readouterr().err
    assert "counting: 100%" in text
    assert "WARNING" not in text
    assert State(project.open("tiny")).entries["01_one"]["memory_gb"] > 0.01
    assert run_notebooks(project, project.open("tiny")) == []


def test_failing_cell_leaves_no_chapter(project: Project) -> None:
    write_notebook(project.root / "notebooks" / "01_one.ipynb", "One", "raise ValueError('the lamp\\nis off')")
    with pytest.raises(RunError) as caught:
        run_notebooks(project, project.open("tiny"))
    failed = project.root / "runs" / "tiny" / "failed" / "01_one.txt"
    line = f"notebooks/01_one.ipynb, cell 3: ValueError: the lamp is off (traceback: {failed})"
    assert str(caught.value) == line
    assert "the lamp" in failed.read_text()
    assert list((project.root / "runs" / "tiny" / "chapters").iterdir()) == []


def test_cell_that_takes_too_long(project: Project) -> None:
    write_notebook(project.root / "notebooks" / "01_one.ipynb", "One", "import time\ntime.sleep(60)")
    with pytest.raises(RunError, match=r"01_one\.ipynb: a cell ran longer than 0\.02 minutes; raise --cell-minutes"):
        run_notebooks(project, project.open("tiny"), cell_minutes=0.02)


def test_the_shortest_limit_is_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero seconds would mean no limit."""
    limits: list[int] = []

    def execute_notebook(*_: object, execution_timeout: int, **__: object) -> None:
        limits.append(execution_timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.papermill, "execute_notebook", execute_notebook)
    with contextlib.suppress(KeyboardInterrupt, RunError):
        run_notebooks(project, project.open("tiny"), cell_minutes=0.01)
    assert limits == [1]


def test_interrupt_ends_with_130_and_leaves_no_chapter(project: Project) -> None:
    code = "from pathlib import Path\nimport time\nPath(run, 'started').touch()\ntime.sleep(60)"
    write_notebook(project.root / "notebooks" / "01_one.ipynb", "One", code)
    command = [sys.executable, "-m", "nmlib", "run", "--params", "tiny"]
    library = str(Path(runtime.__file__).parent.parent)
    process = subprocess.Popen(
        command,
        cwd=project.root,
        env=os.environ | {"PYTHONPATH": library},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell lets what it starts in the background ignore the signal, and that would be inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    started = project.root / "runs" / "tiny" / "started"
    for _ in range(2400):  # a busy machine is slow to start
        if started.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "interrupted; the same command goes on from here" in text
    assert list((project.root / "runs" / "tiny" / "chapters").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------
# the terminal


def test_time_left_uses_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    terminal = Terminal(["a", "b", "c"], {"a": 4.0, "b": 6.0})
    terminal.start("a", "not run yet")
    assert terminal.left() == "about 15 min left"
    monkeypatch.setattr(time, "monotonic", lambda: 120.0)
    assert terminal.left() == "about 13 min left"
    terminal.finish(2.0, 0.1)
    terminal.skip("b")
    terminal.start("c", "not run yet")
    assert terminal.left() == "about 4 min left"
    assert Terminal(["a"], {}).left() == ""


def test_log_files_get_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(["a"], {}) as terminal:
        for text in ("\rtrain: 10%|#", "\rtrain: 20%|#", "#\rtrain: 100%|###", "\nsome words\n"):
            terminal.write(text)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["[1/1] train: 10%|#", "[1/1] train: 100%|###", "[1/1] some words"]
