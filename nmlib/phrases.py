"""What people say: edits, rollbacks, uploads and descriptions, introductions and recalls, in many phrasings.

Sentences come from a small grammar (opener, clause, closer). A phrasing belongs to the training or to the
held-out set by a hash of its whole text, so every word is seen in training and whole phrasings are not.
A sentence with a person's name is split by its text with `{name}` in the name's place.
All text is lower case without punctuation, which keeps the small model's vocabulary small.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Sequence

from nmlib.sources import Attribute

NUMBERS = tuple(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
)
ORDINALS = tuple(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth".split()
)
OPENERS = ("", "please", "now", "okay", "can you", "could you please", "i changed my mind", "actually")
CLOSERS = ("", "please", "thanks", "if you can", "for me")
UPLOADS = ("here is a picture", "use this picture", "this is the picture to edit", "let us start from this picture")
DESCRIBE = ("a picture with {looks}", "draw a picture with {looks}", "show me a picture with {looks}")
UNDO_ONE = (
    "undo that",
    "undo the last change",
    "take that back",
    "revert the last edit",
    "go back one step",
    "go back to the previous picture",
    "forget the last change",
)
UNDO_MANY = (
    "undo the last {number} changes",
    "go back {number} steps",
    "revert the last {number} edits",
    "take back the last {number} changes",
    "return to the picture {number} steps ago",
)
MARKER = "go back to {marker}"
ORDINAL = (
    "go back to picture {number}",
    "return to picture {number}",
    "go back to the {ordinal} picture",
    "return to the {ordinal} picture",
    "take the {ordinal} picture",
    MARKER,
)
CONTENT_NOUN = (
    "go back to the one before you changed {noun}",
    "return to the picture before you changed {noun}",
    "go back to before {noun} was changed",
    "undo everything since you changed {noun}",
)
CONTENT_LOOK = (
    "go back to the one before {look}",
    "return to the picture before {look}",
    "undo everything since {look}",
)
SAID, BEFORE = "said", "before"
CONTENT_QUOTE = ("go back to the one before i said {quote}", "return to the picture before i said {quote}")
START = (
    "start over",
    "go back to the original",
    "return to the very first picture",
    "go back to the start",
    "undo everything",
)
THEN = ("{reference} and then {command}", "{reference} and {command}", "{reference} but {command}")
NAME = "{name}"
INTRODUCE = (
    "this is {name}",
    "meet {name}",
    "here is {name}",
    "this picture shows {name}",
    "here is a picture of {name}",
    "the person in this picture is {name}",
    "i want you to meet {name}",
)
GREETINGS = ("", "hello", "look", "okay", "now", "and")
DESCRIBE_NAMED = ("a picture of {name} with {looks}", "draw {name} with {looks}", "show me {name} with {looks}")
LEADS = ("", "now", "please show me", "show me", "draw", "please draw", "give me", "i want", "can you draw")
RECALL = ("a picture of {name}", "{name}", "another picture of {name}")
RENAME = (
    "call her {name} from now on",
    "call him {name} from now on",
    "from now on call her {name}",
    "from now on call him {name}",
    "let us call her {name}",
    "let us call him {name}",
)
POLITE = ("here it is", "here you go", "done", "this is what you asked for")
HELDOUT_SHARE = 8


def is_heldout(text: str) -> bool:
    """Whether a phrasing belongs to the held-out set (about one in eight)."""
    return hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % HELDOUT_SHARE == 0


def marker(index: int) -> str:
    """The number of a picture as the model and the explorer write it: `#1` for round 0."""
    return f"#{index + 1}"


def draw(make: Callable[[], str], split: str) -> str:
    """Draw a sentence of a split by rejection.

    Args:
        make: draws a sentence from the whole grammar.
        split: `train`, `heldout` or `any`.

    Raises:
        ValueError: an unknown split, or a grammar with no sentence in that split.
    """
    if split not in ("train", "heldout", "any"):
        raise ValueError(f"split {split!r}: expected 'train', 'heldout' or 'any'")
    for _ in range(1000):
        text = make()
        if split == "any" or is_heldout(text) == (split == "heldout"):
            return text
    raise ValueError(f"no sentence like {text!r} in split {split!r}: the grammar is too small; add phrasings")


def _polish(rng: random.Random, clause: str) -> str:
    """Put an opener and a closer around a clause."""
    return " ".join(f"{rng.choice(OPENERS)} {clause} {rng.choice(CLOSERS)}".split())


def edit_clause(rng: random.Random, attribute: Attribute, value: str) -> str:
    """An imperative clause that sets an attribute, for example `make the wall blue`."""
    return rng.choice(attribute.commands[value])


def edit_sentence(rng: random.Random, attribute: Attribute, value: str, split: str) -> str:
    """A whole instruction for one edit."""
    return draw(lambda: _polish(rng, edit_clause(rng, attribute, value)), split)


def count_clause(rng: random.Random, depth: int) -> str:
    """Refer to the picture `depth` rounds before the last one by counting; there are words up to `NUMBERS`' end."""
    if not 1 <= depth <= len(NUMBERS):
        raise ValueError(f"count_clause: depth {depth} has no word; expected 1 to {len(NUMBERS)}")
    if depth == 1:
        return rng.choice(UNDO_ONE)
    return rng.choice(UNDO_MANY).format(number=NUMBERS[depth - 1])


