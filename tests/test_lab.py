"""The conversation explorer in JupyterLab: a real kernel answers what is clicked and typed in a real browser."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import chromium
import pytest
from nbformat import write
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, expect

TESTS = Path(__file__).parent
pytestmark = [
    chromium.needs_chromium,
    pytest.mark.skipif(find_spec("jupyterlab") is None, reason="no JupyterLab found; install it with `make env`"),
]
CELL = """\
from test_explorers import session

from nmlib.explorers import ConversationExplorer
from nmlib.recordings import SessionRecorder

ConversationExplorer(
    [SessionRecorder(session(), "first", suggestions=["undo that"]), SessionRecorder(session(), "second")]
)"""
# A cell that is run before the kernel answers is not run at all, and the notebook's own sign says idle before that.
KERNEL_ANSWERS = """async () => {
    const context = window.jupyterapp.shell.currentWidget.sessionContext
    await context.ready
    await context.session.kernel.info
}"""
OTHERS = """\
from IPython.display import display
from test_browser import explorers

from nmlib.explorers import controls

for explorer in [*explorers()[2:], controls(stage=("rollback", "markov"))]:
    display(explorer)"""
COUNT = "[len(recorder.session.tokens) for recorder in _._recorders]"  # `_` is the explorer of the cell before


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(port: int, folder: Path) -> list[str]:
    """JupyterLab without a token, for a port of loopback that is gone with the test; it asks no other host for news."""
    return [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
        "--IdentityProvider.token=", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab whose folder holds `live.ipynb`."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [
        new_code_cell(CELL, id="explorer"),
        new_code_cell(COUNT, id="count"),
        new_code_cell(OTHERS, id="others"),
    ]
    write(new_notebook(cells=cells, metadata=kernel), tmp_path / "live.ipynb")
    places = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "RUNTIME")}
    found = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = os.environ | places | {"PYTHONPATH": found, "IPYTHONDIR": str(tmp_path / "ipython")}
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen(command(port, tmp_path), env=environment, cwd=tmp_path, stdout=log, stderr=log)
        try:
            wait_for(f"{address}/api", server, tmp_path / "log.txt")
            yield address
        finally:
            server.terminate()
            server.wait(chromium.SECONDS)


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return when a server answers.

    Raises:
        AssertionError: it ended, or was not up in time.
    """
    end = time.monotonic() + chromium.SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab does not answer at {address}:\n{log.read_text()[-2000:]}")


def use_the_others(cell: Locator) -> None:
    """Click through drift and identity, and set what plain controls set."""
    drift = cell.locator(".nm-drift")
    expect(drift.get_by_role("slider")).to_have_value("2")
    for key, round_ in (("ArrowLeft", "Round 1"), ("ArrowRight", "Round 2"), ("Home", "Round 0"), ("End", "Round 2")):
        drift.get_by_role("slider").press(key)
        expect(drift.locator(".nm-status")).to_contain_text(round_)
        expect(drift.locator("img").first).to_have_attribute("alt", f"truth, {round_.lower()}")
    cell.locator(".nm-identity [data-key=stage-joint]").click()
    expect(cell.locator(".nm-identity figure[data-stage]")).to_have_attribute("data-stage", "joint")
    choice = cell.locator(".widget-dropdown select")
    choice.select_option("markov")
    expect(choice).to_have_value("markov")


def test_a_notebook_is_talked_to(lab: str) -> None:
    with chromium.opened(lab) as site:
        page = site.open("lab/tree/live.ipynb", width=1300)
        expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(3)
        page.evaluate(KERNEL_ANSWERS)
        page.locator(".jp-Cell").nth(0).locator(".jp-InputArea-editor").click()
        run = "name => window.jupyterapp.commands.execute(name)"
        page.evaluate(run, "notebook:run-cell-and-select-next")
        live = page.locator(".jp-OutputArea-output .nm-conversation")
        expect(live).to_have_count(1)
        chromium.talk(live)
        page.locator(".jp-Cell").nth(1).locator(".jp-InputArea-editor").click()
        page.evaluate(run, "notebook:run-cell")
        expect(page.locator(".jp-Cell").nth(1).locator(".jp-OutputArea-output")).to_have_text("[5, 1]")
        page.locator(".jp-Cell").nth(2).locator(".jp-InputArea-editor").click()
        page.evaluate(run, "notebook:run-cell")
        use_the_others(page.locator(".jp-Cell").nth(2))
        site.finish()
