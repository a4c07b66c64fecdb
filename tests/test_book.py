"""From executed notebooks to pages: what is hidden, what is kept, and that pages ask no other host."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import write_notebook
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from toy import raised

from nmlib import book, claims, links, measured
from nmlib.config import SeedXConfig
from nmlib.pipeline import Project
from nmlib.records import read_records, write_record
from nmlib.runtime import Run, RunError, write_json
from nmlib.steps import Step

ROOT = Path(__file__).parent.parent
VIEW = "application/vnd.jupyter.widget-view+json"


def stderr(text: str) -> nbformat.NotebookNode:
    return new_output("stream", name="stderr", text=text)


def executed(*outputs: nbformat.NotebookNode) -> nbformat.NotebookNode:
    cells = [
        new_markdown_cell("# Title\n\nWords."),
        new_code_cell("run = 1", metadata={"tags": ["parameters"]}),
        new_code_cell("run = 2", metadata={"tags": ["injected-parameters"]}),
        new_code_cell("work()", outputs=list(outputs)),
    ]
    return new_notebook(cells=cells, metadata={"widgets": {"a": 1}, "papermill": {}})


def test_parameters_are_hidden() -> None:
    notebook = executed()
    assert book.polish(notebook) == []
    assert [cell.metadata.get("tags", []) for cell in notebook.cells] == [
        [],
        ["parameters", "remove-cell"],
        ["injected-parameters", "remove-cell"],
        [],
    ]
    assert notebook.metadata == {}


def test_progress_goes_and_warnings_stay() -> None:
    bars = [
        stderr("\rtrain:   0%|          | 0/30 [00:00<?, ?it/s]"),
        stderr("\rtrain: 100%|##########| 30/30 [00:04<00:00,  6.66it/s]\nUserWarning: odd\n"),
        stderr("read: 12it [00:01, 8.00it/s]\n"),
    ]
    notebook = executed(*bars, new_output("stream", name="stdout", text="done\n"))
    assert book.polish(notebook) == ["UserWarning: odd"]
    assert [(output.name, output.text) for output in notebook.cells[-1].outputs] == [
        ("stdout", "done\n"),
        ("stderr", "UserWarning: odd\n"),
    ]


def test_live_widgets_give_way_to_their_static_version() -> None:
    both = new_output("display_data", data={VIEW: {}, "text/html": "<div>demo</div>"})
    notebook = executed(both)
    book.polish(notebook)
    assert list(notebook.cells[-1].outputs[0].data) == ["text/html"]
    assert "widgets" not in notebook.metadata
    alone = executed(new_output("display_data", data={VIEW: {}}))
    book.polish(alone)
    assert "widgets" in alone.metadata


def test_page_of_a_size_that_means_nothing_says_so() -> None:
    notebook = executed()
    book.polish(notebook, "smoke")
    assert notebook.cells[0].source.startswith("# Title\n\n:::{warning}\nThis page was built with `params/smoke.yaml`")
    assert notebook.cells[0].source.endswith("Words.")


def test_table_of_contents_is_checked(project_root: Path) -> None:
    (project_root / "book").mkdir()
    toc = project_root / "book" / "_toc.yml"
    parts = {"root": "index", "parts": [{"chapters": [{"file": "chapters/01_one"}, {"file": "log"}]}]}
    toc.write_text(yaml.safe_dump(parts))
    assert book.chapters(project_root) == ["01_one"]
    toc.write_text(toc.read_text().replace("01_one", "09_nine"))
    with pytest.raises(RunError, match=r"_toc\.yml: lists 09_nine, but notebooks/ has no such notebook"):
        book.chapters(project_root)


@pytest.fixture
def book_root(project_root: Path) -> Path:
    """A project with the real pages around two executed chapters."""
    pages = project_root / "book"
    shutil.copytree(ROOT / "book", pages, ignore=shutil.ignore_patterns("chapters", "generated", "results", "api"))
    shutil.copy(ROOT / "_config.yml", project_root)
    toc = yaml.safe_load((pages / "_toc.yml").read_text())
    toc["parts"] = [part for part in toc["parts"] if part["caption"] not in ("Begin here", "Library")]
    toc["parts"][0]["chapters"] = [{"file": "chapters/01_one"}, {"file": "chapters/02_two"}]
    (pages / "_toc.yml").write_text(yaml.safe_dump(toc))
    for page in pages.glob("*.md"):
        page.write_text(re.sub(r"\{doc\}(`(chapters|api)/)", r"\1", page.read_text()))
    for name in ("01_one", "02_two"):
        write_notebook(project_root / "runs" / "tiny" / "chapters" / f"{name}.ipynb", f"Title of {name}", "1 + 1")
    return project_root


def test_book_builds_and_asks_no_other_host(book_root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Project(book_root).open("tiny")
    with pytest.raises(RunError, match=r"claims: record 'rollback\.accuracy\.depth1\.markov_trained' is missing"):
        book.build_book(book_root, run, strict=True)
    for id_ in {id_ for claim in claims.CLAIMS for id_ in claim.ids}:
        write_record(run, id_, 0.5, n=3, modules=("runtime",))
    rows = {id_: record.model_dump(mode="json", exclude={"id"}) for id_, record in read_records(run).items()}
    (book_root / "book" / "results").mkdir()
    write_json(book_root / "book" / "results" / "people.json", rows)
    page = book.build_book(book_root, run, strict=True)
    assert page.exists()
    html = page.parent
    shown = (html / "generated" / "results.html").read_text(encoding="utf-8")
    assert "Published run of" in shown and shown.count("people.identity.stage123") == 2
    judged = (html / "generated" / "claims.html").read_text(encoding="utf-8")
    assert judged.count("Published run of") == sum(claim.sizes == ("people",) for claim in claims.CLAIMS)
    assert (html / "_static" / "mathjax" / "tex-mml-chtml.js").exists()
    assert list((html / "_static" / "mathjax" / "output" / "chtml" / "fonts" / "woff-v2").glob("*.woff"))
    for name in ("01_one", "02_two"):
        downloaded = html / "_sources" / "chapters" / f"{name}.ipynb"
        assert downloaded.read_bytes() == (book_root / "notebooks" / f"{name}.ipynb").read_bytes()
    for file in html.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        foreign = re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["'](?:https?:)?//[^"']*""", text)
        assert foreign == [], file
    chapter = (html / "chapters" / "01_one.html").read_text(encoding="utf-8")
    assert "Title of 01_one" in chapter
    assert "../runs/tiny" not in chapter
    assert 'rel="icon"' in chapter


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text('<p id="x"><a href="sub/b.html#y"></a><a href="#x"></a><a href="http://c/d"></a>')
    (tmp_path / "sub" / "b.html").write_text('<p id="y"><a href="../a.html"></a><img src="../no.png">')
    assert links.broken_links(tmp_path) == ["sub/b.html: ../no.png"]
    (tmp_path / "a.html").write_text('<p id="x"><a href="sub/b.html#z"></a><a href="#y"></a>')
    assert links.broken_links(tmp_path) == ["a.html: sub/b.html#z", "a.html: #y", "sub/b.html: ../no.png"]


