"""Every page of the book that was built, where one was: nothing is too wide, every picture is there and described."""

from pathlib import Path

import chromium
import pytest
from chromium import DESKTOP, PHONE, check_page

BUILT = Path(__file__).parent.parent / "_build" / "html"
pytestmark = chromium.needs_chromium


@pytest.mark.skipif(not BUILT.is_dir(), reason="no book found; build one with `make book PARAMS=smoke`")
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_every_page_of_the_book_that_was_built_fits(width: int) -> None:
    with chromium.served(BUILT) as site:
        page = site.page(width=width)
        for path in sorted(BUILT.glob("chapters/*.html")) + sorted(BUILT.glob("*.html")):
            page.goto(f"{site.address}/{path.relative_to(BUILT)}")
            check_page(page, width)
        site.finish()
