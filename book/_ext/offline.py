"""Sphinx extension: ship MathJax with the pages, so that they ask no other host, and leave out what nobody needs."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "sphinx-mathjax-offline"
NEEDED = ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2")

# An icon in the theme's script: its name, its size, other names, its code point and its outline.
ICON = re.compile(r'"?([\w-]+)"?:\[\d+,\d+,\[([^\]]*)\],"[0-9a-f]+",(?:"[^"]*"|\[[^\]]*\])\],?')
USED = re.compile(r"fa-([a-z0-9-]+)")


def keep_used_icons(app: Any, error: Exception | None) -> None:
    """Cut the theme's script of two thousand icons, the heaviest file of every page, down to those that pages name.

    Args:
        app: the Sphinx application.
        error: what stopped the build, if anything did.
    """
    if error is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir)
    script = folder / "_static" / "scripts" / "fontawesome.js"
    readers = [*folder.rglob("*.html"), *(path for path in (folder / "_static").glob("**/*.js") if path != script)]
    used = {name for path in readers for name in USED.findall(path.read_text(encoding="utf-8"))}

    def kept(icon: re.Match[str]) -> str:
        names = {icon[1], *re.findall(r'"([\w-]+)"', icon[2])}
        return icon[0] if names & used else ""

    script.write_text(ICON.sub(kept, script.read_text(encoding="utf-8")), encoding="utf-8")
    script.with_suffix(".js.map").unlink(missing_ok=True)


def leave_out_mathjax(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Load MathJax, the heaviest script, only on pages with an equation.

    Args:
        app: the Sphinx application.
        pagename: of the page that is written.
        templatename: of its template.
        context: of the template; its scripts are changed.
        doctree: of the page, if it has one.
    """
    if 'class="math' not in context.get("body", ""):
        scripts = context.get("script_files", [])
        context["script_files"] = [
            script for script in scripts if "mathjax" not in str(getattr(script, "filename", script))
        ]


def copy_mathjax(app: Any, error: Exception | None) -> None:
    """Copy the one script of MathJax that the pages load, and its fonts, into the finished pages.

    Args:
        app: the Sphinx application.
        error: what stopped the build, if anything did.

    Raises:
        FileNotFoundError: the package that carries MathJax is not installed.
    """
    if error is not None or app.builder.format != "html":
        return
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {PACKAGE} is not installed; run `make env`")
    for name in NEEDED:
        source = Path(spec.origin).parent / "static" / "mathjax" / name
        target = Path(app.outdir) / "_static" / "mathjax" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("html-page-context", leave_out_mathjax, priority=900)  # after those that add scripts
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", keep_used_icons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
