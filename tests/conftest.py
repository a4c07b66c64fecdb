"""What several test files share: valid settings of the smallest size, and a project of two tiny notebooks."""

import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import nbformat
import pytest
import torch
import yaml
from chromium import Site

from nmlib import runtime

SMOKE = Path(__file__).parent.parent / "params" / "smoke.yaml"

FIRST = """\
from pathlib import Path

from nmlib.records import write_record
from nmlib.runtime import Run, progress

opened = Run.open(params, folder=run)
for _ in progress(range(3), desc="counting"):
    pass
opened.path("numbers", "one.txt").write_text("1")
write_record(opened, "tiny.one", 1.0, n=1, modules=["runtime"])
print("made one")
"""
SECOND = """\
from pathlib import Path

one = Path(run, "numbers", "one.txt").read_text()
Path(run, "two.txt").write_text(str(int(one) + 1))
"""


def write_notebook(path: Path, title: str, code: str) -> None:
    """Write a notebook with a title, a cell of parameters and one cell of code."""
    cells = [
        nbformat.v4.new_markdown_cell(f"# {title}"),
        nbformat.v4.new_code_cell(
            'params = "../params/tiny.yaml"\nrun = "../runs/tiny"', metadata={"tags": ["parameters", "remove-cell"]}
        ),
        nbformat.v4.new_code_cell(code),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Site]:
    """Pages of the `folder` of a test file, in a browser."""
    with chromium.served(folder) as site:
        yield site


@pytest.fixture
def site(server: Site) -> Iterator[Site]:
    """The site; a test fails if its pages reported an error or asked another host."""
    yield server
    server.finish()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as those of the tests are many times faster on one thread than on two of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A mapping of valid settings named `tiny`, to be changed freely."""
    settings: dict[str, Any] = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    return settings | {"name": "tiny", "meaningful": True, "threads": 1}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of tiny squares in which everything was trained for a few steps (a `toy.Trained`); leave it as it is."""
    import toy

    torch.set_num_threads(1)
    return toy.train_everything(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def photographs(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs of two public figures, fetched once from the package index into pytest's cache."""
    folder = pytestconfig.cache.mkdir("photographs") / "test_images"
    if not folder.is_dir():
        download = tmp_path_factory.mktemp("download")
        command = "-m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all:".split()
        try:
            subprocess.run(
                [sys.executable, *command, "--dest", str(download), "face-recognition==1.3.0"],
                check=True,
                capture_output=True,
                timeout=120,
            )
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"the package index gave no photographs ({error})")
        with tarfile.open(next(download.glob("*.tar.gz"))) as archive, runtime.atomic_folder(folder) as temporary:
            for member in archive.getmembers():
                if "/test_images/" in member.name and member.isfile():
                    member.name = Path(member.name).name
                    archive.extract(member, temporary, filter="data")
    return folder


@pytest.fixture
def project_root(tmp_path: Path, tiny: dict[str, Any]) -> Path:
    """The root of a project with `params/tiny.yaml` and two notebooks, the second of which reads the first's file."""
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    write_notebook(tmp_path / "notebooks" / "01_one.ipynb", "One", FIRST)
    write_notebook(tmp_path / "notebooks" / "02_two.ipynb", "Two", SECOND)
    return tmp_path
