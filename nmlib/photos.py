"""Photographs with exact photographic edits: the second embedded source of pictures.

A subject is a square crop of a photograph that the scikit-image or scikit-learn wheel ships; nothing is
downloaded. Pillow applies the edits always in one order, blur, mirror, turn, tone, tint, light, frame, so that a
state is one picture whatever the order of the conversation. Mirror acts on the scene and turn says where the top
of the scene points: mirroring a turned scene swaps its own left and right sides and leaves its top where it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Generator, Tensor

from nmlib.sources import Attribute

Colour = tuple[int, int, int]

TURNS = {
    "left": Image.Transpose.ROTATE_90,
    "right": Image.Transpose.ROTATE_270,
    "upside down": Image.Transpose.ROTATE_180,
}
SEPIA: tuple[Colour, Colour] = ((50, 20, 0), (255, 225, 110))  # for black and for white; yellower than brown fur
SEPIA_TABLE = [round(low + (high - low) * grey / 255) for low, high in zip(*SEPIA, strict=True) for grey in range(256)]
TINTS: dict[str, Colour] = {"blue": (0, 0, 255), "rose": (255, 0, 90)}
LIGHTS: dict[str, Colour] = {"bright": (255, 255, 255), "dark": (0, 0, 0)}
FRAMES: dict[str, Colour] = {"red": (220, 0, 30), "blue": (0, 70, 230), "green": (0, 160, 70), "gold": (255, 200, 0)}
# Tint and light together keep (1 - 0.2) * (1 - 0.3), or 56 %, of the contrast by which the other edits show.
TINT_SHARE = 0.2
LIGHT_SHARE = 0.3
BLUR_RADIUS = 1 / 18  # share of the picture's side
FRAME_WIDTH = 0.1  # share of the picture's side
SMALLEST_CROP = 0.625  # share of the photograph's short side; exact in float32
# Least mean absolute difference (of 1) that every single edit of a sampled crop makes, by value index of all
# attributes: in the plain picture, and in one with the last value of each, where contrast is least.
VISIBLE = {0: 0.03, -1: 0.01}
PROBE_SIZE = 32  # pixels a side at which it is measured, so that subjects do not depend on `image_size`


class PhotoError(RuntimeError):
    """A photograph that cannot be read; the message names the file and the package to install again."""


@dataclass(frozen=True)
class Photo:
    """A photograph inside an installed package: import name, folders and file, name on the package index."""

    module: str
    file: str
    package: str

    def load(self) -> Image.Image:
        """The decoded RGB photograph.

        Raises:
            PhotoError: the package or the file is missing, or the file is damaged.
        """
        spec = find_spec(self.module)
        advice = f"install it again with: pip install --force-reinstall --no-deps {self.package}"
        if spec is None or not spec.submodule_search_locations:
            raise PhotoError(f"photograph {self.file!r}: package {self.package!r} is not installed; {advice}")
        path = Path(spec.submodule_search_locations[0]) / self.file
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of them for damaged files
            problem = "is damaged" if path.exists() else "is missing"
            raise PhotoError(f"photograph {path} of package {self.package!r} {problem}; {advice}") from error


# Left out: motorcycle_right is motorcycle_left from a step aside; hubble_deep_field is almost black, retina and the
# sky of rocket are almost smooth, so that tone or blur would not show; color.png is no photograph.
PHOTOS: dict[str, tuple[Photo, ...]] = {
    "train": (
        Photo("skimage", "data/astronaut.png", "scikit-image"),
        Photo("skimage", "data/chelsea.png", "scikit-image"),
        Photo("skimage", "data/ihc.png", "scikit-image"),
        Photo("skimage", "data/motorcycle_left.png", "scikit-image"),
        Photo("sklearn", "datasets/images/china.jpg", "scikit-learn"),
    ),
    "heldout": (
        Photo("skimage", "data/coffee.png", "scikit-image"),
        Photo("sklearn", "datasets/images/flower.jpg", "scikit-learn"),
    ),
}


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


def _veil(image: Image.Image, colour: Colour, share: float) -> Image.Image:
    """Mix a colour into every pixel."""
    return Image.blend(image, Image.new("RGB", image.size, colour), share)


def _edit(image: Image.Image, state: Mapping[str, str]) -> Image.Image:
    """Apply a state, attribute name -> value, to a plain square RGB picture; the frame comes last and stays pure."""
    if state["blur"] == "blurred":
        image = image.filter(ImageFilter.GaussianBlur(image.width * BLUR_RADIUS))
    if state["mirror"] == "yes":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if state["turn"] in TURNS:
        image = image.transpose(TURNS[state["turn"]])
    if state["tone"] == "black and white":
        image = image.convert("L").convert("RGB")
    elif state["tone"] == "sepia":
        image = image.convert("L").convert("RGB").point(SEPIA_TABLE)
    if state["tint"] in TINTS:
        image = _veil(image, TINTS[state["tint"]], TINT_SHARE)
    if state["light"] in LIGHTS:
        image = _veil(image, LIGHTS[state["light"]], LIGHT_SHARE)
    if state["frame"] in FRAMES:
        width = round(image.width * FRAME_WIDTH)
        image = ImageOps.expand(ImageOps.crop(image, width), width, FRAMES[state["frame"]])
    return image


class PhotoSource:
    """Square crops of photographs with seven photographic edits; a `Source`.

    A subject is (photo, x, y, size): index into `photos`, the crop's left and top edge as fractions of the room
    that the photograph leaves it, and its side as a fraction of the photograph's short side.

    Mirror and turn are `relative`: they are defined against the photograph as it was taken, which a conversation
    holds and one picture does not.

    Args:
        image_size: pixels a side, at least 16.

    Raises:
        ValueError: `image_size` is too small.
        PhotoError: a photograph is missing or damaged.
    """

    name = "photos"
    attributes: tuple[Attribute, ...] = (TONE, MIRROR, TURN, BLUR, FRAME, LIGHT, TINT)
    names: tuple[str, ...] = ()

    def __init__(self, image_size: int) -> None:
        if image_size < 16:
            raise ValueError(f"image_size {image_size}: expected at least 16, smaller pictures show no details")
        self.image_size = image_size
        self.photos = tuple(photo for photos in PHOTOS.values() for photo in photos)
        self._images = [photo.load() for photo in self.photos]

    def sample_subjects(self, count: int, split: str, generator: Generator) -> Tensor:
        """Draw crops in which every single edit shows; every photograph of the split is equally likely.

        Args:
            count: number of subjects, 0 or more.
            split: `train` or `heldout`; no photograph is in both.
            generator: source of chance, on the CPU.

        Returns:
            Float32 tensor (B, 4) as the class describes, B = `count`; the same for every `image_size`.

        Raises:
            ValueError: an unknown split or a negative count.
        """
        if split not in PHOTOS:
            raise ValueError(f"split {split!r}: expected one of {', '.join(map(repr, PHOTOS))}")
        if count < 0:
            raise ValueError(f"count {count}: expected 0 or more")
        indices = [index for index, photo in enumerate(self.photos) if photo in PHOTOS[split]]
        subjects = []
        for place in torch.randint(len(indices), (count,), generator=generator).tolist():
            subject = self._draw_crop(indices[place], generator)
            while not self._shows_every_edit(subject):
                subject = self._draw_crop(indices[place], generator)
            subjects.append(subject)
        return torch.tensor(subjects, dtype=torch.float32).reshape(count, 4)  # (B, 4)

    def other_view(self, subjects: Tensor, generator: Generator) -> Tensor:
        """The same crops (B, 4), each moved by at most a twentieth of what is free."""
        viewed = subjects.clone()
        shift = 0.1 * torch.rand(len(subjects), 2, generator=generator) - 0.05  # (B, 2)
        viewed[:, 1:3] = (viewed[:, 1:3] + shift.to(subjects.device)).clamp(0, 1)
        return viewed

    def render(self, subjects: Tensor, values: Tensor) -> Tensor:
        """Draw exact pictures.

        Args:
            subjects: float tensor (B, 4) as the class describes, sizes from 0.625 to 1.
            values: int64 tensor (B, 7), one value index for each attribute.

        Returns:
            Float32 tensor (B, 3, H, W) in [0, 1], H = W = `image_size`, on the device of `subjects`.

        Raises:
            ValueError: wrong shapes, or a subject or value out of range.
        """
        self._check(subjects, values)
        pictures = np.empty((len(subjects), self.image_size, self.image_size, 3), dtype=np.uint8)
        for index, (subject, row) in enumerate(zip(subjects.tolist(), values.tolist(), strict=True)):
            state = {item.name: item.values[value] for item, value in zip(self.attributes, row, strict=True)}
            pictures[index] = np.asarray(_edit(self._crop(subject, self.image_size), state))
        drawn = torch.from_numpy(pictures).permute(0, 3, 1, 2)  # (B, 3, H, W)
        return drawn.contiguous().to(subjects.device).float() / 255

    def _draw_crop(self, index: int, generator: Generator) -> list[float]:
        """A random subject (4,) of one photograph, in numbers that float32 holds exactly."""
        crop = torch.rand(3, generator=generator)
        crop[2] = SMALLEST_CROP + (1 - SMALLEST_CROP) * crop[2]
        return [float(index), *crop.tolist()]

    def _crop(self, subject: Sequence[float], size: int) -> Image.Image:
        """The plain crop of a subject (4,) at `size` pixels a side."""
        image = self._images[int(subject[0])]
        side = subject[3] * min(image.size)
        left, top = subject[1] * (image.width - side), subject[2] * (image.height - side)
        # Pillow refuses a box that rounding puts a hair outside of the picture.
        box = (left, top, min(left + side, image.width), min(top + side, image.height))
        return image.resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=3.0)

    def _shows_every_edit(self, subject: Sequence[float]) -> bool:
        """Whether each single edit changes the crop visibly: in clear sky neither blur nor mirror would."""
        crop = self._crop(subject, PROBE_SIZE)
        for place, least in VISIBLE.items():
            state = {attribute.name: attribute.values[place] for attribute in self.attributes}
            start = np.asarray(_edit(crop, state), dtype=np.int16)  # (H, W, 3)
            for attribute in self.attributes:
                for value in set(attribute.values) - {state[attribute.name]}:
                    edited = np.asarray(_edit(crop, state | {attribute.name: value}), dtype=np.int16)  # (H, W, 3)
                    if np.abs(edited - start).mean() < 255 * least:
                        return False
        return True

    def _check(self, subjects: Tensor, values: Tensor) -> None:
        expected = (len(subjects), 4), (len(subjects), len(self.attributes))
        if (tuple(subjects.shape), tuple(values.shape)) != expected:
            raise ValueError(
                f"subjects {tuple(subjects.shape)} and values {tuple(values.shape)}: expected (B, 4) and "
                f"(B, {len(self.attributes)})"
            )
        photo, crop = subjects[:, 0], subjects[:, 1:]  # (B,), (B, 3)
        known = (photo >= 0) & (photo < len(self.photos)) & (photo == photo.floor())  # (B,)
        inside = ((crop >= 0) & (crop <= 1)).all(1) & (crop[:, 2] >= SMALLEST_CROP)  # (B,)
        wrong = ~(known & inside)  # (B,)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"subject {row} is {subjects[row].tolist()}: expected a photo from 0 to {len(self.photos) - 1}, x and "
                f"y from 0 to 1, and a size from {SMALLEST_CROP} to 1"
            )
        sizes = torch.tensor([len(attribute.values) for attribute in self.attributes], device=values.device)  # (A,)
        wrong = (values < 0) | (values >= sizes)  # (B, A)
        if wrong.any():
            row, place = wrong.nonzero()[0].tolist()
            attribute = self.attributes[place]
            raise ValueError(
                f"values of picture {row}: {attribute.name!r} is {int(values[row, place])}, expected 0 to "
                f"{len(attribute.values) - 1} ({', '.join(attribute.values)})"
            )
