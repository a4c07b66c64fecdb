"""A real Chromium for tests, whose pages can reach no host but loopback."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run",
    "--disable-sync",
]  # fmt: skip
PHONE, DESKTOP = 390, 1440  # pixels
FRONT_BYTES = 2_000_000  # most that the first page may load
SECONDS = 60  # to wait for what should take one: a busy machine is slow, not wrong
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium found; install one, on Debian with `apt-get install chromium`"
)


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Site:
    """A server on loopback, and pages of it that may ask nobody else.

    Args:
        browser: opens the pages.
        address: of the server, without a slash at the end.
    """

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser, self.address = browser, address
        self.faults: list[str] = []

    def _route(self, route: Route) -> None:
        if route.request.url.startswith((self.address, "data:", "blob:")):
            route.continue_()
        else:
            self.faults.append(f"asked {route.request.url}")
            route.abort()

    def page(self, width: int = 1000, theme: Any = "light") -> Page:
        """An empty page whose errors and foreign requests are noted."""
        page = self.browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme).new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.route("**/*", self._route)
        page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        return page

    def open(self, name: str, **options: Any) -> Page:
        """A page of the server."""
        page = self.page(**options)
        page.goto(f"{self.address}/{name}")
        return page

    def finish(self) -> None:
        """Close all pages.

        Raises:
            AssertionError: one of them reported an error or asked another host.
        """
        for context in self.browser.contexts:
            context.close()
        faults, self.faults = self.faults, []
        assert faults == []


@contextmanager
def opened(address: str) -> Iterator[Site]:
    """Pages of a server that runs."""
    expect.set_options(timeout=1000 * SECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS, timeout=1000 * SECONDS)
        yield Site(browser, address)
        browser.close()


@contextmanager
def served(folder: Path) -> Iterator[Site]:
    """Pages of a folder, served on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with opened(f"http://127.0.0.1:{server.server_port}") as site:
        yield site
    server.shutdown()
    server.server_close()
    thread.join()


TOO_WIDE = """selector => [...document.querySelectorAll(selector)]
  .filter((node) => node.scrollWidth > node.clientWidth + 1 || node.getBoundingClientRect().right > innerWidth + 1)
  .map((node) => `${node.tagName} ${node.className}: ${node.textContent.trim().slice(0, 60)}`)"""
UNSEEN = "[...document.images].filter((one) => !one.naturalWidth || !one.hasAttribute('alt')).map((one) => one.src)"


def check_page(page: Page, width: int) -> None:
    """Nothing is wider than the page, code and claims do not scroll, and every picture is there and described."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width, page.url
    # on a phone a table of many numbers scrolls in its own frame; the page, code and the claims never do
    held = "article :is(pre, table.claims)" if width == PHONE else "article :is(pre, table)"
    assert page.evaluate(TOO_WIDE, held) == [], page.url
    assert page.evaluate(UNSEEN) == [], page.url


def talk(live: Locator) -> None:
    """Say, undo, branch, go to, make an error and begin the second conversation, in a live explorer of two."""
    words, status = live.get_by_label("Say", exact=True), live.get_by_role("status")
    current, states = live.locator(".nm-tree [aria-current=true]"), live.locator(".nm-tree button")
    expect(live.locator(".nm-badge")).to_have_text("live")
    words.fill("make the square red")
    words.press("Enter")
    expect(states).to_have_text(["#1", "#2"])
    expect(words).to_have_value("")
    live.get_by_role("button", name="Say it to the current picture").click()
    expect(live.locator(".nm-error")).to_have_text("instruction '' has no words; say what to change")
    live.get_by_label("Suggestions").select_option("undo that")
    live.get_by_role("button", name="Say it to the current picture").click()
    expect(states).to_have_count(3)
    expect(status).to_contain_text("A model answers")
    undo = live.get_by_role("button", name="Undo", exact=True)
    undo.click()
    expect(current).to_have_text("#2")
    undo.press("Enter")  # by keyboard alone as well
    expect(current).to_have_text("#1")
    words.fill("paint the ground dark")
    live.get_by_role("button", name="Say it to the current picture").click()
    expect(current).to_have_text("#2b")
    live.get_by_role("button", name="Picture #2:").click()
    words.fill("make the edge white")
    live.get_by_role("button", name="Branch from #2").click()
    expect(current).to_have_text("#3b")
    live.get_by_role("button", name="Picture #3:").click()
    live.get_by_role("button", name="Go to").click()
    expect(current).to_have_text("#3")
    live.get_by_role("combobox", name="Conversation").select_option("second")
    expect(states).to_have_count(1)
