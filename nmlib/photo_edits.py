"""Photographic edits: how they are asked for in words, and what they do to a picture.

Pillow applies them always in one order, blur, mirror, turn, tone, tint, light, frame, so that a state is one picture
whatever the order of the conversation. Mirror acts on the scene and turn says where the top of the scene points:
mirroring a turned scene swaps its own left and right sides and leaves its top where it is.
"""

from collections.abc import Callable, Mapping, Sequence

from PIL import Image, ImageFilter, ImageOps

from nmlib.sources import Attribute

Colour = tuple[int, int, int]

TURNS = {
    "left": Image.Transpose.ROTATE_90,
    "right": Image.Transpose.ROTATE_270,
    "upside down": Image.Transpose.ROTATE_180,
}
SEPIA: tuple[Colour, Colour] = ((50, 20, 0), (255, 225, 110))  # for black and for white; yellower than brown fur
SEPIA_TABLE = [round(low + (high - low) * grey / 255) for grey in range(256) for low, high in zip(*SEPIA, strict=True)]
TINTS: dict[str, Colour] = {"blue": (0, 0, 255), "rose": (255, 0, 90)}
LIGHTS: dict[str, Colour] = {"bright": (255, 255, 255), "dark": (0, 0, 0)}
FRAMES: dict[str, Colour] = {"red": (220, 0, 30), "blue": (0, 70, 230), "green": (0, 160, 70), "gold": (255, 200, 0)}
# Tint and light together keep (1 - 0.2) * (1 - 0.3), or 56 %, of the contrast by which the other edits show.
TINT_SHARE = 0.2
LIGHT_SHARE = 0.3
BLUR_RADIUS = 1 / 18  # share of the picture's side
FRAME_WIDTH = 0.1  # share of the picture's side