def ordinal_clause(rng: random.Random, index: int) -> str:
    """Refer to the picture of round `index` by its number, or by its marker where the number has no word."""
    if index >= len(NUMBERS):
        return MARKER.format(marker=marker(index))
    template = rng.choice(ORDINAL)
    return template.format(number=NUMBERS[index], ordinal=ORDINALS[index], marker=marker(index))


def content_clause(rng: random.Random, attribute: Attribute, value: str, by_noun: bool) -> str:
    """Refer to the picture before an edit, by what it changed (`noun`) or what it looked like after."""
    if by_noun:
        return rng.choice(CONTENT_NOUN).format(noun=rng.choice(attribute.nouns))
    return rng.choice(CONTENT_LOOK).format(look=rng.choice(attribute.looks[value]))


def quote_clause(rng: random.Random, instruction: str) -> str:
    """Refer to the picture before an edit by quoting the instruction, for sources without attributes."""
    return rng.choice(CONTENT_QUOTE).format(quote=clean(instruction))


def start_clause(rng: random.Random) -> str:
    """Refer to the first picture."""
    return rng.choice(START)


def rollback_sentence(
    rng: random.Random, reference: Callable[[], str], command: Callable[[], str] | None, split: str
) -> str:
    """A whole rollback instruction, with a new edit where `command` is given."""

    def make() -> str:
        clause = reference()
        if command is not None:
            clause = rng.choice(THEN).format(reference=clause, command=command())
        return _polish(rng, clause)

    return draw(make, split)


def upload_sentence(rng: random.Random) -> str:
    """What comes with a picture that the person brings."""
    return rng.choice(UPLOADS)


def describe_sentence(rng: random.Random, attributes: Sequence[Attribute], values: Sequence[int]) -> str:
    """A description of a state, from which a picture is to be made."""
    looks = [rng.choice(a.looks[a.values[v]]) for a, v in zip(attributes, values, strict=True)]
    return rng.choice(DESCRIBE).format(looks=" and ".join(looks))


def with_name(text: str, name: str) -> str:
    """Put a name in its place."""
    return text.replace(NAME, name)


def without_name(text: str, name: str | None) -> str:
    """The sentence by which a split is decided: `{name}` in the place of the name."""
    return " ".join(NAME if word == name else word for word in text.split())


def introduce_sentence(rng: random.Random, name: str, split: str) -> str:
    """What comes with a picture that shows somebody by name."""
    return with_name(draw(lambda: f"{rng.choice(GREETINGS)} {rng.choice(INTRODUCE)}".strip(), split), name)


def introduce_by_words(
    rng: random.Random, name: str, attributes: Sequence[Attribute], values: Sequence[int], split: str
) -> str:
    """A description of somebody by name, from which a picture is to be made."""

    def make() -> str:
        looks = [rng.choice(a.looks[a.values[v]]) for a, v in zip(attributes, values, strict=True)]
        return rng.choice(DESCRIBE_NAMED).replace("{looks}", " and ".join(looks))

    return with_name(draw(make, split), name)


