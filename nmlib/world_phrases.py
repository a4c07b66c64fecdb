"""What an edit of a portrait can change, and the words people use for it.

Phrases come from a small grammar: for every attribute a list of templates, for every value the words that
fill them. `{word}` is the value's word, `{a_word}` the word with its article, `{who}` and `{whose}` stand for
her and him, her and his.
"""

from collections.abc import Mapping, Sequence

from nmlib.sources import Attribute

COLOURS = ("red", "green", "blue", "yellow", "purple", "white", "black", "orange")
DYES = ("pink", "blue", "silver")
WHO = (("her", "her"), ("him", "his"))


def _fill(templates: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
    """Every template with every word and both pronouns, without repeats, in order."""
    filled = [
        template.format(word=word, a_word=f"{'an' if word[:1] in tuple('aeiou') else 'a'} {word}", who=who, whose=whose)
        for word in words
        for template in templates
        for who, whose in WHO
    ]
    return tuple(dict.fromkeys(filled))


def _table(
    templates: Sequence[str],
    words: Mapping[str, Sequence[str]],
    special: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Phrases of every value of an attribute.

    Args:
        templates: templates shared by the values in `words`.
        words: value -> the words for it.
        special: value -> templates of its own, for values such as "none" that no shared template fits, or
            that have more phrases than the shared ones; these take no word.

    Returns:
        Value -> phrases.
    """
    table = {value: _fill(templates, value_words) for value, value_words in words.items()}
    for value, own in (special or {}).items():
        table[value] = table.get(value, ()) + _fill(own, ("",))
    return table


def _same(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Values whose only word is their name."""
    return {name: (name,) for name in names}


BACKGROUND = Attribute(
    name="background",
    nouns=("the wall", "the background", "the backdrop"),
    values=COLOURS,
    commands=_table(
        (
            "make the wall {word}",
            "make the background {word}",
            "paint the wall {word}",
            "paint the background {word}",
            "turn the backdrop {word}",
            "change the background to {word}",
            "i want {a_word} backdrop",
            "i want {a_word} wall",
            "put {a_word} wall behind {who}",
            "give {who} {a_word} background",
        ),
        _same(COLOURS),
    ),
    looks=_table(("the {word} wall", "the {word} background", "{a_word} wall", "{a_word} backdrop"), _same(COLOURS)),
)

GLASSES = Attribute(
    name="glasses",
    nouns=("the glasses", "the spectacles", "the eyewear"),
    values=("none", "round", "square"),
    commands=_table(
        (
            "give {who} {word} glasses",
            "put {word} glasses on {who}",
            "add {word} glasses",
            "add {word} spectacles",
            "i want {word} glasses",
            "let {who} wear {word} glasses",
            "change the eyewear to {word} glasses",
        ),
        _same(("round", "square")),
        {
            "none": (
                "lose the glasses",
                "lose the spectacles",
                "take the glasses off",
                "take off {whose} glasses",
                "remove the glasses",
                "remove {whose} spectacles",
                "get rid of the glasses",
                "i want no glasses",
            )
        },
    ),
    looks=_table(
        ("the {word} glasses", "{word} glasses", "the {word} spectacles"),
        _same(("round", "square")),
        {"none": ("no glasses", "no eyewear", "no spectacles")},
    ),
)

HAT = Attribute(
    name="hat",
    nouns=("the hat", "the headwear"),
    values=("none", "cap", "beanie", "crown"),
    commands=_table(
        (
            "give {who} {a_word}",
            "put {a_word} on {who}",
            "put {a_word} on {whose} head",
            "add {a_word}",
            "i want {a_word}",
            "let {who} wear {a_word}",
            "change the headwear to {a_word}",
        ),
        _same(("cap", "beanie", "crown")),
        {
            "none": (
                "lose the hat",
                "lose the headwear",
                "take the hat off",
                "take off {whose} hat",
                "remove the hat",
                "remove {whose} headwear",
                "get rid of the hat",
                "i want no hat",
            )
        },
    ),
    looks=_table(
        ("the {word}", "{a_word}"),
        _same(("cap", "beanie", "crown")),
        {"none": ("no hat", "no headwear", "a bare head")},
    ),
)

SHIRT = Attribute(
    name="shirt",
    nouns=("the shirt", "the sweater", "the clothes"),
    values=COLOURS,
    commands=_table(
        (
            "make the shirt {word}",
            "make the sweater {word}",
            "turn the shirt {word}",
            "change the shirt to {word}",
            "i want {a_word} shirt",
            "dress {who} in {word}",
            "put {who} in {a_word} shirt",
            "give {who} {a_word} sweater",
            "let {who} wear {a_word} shirt",
        ),
        _same(COLOURS),
    ),
    looks=_table(("the {word} shirt", "the {word} sweater", "{a_word} shirt", "{word} clothes"), _same(COLOURS)),
)

EXPRESSION = Attribute(
    name="expression",
    nouns=("the expression", "the face", "the mood"),
    values=("neutral", "smile", "surprised"),
    commands=_table(
        (
            "make {who} look {word}",
            "make the face look {word}",
            "i want {a_word} face",
            "give {who} {a_word} expression",
            "change the expression to {word}",
        ),
        {"neutral": ("neutral", "calm"), "smile": ("happy",), "surprised": ("surprised", "amazed")},
        {
            "neutral": ("relax {whose} face",),
            "smile": ("make {who} smile", "let {who} smile", "give {who} a big smile", "put a smile on {whose} face"),
            "surprised": ("open {whose} mouth wide",),
        },
    ),
    looks=_table(
        ("the {word} face", "{a_word} face", "the {word} expression"),
        {"neutral": ("neutral", "calm"), "smile": ("happy",), "surprised": ("surprised", "amazed")},
        {"smile": ("the smile", "a big smile")},
    ),
)

HAIR = Attribute(
    name="hair",
    nouns=("the hair", "the hair colour"),
    values=("own", *DYES),
    commands=_table(
        ("make the hair {word}", "turn {whose} hair {word}", "give {who} {word} hair", "i want {word} hair",
         "change the hair colour to {word}"),
        {"own": ("natural",), **_same(DYES)},
        {
            "own": ("remove the hair dye", "wash the dye out of {whose} hair"),
            **{dye: (f"dye the hair {dye}", f"dye {{whose}} hair {dye}") for dye in DYES},
        },
    ),
    looks=_table(("the {word} hair", "{word} hair"), {"own": ("natural", "undyed"), **_same(DYES)}),
)  # fmt: skip

ATTRIBUTES: tuple[Attribute, ...] = (BACKGROUND, GLASSES, HAT, SHIRT, EXPRESSION, HAIR)
