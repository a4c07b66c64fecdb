"""Sphinx extension: docstrings of modules are plain text for readers of the code; the pages want blank lines in it."""

from typing import Any


def separate_blocks(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Set lists and indented examples of a module's docstring apart from what stands around them, in place.

    Args:
        app, name, obj, options: what autodoc hands over besides; not used.
        what: `module` for the docstring of a module; all others stay as they are.
        lines: lines of the docstring.
    """
    if what != "module":
        return
    made: list[str] = []
    in_list = False
    for number, line in enumerate(lines):
        item, continued = line.startswith("- "), in_list and line.startswith("  ")
        if made and made[-1] and item != in_list and not continued:
            made.append("")
        in_list = item or continued
        blank, *after = [*lines[number + 1 : number + 3], "", ""]
        example = line.endswith(":") and not blank and after[0].startswith("    ")
        made.append(f"{line}:" if example else line)
    lines[:] = made


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", separate_blocks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
