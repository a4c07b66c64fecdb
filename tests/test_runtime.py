"""Seeds, number types, run folders, and writing that is whole or absent."""

import errno
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nmlib import config, runtime
from nmlib.runtime import Run, RunError


@pytest.fixture
def params_file(tmp_path: Path, tiny: dict[str, Any]) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny), encoding="utf-8")
    return path


def test_seed_everything_repeats() -> None:
    def draw() -> tuple[float, float, float]:
        runtime.seed_everything(3)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw() == draw()


def test_set_threads_takes_the_number_or_the_cores() -> None:
    before = torch.get_num_threads()
    try:
        assert runtime.set_threads(1) == torch.get_num_threads() == 1
        assert runtime.set_threads(0) == torch.get_num_threads() == min(runtime.cores(), runtime.MAX_THREADS)
    finally:
        torch.set_num_threads(before)


def test_compute_dtype() -> None:
    assert runtime.compute_dtype("float32") == torch.float32
    assert runtime.compute_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="found 'half'"):
        runtime.compute_dtype("half")


@pytest.mark.parametrize("has", [True, False])
def test_automatic_dtype_asks_the_processor(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert runtime.compute_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if has else torch.float32)


def test_machine_is_one_line() -> None:
    assert "\n" not in runtime.machine()
    assert f"{runtime.cores()} cores" in runtime.machine()


def test_atomic_path_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with runtime.atomic_path(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("old")
    with pytest.raises(KeyError), runtime.atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyError("something else went wrong")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_path_notices_that_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing was written"), runtime.atomic_path(tmp_path / "a"):
        pass


def test_atomic_folder_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for number in ("1", "2"):
        with runtime.atomic_folder(path) as temporary:
            (temporary / f"{number}.txt").write_text(number)
    with pytest.raises(KeyError), runtime.atomic_folder(path) as temporary:
        (temporary / "3.txt").write_text("3")
        raise KeyError("stop")
    assert [file.name for file in path.iterdir()] == ["2.txt"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device")]
)
@pytest.mark.parametrize("writer", [runtime.atomic_path, runtime.atomic_folder])
def test_full_disk_is_one_clear_line(tmp_path: Path, writer: Any, error: Exception) -> None:
    path = tmp_path / "weights"
    with pytest.raises(RunError) as caught, writer(path):
        raise error
    assert str(caught.value) == f"{path}: the disk is full; free some space and run again, finished work is kept"
    assert list(tmp_path.iterdir()) == []


def test_really_full_device(tmp_path: Path, params_file: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with (
        pytest.raises(RunError, match="the disk is full"),
        runtime._guarded(Path("log")),
        open("/dev/full", "w") as file,
    ):
        file.write("x" * 100_000)


def test_killed_process_leaves_no_file_and_its_rest_is_swept(tmp_path: Path, params_file: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from nmlib import runtime\n"
        "with runtime.atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os._exit(9)"
    )
    target = tmp_path / "run" / "file.txt"
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == 9
    assert not target.exists()
    assert len(list(target.parent.iterdir())) == 1
    Run.open(params_file, folder=tmp_path / "run")
    assert [file.name for file in target.parent.iterdir()] == ["params.yaml"]


def test_folder_caught_while_being_replaced_comes_back(tmp_path: Path, params_file: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    old = tmp_path / "run" / f".tmp-{gone.pid}@{runtime._HOST}-model.old"
    old.mkdir(parents=True)
    (old / "weights").write_text("whole")
    Run.open(params_file, folder=tmp_path / "run")
    assert (tmp_path / "run" / "model" / "weights").read_text() == "whole"


def test_only_what_dead_processes_of_this_host_left_is_swept(tmp_path: Path, params_file: Path) -> None:
    """On a disk that hosts share, a process of another host looks dead."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder, here, writer = tmp_path / "run", runtime._HOST, os.getpid()
    stay = [f"{writer}@{here}-a.txt", f"{gone.pid}@not_{here}-a.txt", f"{gone.pid}@{here}2-a.txt", f"{gone.pid}-a.txt"]
    for owned in [*stay, f"{gone.pid}@{here}-a.txt", f"{gone.pid}@{here}-a@{here}-b.txt"]:
        (folder / "deep" / f".tmp-{owned}").mkdir(parents=True)
        (folder / f".tmp-{owned}").write_text("half")
    Run.open(params_file, folder=folder)
    names = {f".tmp-{owned}" for owned in stay}
    assert {path.name for path in folder.iterdir()} == {"params.yaml", "deep", *names}
    assert {path.name for path in (folder / "deep").iterdir()} == names
    assert all(runtime.is_temporary(Path(name)) for name in names)


def test_temporary_names_say_their_process_and_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime._HOST.replace("_", "").isalnum(), "nothing that a file name may not hold, or that ends the host"
    monkeypatch.setattr(runtime, "_HOST", "other")
    for writer in (runtime.atomic_path, runtime.atomic_folder):
        with pytest.raises(KeyError), writer(tmp_path / "model") as temporary:
            assert temporary.name == f".tmp-{os.getpid()}@other-model" and runtime.is_temporary(temporary)
            assert temporary.suffix == ""
            raise KeyError("stop")


def test_json_round_trip_and_clear_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    runtime.write_json(path, {"ü": [1, 2.5, None]})
    assert runtime.read_json(path) == {"ü": [1, 2.5, None]}
    path.write_text(path.read_text()[:8], encoding="utf-8")
    with pytest.raises(RunError, match=r"a\.json: not complete JSON .*; delete it and run the step that makes it"):
        runtime.read_json(path)
    with pytest.raises(RunError, match=r"b\.json: cannot be read \(No such file or directory\)"):
        runtime.read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        runtime.write_json(path, float("nan"))


def test_run_folder(tmp_path: Path, params_file: Path) -> None:
    run = Run.open(params_file, root=tmp_path / "runs")
    assert run.folder == tmp_path / "runs" / "tiny"
    assert config.load(run.path("params.yaml")) == run.params
    assert run.digest == config.digest(run.params)
    assert run.path("a", "b.txt").parent.is_dir()
    run.log("start", step=1)
    run.log("end")
    rows = [json.loads(line) for line in run.path("log.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["start", "end"]
    assert rows[0]["step"] == 1


def test_progress_is_plain_text_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(runtime.progress(range(3), desc="counting")) == [0, 1, 2]
    assert "counting: 100%" in stream.getvalue()
    assert "3/3" in stream.getvalue()


def test_library_imports_follow_every_kind_of_import() -> None:
    source = "import nmlib.world\nfrom nmlib import config as c\ndef f():\n    from nmlib.records import table\n"
    assert runtime.imported_modules(source) == ("config", "records", "world")
    assert runtime.library_imports("records") == ["config", "extra_settings", "records", "runtime", "settings"]
    assert runtime.library_digest("records") == runtime.library_digest("runtime", "records")
    assert runtime.library_digest("records") != runtime.library_digest("runtime")


def test_attention_stays_off_cudnn() -> None:
    """Its gradients are not numbers for some lengths under a mask (pytorch issue 196678)."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
