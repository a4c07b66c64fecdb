"""Sphinx extension: ship MathJax with the pages, so that they ask no other host for anything."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "sphinx-mathjax-offline"
NEEDED = ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2")


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
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
