"""Notebooks teach: short cells, more prose than code, no outputs, nothing that ties them to one machine."""

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from nmlib import measured

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


@each_notebook
def test_first_cell_says_what_it_needs_and_how_to_get_it(path: Path) -> None:
    notebook = read(path)
    _, found, text = notebook.cells[0].source.partition("**To run it alone**")
    assert found and "`make env`" in text and "`make lab`" in text
    needs = notebook.metadata["nmlib"]["needs"]
    assert re.findall(r"\b\d\d\b", text) == needs
    assert ("nmlib run --params smoke" in text) == bool(needs)


@pytest.mark.parametrize("number", ["00", "04", "05", "06", "08", "09", "10", "11"])
def test_without_what_it_needs_a_notebook_says_so_in_one_line(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = [path for path in NOTEBOOKS if path.stem.startswith(number)]
    monkeypatch.chdir(path.parent)
    names: dict[str, Any] = {}
    with pytest.raises((RuntimeError, ValueError), match=r"no such .*; run the notebook that ") as caught:
        for cell in code_cells(path):
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names["run"] = str(tmp_path)
    assert type(caught.value).__module__.startswith("nmlib.")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@each_notebook
def test_every_exercise_has_a_hidden_solution(path: Path) -> None:
    asked, answered = [cell.source for cell in read(path).cells[-2:]]
    exercises = re.findall(r"(?m)^(\d+)\. ", asked.partition("## Exercises")[2])
    solutions = re.findall(r"(?m)^:::\{dropdown\} Solution (\d+)\n(?s:.+?)\n:::$", answered)
    assert exercises == solutions == [str(number + 1) for number in range(len(exercises))] != []


def shows_a_figure(cell: Any) -> bool:
    """Whether the last line of a cell calls a function that draws."""
    body = ast.parse(cell.source).body
    call = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    module, _, name = ast.unparse(call.func).partition(".") if isinstance(call, ast.Call) else ("", "", "")
    return module in {"plots", "diagrams", "speed_plots"} and name != "about"


@each_notebook
def test_figures_are_numbered_and_say_what_to_see(path: Path) -> None:
    names = []
    for cell in code_cells(path):
        shown = cell.metadata.get("mystnb", {})
        if not shows_a_figure(cell) and not shown:
            continue
        assert shown["figure"]["name"].startswith("fig-"), cell.source
        names.append(shown["figure"]["name"])
        caption, words = shown["figure"]["caption"], shown.get("image", {}).get("alt", "")
        assert len(caption.split()) >= 12 and caption.endswith((".", "?")), f"say what to see in {caption!r}"
        assert measured.typed(caption) == [], "a figure shows a run: its caption holds for every run"
        assert len(words.split()) >= 5, f"describe {names[-1]} in words for those who cannot see it"
    assert len(set(names)) == len(names)