def recall_sentence(
    rng: random.Random, name: str, attributes: Sequence[Attribute], values: Sequence[int], split: str
) -> str:
    """Ask for a picture of somebody by name, for example `a close up of olivia smiling on a blue wall`.

    Args:
        rng: source of chance.
        name: whom to show.
        attributes: all that is said of the picture.
        values: index of the value of each.
        split: `train`, `heldout` or `any`.
    """

    def make() -> str:
        details = [rng.choice(a.details[a.values[v]]) for a, v in zip(attributes, values, strict=True)]
        heads = [text for text in details if NAME in text] or [rng.choice(RECALL)]
        tails = [text for text in details if NAME not in text]
        rng.shuffle(tails)
        if len(tails) > 1 and rng.random() < 0.5:
            tails.insert(-1, "and")
        return " ".join([rng.choice(LEADS), *heads, *tails, rng.choice(CLOSERS)]).strip()

    return with_name(draw(lambda: " ".join(make().split()), split), name)


def rename_sentence(rng: random.Random, name: str, command: Callable[[], str], split: str) -> str:
    """Call the person shown otherwise from now on, and ask for an edit."""
    return with_name(draw(lambda: _polish(rng, f"{rng.choice(RENAME)} and {command()}"), split), name)


def response(
    style: str, index: int, base: int | None, instruction: str, edit: str = "", before: str = "", name: str = ""
) -> str:
    """The text before an image.

    Args:
        style: `grounded` says what was asked for, which picture this is and which one it starts from, for example
            `before hat #2 then pink hair to #6` or `said olivia #2 to #5`; `polite` is small talk.
        index: round of the image.
        base: round it starts from, None for an upload or a description.
        instruction: picks the small talk, so that it is a function of the conversation.
        edit: what the image sets, where known.
        before: the earlier edit by which the instruction names the base, if it does.
        name: of the person who is asked for, if somebody is.
    """
    if style == "polite":
        return POLITE[hashlib.blake2b(instruction.encode(), digest_size=1).digest()[0] % len(POLITE)]
    start = [] if base is None else [marker(base)]
    if name:
        parts = [SAID, name, *start]
    elif before:
        parts = [BEFORE, before, *start, *(["then", edit] if edit else [])]
    else:
        parts = [*([edit] if edit else []), *start]
    parts += ["to", marker(index)] if parts else [marker(index)]
    return " ".join(parts)


def base_of_response(text: str, index: int) -> int | None:
    """The round that a grounded response of round `index` says it starts from; None if it names no earlier one."""
    found = re.search(r"#(\d+) (?:then .+ )?to #", text)
    base = int(found.group(1)) - 1 if found else -1
    return base if 0 <= base < index else None


def clean(text: str) -> str:
    """Typed text in the grammar's form: lower case, no punctuation, single spaces."""
    return " ".join(re.sub(r"[^a-z0-9#]+", " ", text.lower()).split())


def vocabulary(attributes: Iterable[Attribute], names: Sequence[str] = ()) -> tuple[str, ...]:
    """Every word that the grammar can produce for these attributes, and with names all that is said of people, sorted.

    Args:
        attributes: of the source.
        names: of people; none where nobody has one.
    """
    groups: list[Iterable[str]] = [
        OPENERS, CLOSERS, UPLOADS, DESCRIBE, UNDO_ONE, UNDO_MANY, ORDINAL, CONTENT_NOUN, CONTENT_LOOK, CONTENT_QUOTE,
        START, THEN, POLITE, NUMBERS, ORDINALS, ("and before then to",),
    ]  # fmt: skip
    if names:
        groups += [INTRODUCE, GREETINGS, DESCRIBE_NAMED, LEADS, RECALL, RENAME, names]
    for attribute in attributes:
        groups += [
            (attribute.name, *attribute.values),
            attribute.nouns,
            *attribute.commands.values(),
            *attribute.looks.values(),
            *(attribute.details.values() if names else ()),
        ]
    words = {word for group in groups for text in group for word in text.split()}
    return tuple(sorted(word for word in words if not word.startswith("{")))