def test_plain_docstrings_of_modules_become_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))
    from docstrings import separate_blocks

    lines = ["What it is:", "- one,", "  two;", "- three.", "Then:", "", "    x = 1", "", "End."]
    separate_blocks(None, "module", "", None, None, lines)
    assert lines == [
        "What it is:", "", "- one,", "  two;", "- three.", "", "Then::", "", "    x = 1", "", "End.",
    ]  # fmt: skip
    plain = ["- one", "two"]
    separate_blocks(None, "function", "", None, None, plain)
    assert plain == ["- one", "two"]


def test_every_module_is_on_one_page_of_the_api_and_every_page_is_listed() -> None:
    pages = {file.stem: file.read_text(encoding="utf-8") for file in (ROOT / "book" / "api").glob("*.md")}
    listed = re.findall(r"automodule:: nmlib\.(\w+)", "\n".join(pages.values()))
    modules = {file.stem for file in (ROOT / "nmlib").glob("*.py")} - {"__init__", "__main__"}
    assert sorted(listed) == sorted(modules), "give each module a section on one page of book/api/"
    toc = (ROOT / "book" / "_toc.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"file: api/(\w+)", toc)) == set(pages)
    for page, modules_named in re.findall(r"^\| \{doc\}`(\w+)` \|.*\| (.*) \|$", pages.pop("index"), re.MULTILINE):
        shown = re.findall(r"^## `(\w+)`", pages.pop(page), re.MULTILINE)
        assert re.findall(r"`(\w+)`", modules_named) == shown, f"book/api/index.md: modules of {page}"
    assert pages == {}


def test_a_chapter_is_lent_by_a_run_that_executed_it(project_root: Path) -> None:
    lender = Project(project_root).open("tiny")
    run = Run(lender.params.model_copy(update={"people": {}, "name": "own"}), project_root / "runs" / "own")
    step = Step(project_root / "notebooks" / "01_one.ipynb", "", "", (), about="people")
    assert book.lender_of(step, run) is None
    write_notebook(lender.path("chapters", "01_one.ipynb"), "Title", "1 + 1")
    found = book.lender_of(step, run)
    assert found is not None and found.name == "tiny"
    assert book.lender_of(step, lender) is None, "nobody lends to itself"
    params = lender.path("params.yaml")
    raw = yaml.safe_load(params.read_text())
    for lends, shows in ((True, True), (True, False), (False, False), (False, True)):
        params.write_text(yaml.safe_dump(raw | {"meaningful": lends}))
        found = book.lender_of(step, Run(run.params.model_copy(update={"meaningful": shows}), run.folder))
        assert (found is not None) == (lends or not shows), "what means nothing is not shown among what does"
    params.write_text("name: [")
    assert book.lender_of(step, run) is None, "a params file of an earlier version"


def test_a_chapter_that_is_lent_reads_the_numbers_of_its_own_run(book_root: Path) -> None:
    words = "Of {measured}`a.b_c` and {measured-value}`a.b:.3f`, not of {measured}`cpu:a.b`."
    notebook = executed()
    notebook.cells.append(new_markdown_cell(words))
    book.lend(notebook, "people", "Whose this is.")
    assert notebook.cells[0].source.startswith("# Title\n\n:::{note}\nWhose this is.\n:::")
    read = "Of {measured}`lent_people:a.b_c` and {measured-value}`lent_people:a.b:.3f`, not of {measured}`cpu:a.b`."
    assert notebook.cells[-1].source == read
    run = Project(book_root).open("tiny")
    write_record(run, "a.b", 0.125, n=3, modules=("runtime",))
    pages, found = book_root / "book", read_records(run)
    for id_ in {id_ for claim in claims.CLAIMS for id_ in claim.ids}:
        write_record(run, id_, 0.5, n=3, modules=("runtime",))
    book._write_generated(pages / "generated", run, pages / "results", {"lent_people": found})
    assert measured.look_up("lent_people:a.b:.3f", pages) == (found["a.b"], 3)
    text = raised(lambda: measured.look_up("lent_people:c.d", pages), RunError)
    assert text == "record 'c.d' is missing in generated/lent_people.json; run the notebook that measures it"


def test_strict_book_refuses_a_warning(book_root: Path) -> None:
    path = book_root / "runs" / "tiny" / "chapters" / "01_one.ipynb"
    notebook = executed(stderr("UserWarning: odd\n"))
    nbformat.write(notebook, path)
    with pytest.raises(RunError, match="1 warnings of notebooks; first: 01_one: UserWarning: odd"):
        book.build_book(book_root, Project(book_root).open("tiny"), strict=True)


def test_a_chapter_about_what_a_run_has_not_is_a_note(project_root: Path, tmp_path: Path) -> None:
    run = Project(project_root).open("tiny")
    step = Step(project_root / "notebooks" / "01_one.ipynb", "", "", (), about="people")
    assert step.applies(run.params) and not step.applies(run.params.model_copy(update={"people": {}}))
    book.write_absent(step, run, tmp_path / "01_one.ipynb")
    question, note = nbformat.read(tmp_path / "01_one.ipynb", as_version=4).cells
    assert question.source.startswith("# ") and "is about `people`, and `params/tiny.yaml` has none" in note.source
    seedx = Run(run.params.model_copy(update={"seedx": SeedXConfig()}), run.folder)
    small = Step(step.path, "", "", ())
    assert small.applies(run.params) and not small.applies(seedx.params)
    book.write_absent(small, seedx, tmp_path / "01_one.ipynb")
    _, note = nbformat.read(tmp_path / "01_one.ipynb", as_version=4).cells
    assert "is about the small model, and `params/tiny.yaml` describes SEED-X" in note.source
