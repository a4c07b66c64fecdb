"""Whether words point to an earlier picture than the last: simple rules, so that a data set can be measured.

The rules look at words alone. A text that matches none can be answered from the last picture as far as its words go;
one that matches cannot, or not for certain. They are checked against the project's own phrasings: all its rollbacks
match and none of its edits does.
"""

import re

from nmlib.conversation import Reference

_PICTURE = r"(?:image|picture|photo|photograph|version|result|round|turn|step|state)"
_NUMBERED = r"(?:image|picture|photo|photograph|version|result|round)"  # not "turn two lights on"
_CHANGE = r"(?:change|edit|modification|step|round|turn|version|adjustment)s?"
_ORDINAL = r"(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|\w+teenth|eleventh|twelfth)"

# In order: the first that matches says by what the picture is named (the kinds of `conversation.Reference`).
RULES: tuple[tuple[Reference, str], ...] = (
    ("start", r"\bstart (?:over|again)\b"),
    ("start", r"\bundo (?:everything|all)\b(?! since)"),
    ("start", rf"\b(?:original|initial|very first|starting) {_PICTURE}\b"),
    ("start", r"\b(?:back|return|revert|reset|restore)\b.*\b(?:original|start|beginning|scratch)\b"),
    ("content", r"\b(?:one|back to|picture|image|version|look) before\b(?! and after)"),
    ("content", r"\b(?:everything|all) since\b"),
    (
        "content",
        r"\bbefore (?:you|i|we|it was|the) (?:\w+ ){0,3}(?:changed|added|removed|edited|replaced|said|turned)\b",
    ),
    ("count", r"\b(?:steps?|rounds?|turns?|pictures?|images?|edits?|changes?) ago\b"),
    ("ordinal", rf"\b{_NUMBERED} ?(?:#|no\.? ?|number )?(?:\d+|one|two|three|four|five|six|seven|eight|nine|ten)\b"),
    ("ordinal", r"#\d+\b"),
    ("ordinal", rf"\b{_ORDINAL} {_PICTURE}\b"),
    ("count", r"\b(?:undo|revert|withdraw|roll ?back|rolled back)\b"),
    ("count", rf"\b(?:cancel|discard|drop|forget|take back)\b.*\b(?:last|previous|that|latest)\b.*\b{_CHANGE}\b"),
    ("count", r"\btake (?:that|it|this) back\b"),
    ("count", rf"\b(?:go|step|went) back\b.*\b(?:steps?|{_CHANGE}|{_PICTURE}s?)\b"),
    ("count", rf"\b(?:previous|earlier|prior|former) (?:\w+ )?(?:{_PICTURE}|{_CHANGE})\b"),
    (
        "content",
        r"\b(?:bring|put|add|give)\b(?: \w+){0,5} (?<!the )(?<!his )(?<!her )(?<!its )(?<!their )(?<!a )back\b",
    ),
    ("content", r"\bbring back\b"),
    ("content", r"\b(?:as|like|where|what) (?:it|he|she|they) (?:was|were|looked|used to)\b"),
    ("content", r"\bagain\b"),
)
_COMPILED = tuple((kind, re.compile(pattern)) for kind, pattern in RULES)


def earlier_reference(text: str) -> Reference | None:
    """By what a text names an earlier picture: `start`, `ordinal`, `count` or `content`; None if it names none."""
    said = " ".join(text.lower().split())
    return next((kind for kind, pattern in _COMPILED if pattern.search(said)), None)
