"""The book that was built, where one was: its weight, every page, and its explorers with the pictures of a run."""

from pathlib import Path

import chromium
import pytest
from chromium import DESKTOP, FRONT_BYTES, PHONE, check_page
from playwright.sync_api import expect
from test_browser import current, large

BUILT = Path(__file__).parent.parent / "_build" / "html"
BOOK_BYTES = 25_000_000
pytestmark = pytest.mark.skipif(not BUILT.is_dir(), reason="no book found; build one with `make book PARAMS=smoke`")


def test_the_book_is_light() -> None:
    assert sum(file.stat().st_size for file in BUILT.rglob("*") if file.is_file()) < BOOK_BYTES


@chromium.needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_every_page_of_the_book_that_was_built_fits(width: int, theme: str) -> None:
    with chromium.served(BUILT) as site:
        page = site.page(width=width, theme=theme)
        for path in sorted(BUILT.glob("chapters/*.html")) + sorted(BUILT.glob("*.html")):
            page.goto(f"{site.address}/{path.relative_to(BUILT)}")
            check_page(page, width)
        site.finish()


@chromium.needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_its_explorers_answer_with_the_pictures_of_the_run(theme: str) -> None:
    with chromium.served(BUILT) as site:
        page, sizes = site.page(width=DESKTOP, theme=theme), list[int]()
        page.on("response", lambda response: sizes.append(len(response.body())))
        page.goto(f"{site.address}/index.html", wait_until="networkidle")
        assert sum(sizes) < FRONT_BYTES
        talk = page.locator(".nm-conversation")
        here, seen = current(talk), large(talk)
        talk.get_by_role("button", name="Undo", exact=True).click()
        assert current(talk) != here and large(talk) != seen
        talk.get_by_role("button", name="Picture #1:").click()
        talk.get_by_role("button", name="Branch from #1").click()
        assert current(talk) not in (here, "#1"), "a recorded answer to the first picture"

        page.goto(f"{site.address}/chapters/06_evaluation.html")
        drift = page.locator(".nm-drift")
        slider, pictures = drift.get_by_role("slider"), drift.locator("img")
        slider.press("Home")
        first = pictures.first.get_attribute("src")
        slider.press("End")
        expect(pictures.first).not_to_have_attribute("src", str(first))

        page.goto(f"{site.address}/chapters/11_people_evaluation.html")
        stages = page.locator(".nm-identity [data-key^=stage-]")
        if stages.count() == 0:
            expect(page.locator("article")).to_contain_text("Build the book of other params")
        else:
            assert stages.count() >= 5, "base, portrait, three stages and what they are compared with"
        shown = page.locator(".nm-identity figure[data-stage]")
        for stage in stages.all()[:3]:
            stage.click()
            key = str(stage.get_attribute("data-key")).removeprefix("stage-")
            expect(shown).to_have_attribute("data-stage", key)
        site.finish()
