"""Photographs with exact photographic edits: the second embedded source of pictures.

A subject is a square crop of a photograph that the wheels of scikit-image, scikit-learn and matplotlib ship; nothing
is downloaded. Since they are few, crops to train on are also close-ups and have their colour channels in any order,
while held-out crops are shown as they were taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from nmlib import photo_edits
from nmlib.sources import Attribute

SMALLEST_CROP = {"train": 0.25, "heldout": 0.625}  # share of the photograph's short side; exact in float32
ORDERS = tuple(permutations(range(3)))  # of the colour channels; the first is the photograph's own
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
        Photo("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "matplotlib"),
        Photo("sklearn", "datasets/images/china.jpg", "scikit-learn"),
    ),
    "heldout": (
        Photo("skimage", "data/coffee.png", "scikit-image"),
        Photo("sklearn", "datasets/images/flower.jpg", "scikit-learn"),
    ),
}


class PhotoSource:
    """Square crops of photographs with seven photographic edits; a `Source`.

    A subject is (photo, x, y, size, order): index into `photos`, the crop's left and top edge as fractions of the room
    that the photograph leaves it, its side as a fraction of the photograph's short side, and an index into `ORDERS`.

    A photograph that somebody brings is in colour, neither mirrored nor turned. Mirror and turn are `relative` to how
    it was taken, which a conversation holds and one picture does not; nor does a grey picture hold its colours.

    Args:
        image_size: pixels a side, at least 16.

    Raises:
        ValueError: `image_size` is too small.
        PhotoError: a photograph is missing or damaged.
    """

    name = "photos"
    attributes: tuple[Attribute, ...] = photo_edits.ATTRIBUTES
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
            Float32 tensor (B, 5) as the class describes, B = `count`; the same for every `image_size`.

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
            subject = self._draw_crop(indices[place], split, generator)
            while not self._shows_every_edit(subject):
                subject = self._draw_crop(indices[place], split, generator)
            subjects.append(subject)
        return torch.tensor(subjects, dtype=torch.float32).reshape(count, 5)  # (B, 5)

    def other_view(self, subjects: Tensor, generator: Generator) -> Tensor:
        """The same crops (B, 5), each moved by at most a twentieth of its side, as far as the photograph reaches."""
        viewed = subjects.clone()
        sizes = torch.tensor([image.size for image in self._images], device=subjects.device)  # (P, 2)
        sizes = sizes[subjects[:, 0].long()]  # (B, 2)
        side = subjects[:, 3:4] * sizes.amin(1, keepdim=True)  # (B, 1)
        shift = 0.1 * torch.rand(len(subjects), 2, generator=generator) - 0.05  # (B, 2)
        moved = shift.to(subjects.device) * side / (sizes - side).clamp_min(1)  # (B, 2), shares of what is free
        viewed[:, 1:3] = (viewed[:, 1:3] + moved).clamp(0, 1)
        return viewed

    def render(self, subjects: Tensor, values: Tensor) -> Tensor:
        """Draw exact pictures.

        Args:
            subjects: float tensor (B, 5) as the class describes, sizes from 0.25 to 1.
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
            pictures[index] = np.asarray(photo_edits.apply(self._crop(subject, self.image_size), state))
        drawn = torch.from_numpy(pictures).permute(0, 3, 1, 2)  # (B, 3, H, W)
        return drawn.contiguous().to(subjects.device).float() / 255

    def _draw_crop(self, index: int, split: str, generator: Generator) -> list[float]:
        """A random subject (5,) of one photograph, in numbers that float32 holds exactly."""
        crop, smallest = torch.rand(3, generator=generator), SMALLEST_CROP[split]
        crop[2] = smallest + (1 - smallest) * crop[2]
        orders = len(ORDERS) if split == "train" else 1
        return [float(index), *crop.tolist(), float(torch.randint(orders, (), generator=generator))]

    def _crop(self, subject: Sequence[float], size: int) -> Image.Image:
        """The plain crop of a subject (5,) at `size` pixels a side."""
        image = self._images[int(subject[0])]
        side = subject[3] * min(image.size)
        left, top = subject[1] * (image.width - side), subject[2] * (image.height - side)
        # Pillow refuses a box that rounding puts a hair outside of the picture.
        box = (left, top, min(left + side, image.width), min(top + side, image.height))
        crop = image.resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=2.0)
        channels = crop.split()
        return Image.merge("RGB", [channels[place] for place in ORDERS[int(subject[4])]])

    def _shows_every_edit(self, subject: Sequence[float]) -> bool:
        """Whether each single edit changes the crop visibly: in clear sky neither blur nor mirror would."""
        crop, made = self._crop(subject, PROBE_SIZE), dict[tuple[str, ...], Image.Image]()
        for place, least in VISIBLE.items():
            state = {attribute.name: attribute.values[place] for attribute in self.attributes}
            states = [
                state | {attribute.name: value}
                for attribute in self.attributes
                for value in attribute.values
                if value != state[attribute.name]
            ]
            drawn = np.stack([np.asarray(photo_edits.apply(crop, each, made)) for each in (state, *states)])
            differences = drawn[1:].astype(np.int16) - drawn[0]  # (E, H, W, 3), E edits
            if (np.abs(differences).mean((1, 2, 3)) < 255 * least).any():
                return False
        return True

    def _check(self, subjects: Tensor, values: Tensor) -> None:
        expected = (len(subjects), 5), (len(subjects), len(self.attributes))
        if (tuple(subjects.shape), tuple(values.shape)) != expected:
            raise ValueError(
                f"subjects {tuple(subjects.shape)} and values {tuple(values.shape)}: expected (B, 5) and "
                f"(B, {len(self.attributes)})"
            )
        whole, limits = subjects[:, [0, 4]], torch.tensor([len(self.photos), len(ORDERS)], device=subjects.device)
        crop, smallest = subjects[:, 1:4], min(SMALLEST_CROP.values())  # (B, 3)
        known = ((whole >= 0) & (whole < limits) & (whole == whole.floor())).all(1)  # (B,)
        inside = ((crop >= 0) & (crop <= 1)).all(1) & (crop[:, 2] >= smallest)  # (B,)
        wrong = ~(known & inside)  # (B,)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"subject {row} is {subjects[row].tolist()}: expected a photo from 0 to {len(self.photos) - 1}, x and "
                f"y from 0 to 1, a size from {smallest} to 1, and an order from 0 to {len(ORDERS) - 1}"
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
