"""Numbers in prose come from records: a changed record changes the page, a missing or a typed one stops the build."""

import io
import re
from pathlib import Path

import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

from nmlib import measured, runtime
from nmlib.records import Record
from nmlib.runtime import RunError

EXTENSIONS = Path(__file__).parent.parent / "book" / "_ext"
JOINT = "people.identity.joint"


def record(value: float, unit: str = "", low: float | None = None, high: float | None = None) -> Record:
    return Record(
        id=JOINT, value=value, low=low, high=high, n=7, unit=unit, command="run it", modules=(), params_hash="a",
        library_hash="b", machine="c",
    )  # fmt: skip


def write(book: Path, file: str, found: Record) -> None:
    runtime.write_json(book / file, {found.id: found.model_dump(mode="json", exclude={"id"})})


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a book of one page, with one record of the run and one that was published."""
    monkeypatch.syspath_prepend(str(EXTENSIONS))
    write(tmp_path, "generated/records.json", record(0.25, low=0.125, high=0.5))
    write(tmp_path, "results/people.json", record(0.75))
    return tmp_path


def build(book: Path, page: str, **settings: object) -> tuple[str, str]:
    """The page as HTML, and the warnings."""
    (book / "index.md").write_text(f"# Title\n\n{page}\n", encoding="utf-8")
    options = {"extensions": ["myst_parser", "measured"], "myst_enable_extensions": ["dollarmath"], **settings}
    warnings = io.StringIO()
    with patch_docutils(), docutils_namespace():
        app = Sphinx(
            str(book), None, str(book / "_out"), str(book / "_trees"), "html", options, io.StringIO(), warnings
        )
        app.build()
    return (book / "_out" / "index.html").read_text(encoding="utf-8"), warnings.getvalue()


def test_a_record_reads_as_words() -> None:
    found = record(0.934, low=0.9, high=0.96)
    assert measured.in_words(found).replace(measured.NO_BREAK, " ") == "0.93 (0.90 to 0.96)"
    assert measured.in_words(record(0.934, "dB"), 1) == f"0.9{measured.NO_BREAK}dB"
    assert measured.in_words(None) == "*not measured*"


def test_a_changed_record_changes_the_page_and_a_deleted_one_stops_the_build(book: Path) -> None:
    page = f"Here {{measured}}`{JOINT}`, published {{measured-value}}`people:{JOINT}:.3f`."
    html, warnings = build(book, page)
    assert warnings == ""
    assert ">0.25\u00a0(0.12\u00a0to\u00a00.50)</abbr>" in html and ">0.750</abbr>" in html
    assert f'title="{JOINT}, n = 7, measured by run it"' in html
    write(book, "generated/records.json", record(0.875))
    assert ">0.88</abbr>" in build(book, page)[0]
    write(book, "results/people.json", record(0.5, low=0.4, high=0.6))
    assert ">0.500</abbr>" in build(book, page)[0]
    (book / "results" / "people.json").unlink()
    assert f"record '{JOINT}' is missing in results/people.json; publish it" in build(book, page)[1]
    (book / "generated" / "records.json").unlink()
    assert f"record '{JOINT}' is missing in generated/records.json; run the notebook" in build(book, page)[1]


@pytest.mark.parametrize("reference", ["", "0.75", "people:", "a.b:.2g", "a b"])
def test_a_reference_that_names_no_record_is_refused(reference: str, book: Path) -> None:
    with pytest.raises(RunError, match=r"names no record|is missing in"):
        measured.look_up(reference, book)


def test_typed_numbers_stop_the_build(book: Path) -> None:
    _, warnings = build(book, "It is right in 0.61 of all rounds.\n\n- It takes 12 minutes.")
    assert warnings.count("is typed in prose") == 2 and "'0.61'" in warnings and "'12 minutes'" in warnings
    fine = "The size is $0.61$ or `0.61`, and {measured}`people.identity.joint`.\n\n$$\nx = 0.61\n$$"
    assert build(book, fine)[1] == ""
    assert build(book, "It is 0.61.", measured_exempt=["index"])[1] == ""


@pytest.mark.parametrize(
    "text", ["0.61", "fell by -0.05", "27 dB", "40%", "nine times in ten", "66 of 75", "3 out of 4", "4 times faster"]
)
def test_what_looks_measured(text: str) -> None:
    assert len(measured.typed(f"It is {text}, or so.")) == 1


@pytest.mark.parametrize(
    "text", ["95% intervals", "arXiv 2601.20911", "Python 3.11.4", "24 November 2026", "13 B", "one state in eight"]
)
def test_what_does_not(text: str) -> None:
    assert measured.typed(text) == []


def test_the_readme_types_no_measured_number() -> None:
    text = (EXTENSIONS.parent.parent / "README.md").read_text(encoding="utf-8")
    text = text.partition("<!-- results:start -->")[0] + text.partition("<!-- results:end -->")[2]
    prose = re.sub(r"(?s)```.*?```|`[^`]*`|(Python|License) [\d.]+", "", text)
    assert measured.typed(prose) == [], "name the record instead; the table shows its value"
