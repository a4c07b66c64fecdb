"""Measured numbers in sentences: prose names the record that holds a number, and never types it.

In the pages of the book a role does that, `{measured}` followed by the id of a record: of the run that the book
shows, or of a published one (`people:people.identity.joint`). This module says what such a reference means, how a
record reads in a sentence, and which numbers of a text look as if they had been measured and were typed.
"""

import re
from pathlib import Path

from nmlib import records
from nmlib.records import Record
from nmlib.runtime import RunError

LENT = "lent_"  # before the params of a run that lends a chapter to the book of another
NO_BREAK = "\u00a0"

_REFERENCE = re.compile(r"(?:(?P<params>[a-z0-9_]+):)?(?P<id>[a-z0-9_.]+)(?::\.(?P<digits>\d)f)?")
_UNIT = r"(?:%|dB|GB|MB|ms|x|times|seconds?|minutes?|hours?)"
_COUNT = r"(?:one|two|three|four|five|six|seven|eight|nine)"
# a year, the number of a paper and a version have other shapes; "95% interval" is a name and no result
_TYPED = re.compile(
    rf"(?<![\w.,])-?\d{{1,3}}\.\d+(?![.\d]*\w)|(?<![\w.,])(?!95%)\d+\s?{_UNIT}(?!\w)"
    rf"|\b\d+ (?:out )?of \d+\b|\b{_COUNT} (?:times )?(?:in|out of) (?:ten|a hundred)\b",
    re.IGNORECASE,
)


def in_words(record: Record | None, digits: int = 2) -> str:
    """A record for a sentence.

    Args:
        record: the record, None for what this run did not measure.
        digits: decimals to show.

    Returns:
        For example `0.93 (0.90 to 0.96)`, with the unit if it is dB; `not measured` without a record.
    """
    if record is None:
        return "*not measured*"
    text = f"{record.value:.{digits}f}{NO_BREAK + record.unit if record.unit == 'dB' else ''}"
    if record.low is None or record.high is None:
        return text
    return f"{text} ({record.low:.{digits}f} to {record.high:.{digits}f})".replace(" ", NO_BREAK)


def look_up(reference: str, book: Path) -> tuple[Record, int]:
    """The record that a reference in the book's prose names.

    Args:
        reference: `id` for the run that the book shows, `params:id` for a published run; `:.3f` behind it sets the
            decimals.
        book: folder of the book's sources, with `generated/records.json` and `results/`.

    Returns:
        The record, and the decimals to show.

    Raises:
        RunError: the reference cannot be read, or there is no such record.
    """
    match = _REFERENCE.fullmatch(reference.strip())
    if match is None:
        raise RunError(f"{reference!r} names no record; expected `id` or `params:id`, with `:.3f` behind it or nothing")
    params, id_ = match["params"], match["id"]
    is_shown = params is None or params.startswith(LENT)
    file = book / "generated" / f"{params or 'records'}.json" if is_shown else book / "results" / f"{params}.json"
    found = records.read_records(file) if file.exists() else {}
    if id_ not in found:
        cure = "run the notebook that measures it" if is_shown else f"publish it from a run of `{params}`"
        raise RunError(f"record {id_!r} is missing in {file.relative_to(book)}; {cure}")
    return found[id_], int(match["digits"] or 2)


def typed(text: str) -> list[str]:
    """Numbers in a piece of prose that look measured: decimals, shares, and numbers with a unit.

    What is defined, set or computed by hand is written as mathematics or code, which is not prose.
    """
    return [match[0] for match in _TYPED.finditer(text)]
