"""The static book in a real Chromium, with no host in reach but loopback: its pages, and the explorers on them."""

import base64
import re
import shutil
from pathlib import Path

import chromium
import nbformat
import pytest
import yaml
from chromium import DESKTOP, FRONT_BYTES, PHONE, Site, check_page
from conftest import write_notebook
from nbformat.v4 import new_code_cell, new_output
from playwright.sync_api import expect
from test_browser import current, explorers, large

from nmlib import book, claims, plots
from nmlib.explorers import Explorer
from nmlib.records import write_record
from nmlib.runtime import Run

ROOT = Path(__file__).parent.parent
pytestmark = chromium.needs_chromium


def shown(explorer: Explorer) -> nbformat.NotebookNode:
    """A cell as a run leaves it, tagged for the first page, which takes the last of them."""
    output = new_output("execute_result", data={"text/html": explorer.html()}, execution_count=1)
    return new_code_cell("explorer", outputs=[output], metadata={"tags": ["front-page"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of one chapter, with the real pages around it and all explorers in it."""
    root = tmp_path_factory.mktemp("book")
    shutil.copytree(
        ROOT / "book", root / "book", ignore=shutil.ignore_patterns("chapters", "generated", "results", "api")
    )
    shutil.copy(ROOT / "_config.yml", root)
    toc = yaml.safe_load((root / "book" / "_toc.yml").read_text())
    toc["parts"] = [part for part in toc["parts"] if part["caption"] not in ("Chapters", "Library")]
    (root / "book" / "_toc.yml").write_text(yaml.safe_dump(toc))
    for page in (root / "book").glob("*.md"):
        page.write_text(re.sub(r"\{doc\}(`(chapters|api)/(?!00))", r"\1", page.read_text()))
    run = Run.open(ROOT / "params" / "smoke.yaml", root / "runs" / "smoke")
    for id_ in {id_ for claim in claims.CLAIMS for id_ in claim.ids}:
        write_record(run, id_, 0.5, n=3, modules=("runtime",))
    executed = run.path("chapters", "00_tour.ipynb")
    for path in (root / "notebooks" / "00_tour.ipynb", executed):
        write_notebook(path, "A conversation that remembers", "1 + 1")
    talk, _, drift, identity = explorers()
    notebook = nbformat.read(executed, as_version=4)
    picture = base64.b64encode(plots.Figure().png()).decode()
    notebook.cells += [shown(drift), shown(identity), shown(talk)]
    notebook.cells[-1].outputs.insert(0, new_output("display_data", data={"image/png": picture}))
    nbformat.write(notebook, executed)
    return book.build_book(root, run, strict=True).parent


def test_a_reader_undoes_something_on_the_first_page(site: Site) -> None:
    page, sizes = site.page(width=DESKTOP), []
    page.on("response", lambda response: sizes.append(len(response.body())))
    page.goto(f"{site.address}/index.html", wait_until="networkidle")
    expect(page.get_by_role("img", name="Three rows of pictures of one conversation")).to_be_visible()
    expect(page.locator("article")).to_contain_text("in 0.50 of held-out conversations")
    talk = page.locator(".nm-conversation")
    assert current(talk) == "#2b"
    before = large(talk)
    talk.get_by_role("button", name="Undo", exact=True).click()
    assert current(talk) == "#1" and large(talk) != before
    expect(talk.get_by_role("status")).to_contain_text("bit for bit")
    assert sum(sizes) < FRONT_BYTES


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_explorers_of_a_chapter_answer_in_both_themes(site: Site, theme: str) -> None:
    page = site.open("chapters/00_tour.html", width=DESKTOP, theme=theme)
    talk, drift, identity = (page.locator(f".nm-{name}") for name in ("conversation", "drift", "identity"))
    talk.get_by_role("button", name="Picture #1").click()
    talk.get_by_label("What was said to #1").select_option("make the square red")
    talk.get_by_role("button", name="Branch from #1").click()
    assert current(talk) == "#2"
    drift.get_by_role("slider").press("ArrowLeft")
    expect(drift.locator(".nm-status")).to_contain_text("Round 1")
    identity.locator("[data-key=stage-joint]").click()
    expect(identity.locator("figure[data-stage]")).to_have_attribute("data-stage", "joint")
    paper = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[theme]
    assert drift.evaluate("node => getComputedStyle(node).backgroundColor") == paper
    around = page.locator(".cell_output .text_html").first.evaluate("node => getComputedStyle(node).backgroundColor")
    assert around == "rgba(0, 0, 0, 0)", "no frame of another colour around the demo"


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_pages_fit(site: Site, width: int) -> None:
    page = site.page(width=width)
    for name in ("index", "chapters/00_tour", "generated/claims", "log", "notation"):
        page.goto(f"{site.address}/{name}.html")
        check_page(page, width)
