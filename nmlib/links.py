"""Links between finished pages: every one must lead to a file and, behind a #, to a place in it."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """Places that links can lead to, and links, of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            elif (name == "href" or (name == "src" and tag in ("img", "script"))) and value:
                self.links.append(value)


def broken_links(folder: Path) -> list[str]:
    """Links within a folder of pages that lead nowhere.

    Args:
        folder: finished HTML pages; links to other hosts and links made by scripts are not looked at.

    Returns:
        One line for each: the page, and the link as it is written there.
    """
    # what lies under _static with this ending are templates of the themes
    files = [
        file.resolve() for file in sorted(folder.rglob("*.html")) if "_static" not in file.relative_to(folder).parts
    ]
    pages = {file: _Page(file.read_text(encoding="utf-8")) for file in files}
    broken = []
    for file, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            place = unquote(parts.fragment)
            lost = place and target in pages and place not in pages[target].places
            if not target.exists() or lost:
                broken.append(f"{file.relative_to(folder.resolve())}: {link}")
    return broken
