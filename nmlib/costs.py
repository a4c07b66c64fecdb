"""Where the minutes of the book go: by notebook, and by what of the library a cell calls.

Every executed notebook says how long each of its cells took. A notebook that found its work done took little the last
time; for what everything costs, run the book in an empty folder.
"""

import ast
from pathlib import Path

import nbformat
import pandas as pd

from nmlib import runtime
from nmlib.runtime import Run

COLUMNS = ("notebook", "cell", "calls", "minutes")


def cell_table(run: Run) -> pd.DataFrame:
    """What every cell of the executed notebooks cost.

    Returns:
        One row for each cell that ran, with `notebook`, `cell` (its number from 1), `calls` (what of the library it
        calls, in alphabetical order) and `minutes`; empty where nothing has run yet.
    """
    files = sorted((run.folder / "chapters").glob("*.ipynb"))
    rows = [row for file in files if not runtime.is_temporary(file.relative_to(run.folder)) for row in _cells(file)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _cells(file: Path) -> list[tuple[str, int, str, float]]:
    try:
        notebook = nbformat.read(file, as_version=4)
    except ValueError:  # a damaged one runs again, and says nothing until then
        return []
    known: dict[str, str] = {}
    rows = []
    for number, cell in enumerate(notebook.cells, 1):
        seconds = cell.metadata.get("papermill", {}).get("duration")
        if cell.cell_type == "code" and seconds is not None:
            calls = ", ".join(library_calls(cell.source, known))
            rows.append((file.stem, number, calls, float(seconds) / 60))
    return rows


def library_calls(source: str, known: dict[str, str]) -> list[str]:
    """Names such as `quality.probe_table` that a cell calls, sorted.

    Args:
        source: of the cell; lines that are no Python call nothing.
        known: names that earlier cells imported from the library and what they stand for; extended by this cell's.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "nmlib":
            above = (node.module or "").removeprefix("nmlib").removeprefix(".")
            for name in node.names:
                known[name.asname or name.name] = f"{above}.{name.name}" if above else name.name
    functions = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return sorted({found for function in functions if (found := _full_name(function, known))})


def _full_name(function: ast.expr, known: dict[str, str]) -> str | None:
    if isinstance(function, ast.Name):
        return known.get(function.id)
    if isinstance(function, ast.Attribute):
        above = _full_name(function.value, known)
        return f"{above}.{function.attr}" if above else None
    return None


def by_notebook(table: pd.DataFrame) -> pd.DataFrame:
    """Minutes of each notebook and of its costliest cell, with what that cell calls; the costliest notebook first.

    Args:
        table: of `cell_table`.
    """
    rows = []
    for notebook, part in table.groupby("notebook"):
        most = part.loc[part["minutes"].idxmax()]
        row = {"notebook": notebook, "minutes": part["minutes"].sum()}
        rows.append(row | {"costliest cell": most["minutes"], "it calls": most["calls"]})
    columns = ["notebook", "minutes", "costliest cell", "it calls"]
    return pd.DataFrame(rows, columns=columns).sort_values("minutes", ascending=False, ignore_index=True)


def save(run: Run) -> None:
    """Write `cell_table` to `minutes.csv` in the run's folder, the costliest cell first, whole or not at all."""
    table = cell_table(run).sort_values("minutes", ascending=False)
    with runtime.atomic_path(run.path("minutes.csv")) as temporary:
        table.round({"minutes": 4}).to_csv(temporary, index=False)
