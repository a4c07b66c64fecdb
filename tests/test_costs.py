"""Where the minutes go: what a cell calls, what it took, and what is costliest."""

from pathlib import Path

import nbformat
import pandas as pd
import pytest
from toy import open_run

from nmlib import costs
from nmlib.runtime import Run


def write_chapter(run: Run, name: str, cells: list[tuple[str, float | None]]) -> None:
    """An executed notebook: code and how many seconds it took, None where it did not run; a text stands first."""
    made = [nbformat.v4.new_markdown_cell("# A title", metadata={"papermill": {"duration": 9.0}})]
    for source, seconds in cells:
        taken = {} if seconds is None else {"papermill": {"duration": seconds}}
        made.append(nbformat.v4.new_code_cell(source, metadata=taken))
    nbformat.write(nbformat.v4.new_notebook(cells=made), run.path("chapters", f"{name}.ipynb"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    opened = open_run(tmp_path)
    write_chapter(
        opened,
        "03_parts",
        [
            ("from nmlib import codec, quality as q\nfrom nmlib.runtime import Run\nRun.open(params)", 6.0),
            ("q.probe_table(len([1]))\ncodec.load(q.probe_table(1)).decode(2)", 120.0),
            ("print(codec)", 3.0),
            ("%%time\nq.probe_table()", 3.0),
            ("q.never()", None),
        ],
    )
    write_chapter(opened, "04_more", [("q.probe_table()", 60.0)])
    opened.path("chapters", "05_damaged.ipynb").write_text("no notebook")
    return opened


def test_every_cell_with_what_it_calls(run: Run) -> None:
    table = costs.cell_table(run)
    assert list(table.itertuples(index=False, name=None)) == [
        ("03_parts", 2, "runtime.Run.open", 0.1),
        ("03_parts", 3, "codec.load, quality.probe_table", 2.0),
        ("03_parts", 4, "", 0.05),
        ("03_parts", 5, "", 0.05),
        ("04_more", 2, "", 1.0),  # `q` is another notebook's
    ]


def test_notebooks_by_their_minutes(run: Run) -> None:
    table = costs.by_notebook(costs.cell_table(run))
    assert table["notebook"].tolist() == ["03_parts", "04_more"]
    assert table["minutes"].tolist() == pytest.approx([2.2, 1.0])
    assert table["it calls"].tolist() == ["codec.load, quality.probe_table", ""]


def test_the_file_has_the_costliest_first_and_an_empty_run_has_none(run: Run, tmp_path: Path) -> None:
    costs.save(run)
    assert pd.read_csv(run.path("minutes.csv"))["minutes"].tolist() == [2.0, 1.0, 0.1, 0.05, 0.05]
    empty = costs.cell_table(open_run(tmp_path / "other"))
    assert len(empty) == 0 and len(costs.by_notebook(empty)) == 0