def _fill(templates: Sequence[str], words: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Every template with the word of each value."""
    return {value: tuple(template.format(word) for template in templates) for value, word in words.items()}


def _without(*nouns: str) -> tuple[str, ...]:
    """Commands that take something away."""
    templates = ("remove {}", "take {} away", "drop {}", "get rid of {}", "leave {} out")
    return tuple(template.format(noun) for noun in nouns for template in templates)


def _same(values: Sequence[str]) -> dict[str, str]:
    """Values that are their own words."""
    return {value: value for value in values}


# Commands name the wanted state ("bright", "the top points left"), never a step from the present one ("brighter",
# "a quarter to the left"), which would mean different values in different states.
TONE = Attribute(
    name="tone",
    nouns=("the tone", "the colour scheme"),
    values=("colour", "black and white", "sepia"),
    commands=_fill(
        ("make it {}", "show it in {}", "put it in {}", "switch it to {}", "set the tone to {}"),
        {"colour": "full colour", "black and white": "black and white", "sepia": "sepia"},
    ),
    looks={
        "colour": ("full colour", "natural colours"),
        "black and white": ("black and white", "the black and white look"),
        "sepia": ("sepia", "the sepia look"),
    },
    brought="colour",
)
MIRROR = Attribute(
    name="mirror",
    nouns=("the mirroring", "the mirror effect"),
    values=("no", "yes"),
    commands={
        "no": _without("the mirroring", "the mirror effect"),
        "yes": (
            *("mirror it", "mirror the scene", "make it a mirror image", "show its mirror image"),
            *("add a mirror effect", "swap its left and right sides", "flip its left and right sides"),
        ),
    },
    looks={"no": ("no mirroring", "no mirror effect"), "yes": ("the mirror image", "the swapped sides")},
    relative=True,
    brought="no",
)
_POINTS = {"upright": "up", "left": "left", "right": "right", "upside down": "down"}
_LIES = {
    "upright": ("stand it upright", "set it upright"),
    "left": ("lay it on its left side", "tip it onto its left side"),
    "right": ("lay it on its right side", "tip it onto its right side"),
    "upside down": ("turn it upside down", "put it upside down"),
}
_TURN_COMMANDS = (
    *("turn it so the top points {}", "rotate it so the top points {}"),
    *("make the top point {}", "have its top point {}"),
)
TURN = Attribute(
    name="turn",
    nouns=("the rotation", "the orientation"),
    values=tuple(_POINTS),
    commands={value: (*filled, *_LIES[value]) for value, filled in _fill(_TURN_COMMANDS, _POINTS).items()},
    looks=_fill(("the top pointing {}", "its top turned {}"), _POINTS),
    relative=True,
    brought="upright",
)
BLUR = Attribute(
    name="blur",
    nouns=("the blur", "the sharpness", "the focus"),
    values=("sharp", "blurred"),
    commands={
        "sharp": ("sharpen it", "make it sharp", "put it in focus", *_without("the blur")),
        "blurred": (
            "blur it",
            "make it blurred",
            "soften it",
            "add a blur",
            "give it a soft blur",
            "put it out of focus",
        ),
    },
    looks={"sharp": ("no blur", "sharp focus"), "blurred": ("the soft blur", "the blurred look")},
)
FRAME = Attribute(
    name="frame",
    nouns=("the frame", "the border"),
    values=("none", *FRAMES),
    commands={
        "none": _without("the frame", "the border"),
        **_fill(
            (
                *("put a {} frame around it", "add a {} frame", "make the frame {}"),
                *("give it a {} border", "add a {} border", "make the border {}"),
            ),
            _same(tuple(FRAMES)),
        ),
    },
    looks={"none": ("no frame", "no border"), **_fill(("the {} frame", "the {} border"), _same(tuple(FRAMES)))},
)
LIGHT = Attribute(
    name="light",
    nouns=("the lighting", "the exposure"),
    values=("normal", *LIGHTS),
    commands=_fill(
        (
            *("make the lighting {}", "give it {} lighting", "show it in {} lighting"),
            *("make the exposure {}", "set the exposure to {}", "give it a {} exposure"),
        ),
        _same(("normal", *LIGHTS)),
    ),
    looks=_fill(("{} lighting", "the {} exposure"), _same(("normal", *LIGHTS))),
)
TINT = Attribute(
    name="tint",
    nouns=("the tint", "the colour cast"),
    values=("none", *TINTS),
    commands={
        "none": _without("the tint", "the colour cast"),
        **_fill(
            (
                *("tint it {}", "make the tint {}", "give it a {} tint", "add a {} tint"),
                *("give it a {} cast", "add a {} cast"),
            ),
            _same(tuple(TINTS)),
        ),
    },
    looks={"none": ("no tint", "no colour cast"), **_fill(("the {} tint", "the {} cast"), _same(tuple(TINTS)))},
)

ATTRIBUTES = (TONE, MIRROR, TURN, BLUR, FRAME, LIGHT, TINT)


def _blur(image: Image.Image, value: str) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(image.width * BLUR_RADIUS)) if value == "blurred" else image


def _mirror(image: Image.Image, value: str) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if value == "yes" else image


def _turn(image: Image.Image, value: str) -> Image.Image:
    return image.transpose(TURNS[value]) if value in TURNS else image


def _tone(image: Image.Image, value: str) -> Image.Image:
    if value == "colour":
        return image
    grey = image.convert("L")
    if value == "sepia":
        grey.putpalette(SEPIA_TABLE)
    return grey.convert("RGB")


def _veil(image: Image.Image, colour: Colour | None, share: float) -> Image.Image:
    """Mix a colour into every pixel."""
    return image if colour is None else Image.blend(image, Image.new("RGB", image.size, colour), share)


def _tint(image: Image.Image, value: str) -> Image.Image:
    return _veil(image, TINTS.get(value), TINT_SHARE)


def _light(image: Image.Image, value: str) -> Image.Image:
    return _veil(image, LIGHTS.get(value), LIGHT_SHARE)


def _frame(image: Image.Image, value: str) -> Image.Image:
    """The frame covers the rim of the picture, so that its size stays."""
    if value not in FRAMES:
        return image
    width = round(image.width * FRAME_WIDTH)
    return ImageOps.expand(ImageOps.crop(image, width), width, FRAMES[value])


# In the order in which they are applied; the frame comes last and stays pure.
STEPS: dict[str, Callable[[Image.Image, str], Image.Image]] = {
    "blur": _blur,
    "mirror": _mirror,
    "turn": _turn,
    "tone": _tone,
    "tint": _tint,
    "light": _light,
    "frame": _frame,
}


def apply(
    image: Image.Image, state: Mapping[str, str], made: dict[tuple[str, ...], Image.Image] | None = None
) -> Image.Image:
    """A plain square RGB picture in a state.

    Args:
        image: as it was taken.
        state: attribute name -> value, of every attribute.
        made: pictures of this image that were made before, by the values of the first steps; new ones are added.
    """
    made = {} if made is None else made
    done: tuple[str, ...] = ()
    for name, step in STEPS.items():
        done = (*done, state[name])
        if done not in made:
            made[done] = step(image, state[name])
        image = made[done]
    return image
