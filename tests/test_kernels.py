"""Kernels that wait: imported before they are asked, with nothing left behind."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
from nbclient import NotebookClient

from nmlib.kernels import Kernel, Kernels


def answers(kernel: Kernel, folder: Path, code: str) -> str:
    """What a cell prints."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    done: Any = NotebookClient(notebook, km=kernel, resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(output["text"] for output in done.cells[0]["outputs"]).strip()


def test_a_kernel_that_waited_has_imported_and_is_otherwise_fresh(tmp_path: Path) -> None:
    with Kernels(tmp_path) as kernels:
        kernels.prepare(["phrases", "names"])
        kernels.prepare(["names"])  # one waits already
        kernel = kernels.take()
        code = """
import os, sys
print(sorted(name for name in sys.modules if name in ("nmlib.phrases", "nmlib.names", "nmlib.mllm")))
print(sorted(globals()), Out, get_ipython().history_manager.hist_file, os.environ["HF_HUB_OFFLINE"], sys.executable)
print(os.getcwd())
"""
        plain = kernels.take()
        told, fresh = answers(kernel, tmp_path, code), answers(plain, tmp_path, code)
        assert told.splitlines()[0] == "['nmlib.names', 'nmlib.phrases']" and fresh.splitlines()[0] == "[]"
        assert told.splitlines()[1] == fresh.splitlines()[1], "importing left a name behind"
        assert ":memory: 1 " + sys.executable in told and told.splitlines()[2] == os.path.realpath(tmp_path)
        found = [psutil.Process(one.pid) for one in (kernel, plain)]
        kernel.stop()
        kernel.stop()  # nothing is left to do
        assert [one.is_running() for one in found] == [False, True]
    assert not found[1].is_running(), "the block ends with none left, taken or not"


def test_a_kernel_that_died_while_it_waited_is_not_taken(tmp_path: Path) -> None:
    with Kernels(tmp_path) as kernels:
        kernels.prepare([])
        waiting = kernels._waiting
        assert waiting is not None
        psutil.Process(waiting.pid).kill()
        while waiting.lives():  # until the system has taken note
            time.sleep(0.01)
        taken = kernels.take()
        assert taken is not waiting and answers(taken, tmp_path, "print(6 * 7)") == "42"


def test_none_is_left_that_nobody_took(tmp_path: Path) -> None:
    with Kernels(tmp_path) as kernels:
        kernels.prepare([])
        waiting = kernels._waiting
        assert waiting is not None
        found = psutil.Process(waiting.pid)
        assert found.is_running()
    assert not found.is_running()
