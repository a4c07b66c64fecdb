"""Notebooks teach: short cells, more prose than code, no outputs, nothing that ties them to one machine."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MAX_CELL_LINES, MIN_WORDS_PER_LINE = 15, 6.0
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def lines_of(cell: Any) -> list[str]:
    return [line for line in cell.source.splitlines() if line.strip()]


@each_notebook
def test_has_a_title_and_a_number(path: Path) -> None:
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")


@each_notebook
def test_outputs_are_stripped(path: Path) -> None:
    for cell in code_cells(path):
        assert cell.outputs == [], f"{path.name}: run nbstripout on it"
        assert cell.execution_count is None, f"{path.name}: run nbstripout on it"
    assert "widgets" not in read(path).metadata


@each_notebook
def test_cells_are_short(path: Path) -> None:
    for cell in code_cells(path):
        assert len(lines_of(cell)) <= MAX_CELL_LINES, f"{path.name}: {len(lines_of(cell))} lines in\n{cell.source}"


@each_notebook
def test_prose_outweighs_code(path: Path) -> None:
    words = sum(len(cell.source.split()) for cell in read(path).cells if cell.cell_type == "markdown")
    code = sum(len(lines_of(cell)) for cell in code_cells(path))
    assert words >= MIN_WORDS_PER_LINE * code, f"{path.name}: {words} words for {code} lines of code"


@each_notebook
def test_has_parameters(path: Path) -> None:
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{path.name}: expected one cell with the tag `parameters`"
    assert "remove-cell" in tagged[0].metadata["tags"]
    values: dict[str, Any] = {}
    exec(tagged[0].source, values)
    assert values["params"].startswith("../params/")
    assert values["run"].startswith("../runs/")


@each_notebook
def test_runs_anywhere(path: Path) -> None:
    for cell in code_cells(path):
        for line in cell.source.splitlines():
            assert not re.search(r"""["'](/|~|[A-Za-z]:\\)\w""", line), f"{path.name}: absolute path in {line!r}"
            assert not re.match(r"\s*[!%]\s*(pip|conda|cd)\b", line), f"{path.name}: {line!r}"
            assert "sys.path" not in line, f"{path.name}: {line!r}"
