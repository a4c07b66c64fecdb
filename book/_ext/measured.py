"""Sphinx extension: numbers in prose come from records; one that is missing or typed is a warning, and so an error."""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from nmlib import measured
from nmlib.runtime import RunError

LOGGER = logging.getLogger(__name__)
NOT_PROSE = (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.raw, nodes.abbreviation)


class Measured(SphinxRole):
    """A record in a sentence; what it is and how to measure it again is shown under the pointer."""

    def __init__(self, interval: bool) -> None:
        super().__init__()
        self.interval = interval

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Replace a reference by the number."""
        try:
            record, digits = measured.look_up(self.text, Path(self.env.srcdir))
        except RunError as error:
            LOGGER.warning("%s", error, location=self.get_location(), type="measured")
            return [nodes.problematic(self.rawtext, self.text)], []
        bare = record if self.interval else record.model_copy(update={"low": None, "high": None})
        note = f"{record.id}, n = {record.n}, measured by {record.command}"
        return [nodes.abbreviation(self.rawtext, measured.in_words(bare, digits), explanation=note)], []


def _written_in(node: nodes.Node | None, app: Sphinx) -> str:
    """The source that a node was written in, below the book's folder; a page may include another."""
    while node is not None and not getattr(node, "source", None):
        node = node.parent
    source = Path(getattr(node, "source", None) or app.env.docname)
    folder = Path(app.srcdir)
    return source.relative_to(folder).as_posix() if source.is_relative_to(folder) else app.env.docname


def refuse_typed_numbers(app: Sphinx, doctree: nodes.document) -> None:
    """Warn of every number in prose that looks measured and was typed."""
    exempt = tuple(app.config.measured_exempt)
    if app.env.docname.startswith(exempt):
        return
    for text in doctree.findall(nodes.Text):
        if _written_in(text.parent, app).startswith(exempt):
            continue
        above = text.parent
        while above is not None and not isinstance(above, NOT_PROSE) and "cell" not in above.get("classes", ()):
            above = above.parent
        for number in measured.typed(str(text)) if above is None else ():
            where = text.parent if text.parent.line else doctree
            message = "%r is typed in prose; name its record with {measured}, or write $...$ if nothing measured it"
            LOGGER.warning(message, number, location=where, type="measured")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_config_value("measured_exempt", [], "env", [list])
    app.add_role("measured", Measured(interval=True))
    app.add_role("measured-value", Measured(interval=False))
    app.connect("doctree-read", refuse_typed_numbers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
