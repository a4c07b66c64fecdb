"""The portrait world: pictures of which everything is known.

A subject is an identity (twelve numbers) and a view of it (five nuisance numbers); an edit sets one of six
attributes. `world_phrases` has the words of the edits, `world_portrait` draws.
"""

import math

import torch
from torch import Generator, Tensor

from nmlib import runtime
from nmlib.sources import Attribute, attribute_index, attribute_sizes
from nmlib.world_phrases import ATTRIBUTES
from nmlib.world_portrait import IDENTITY, NUISANCE, SUBJECT, draw_portraits

__all__ = ["IDENTITY", "NUISANCE", "SUBJECT", "WorldSource", "is_heldout"]

FRAMING_RANGE = (-0.15, 0.6)  # sampled framing: hat and shirt are in view, and no face is too small to read
CHUNK_PIXELS = 64 * 48 * 48  # pixels drawn at a time on a CPU, so that they stay in its cache

# The split: four identity numbers are cut into LEVELS levels each; a subject is held out when the levels add
# up to a multiple of LEVELS. That is 1 / LEVELS of the space, and any three of the four numbers stay uniform.
SPLIT_BY = ("skin", "hair", "face_width", "hair_length")
LEVELS = 8


def _levels(subjects: Tensor) -> Tensor:
    """The level, 0 to LEVELS - 1, of the identity numbers that decide the split, (B, 4) int64."""
    numbers = subjects[:, [IDENTITY.index(name) for name in SPLIT_BY]]
    return ((numbers + 1) / 2 * LEVELS).floor().long().clamp(0, LEVELS - 1)


def is_heldout(subjects: Tensor) -> Tensor:
    """Which subjects (B, S) belong to the held-out split, (B,) bool: a rule on the identity numbers alone."""
    return _levels(subjects).sum(1) % LEVELS == 0


def _framing(numbers: Tensor) -> Tensor:
    """Numbers in [-1, 1] spread over FRAMING_RANGE."""
    low, high = FRAMING_RANGE
    return low + (high - low) * (numbers + 1) / 2


class WorldSource:
    """Portraits with exactly known identity, view and edits; a `Source`.

    Args:
        image_size: height and width of the pictures, at least 16.

    Raises:
        ValueError: `image_size` below 16, where features are smaller than a pixel.
    """

    name = "world"
    attributes: tuple[Attribute, ...] = ATTRIBUTES
    names: tuple[str, ...] = ()

    def __init__(self, image_size: int) -> None:
        if image_size < 16:
            raise ValueError(f"image_size {image_size}: portraits need at least 16 pixels; use 32 or more")
        self.image_size = image_size

    def sample_subjects(self, count: int, split: str, generator: Generator) -> Tensor:
        """Draw subjects uniformly within a split.

        Args:
            count: how many.
            split: `train` (7/8 of the space) or `heldout` (1/8, spread evenly over the same range).
            generator: source of randomness; the result is on its device.

        Returns:
            Float tensor (count, S): identity numbers in [-1, 1], then nuisance numbers in [-1, 1], framing
            within FRAMING_RANGE.

        Raises:
            ValueError: an unknown split.
        """
        if split not in ("train", "heldout"):
            raise ValueError(f"split {split!r}: expected 'train' or 'heldout'")
        device = generator.device
        subjects = torch.rand(count, len(SUBJECT), generator=generator, device=device) * 2 - 1
        subjects[:, SUBJECT.index("framing")] = _framing(subjects[:, SUBJECT.index("framing")])
        # Three of the split's numbers are free and the last one's level follows: no rejection is needed.
        remainder = torch.zeros(count, dtype=torch.long, device=device)
        if split == "train":
            remainder = torch.randint(1, LEVELS, (count,), generator=generator, device=device)
        level = (remainder - _levels(subjects)[:, :-1].sum(1)) % LEVELS
        within = torch.rand(count, generator=generator, device=device) * 0.998 + 0.001  # rounding stays in the level
        subjects[:, IDENTITY.index(SPLIT_BY[-1])] = (level + within) / LEVELS * 2 - 1
        return subjects

    def other_view(self, subjects: Tensor, generator: Generator) -> Tensor:
        """The same people (B, S) in another pose, light and framing."""
        viewed = subjects.clone()
        drawn = torch.rand(len(subjects), len(NUISANCE), generator=generator, device=generator.device) * 2 - 1
        drawn[:, NUISANCE.index("framing")] = _framing(drawn[:, NUISANCE.index("framing")])
        viewed[:, len(IDENTITY) :] = drawn.to(subjects.device)
        return viewed

    def render(self, subjects: Tensor, values: Tensor) -> Tensor:
        """Draw exact pictures, the same for a batch as one by one.

        Args:
            subjects: float tensor (B, S); numbers outside [-1, 1] are clamped, framing outside [-2, 1]. Below -1 the
                whole body comes into view.
            values: int64 tensor (B, A), one value index for each attribute.

        Returns:
            Float32 tensor (B, 3, H, W) in [0, 1] on the device of `subjects`.

        Raises:
            ValueError: a wrong shape, or a value index that its attribute does not have.
        """
        self._check(subjects, values)
        return self._draw(subjects, values)

    def _draw(self, subjects: Tensor, values: Tensor) -> Tensor:
        """Draw states of the world's own attributes, a chunk at a time, on a GPU where there is one."""
        size, place = self.image_size, runtime.device()
        pictures = torch.empty(len(subjects), 3, size, size, device=subjects.device)
        subjects, values = subjects.to(place), values.to(place)
        budget = CHUNK_PIXELS * (1 if place.type == "cpu" else 256)
        chunk = max(1, budget // size**2)
        for start in range(0, len(subjects), chunk):
            part = slice(start, start + chunk)
            drawn = draw_portraits(subjects[part].float(), values[part], size)
            pictures[part] = drawn.permute(3, 0, 1, 2)
        return pictures

    def clip(
        self, subject: Tensor, frames: int, generator: Generator, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One identity in smooth motion, the stand-in for a video.

        Args:
            subject: float tensor (S,), whose identity is kept and whose view is where the motion is centred.
            frames: number of frames, at least 1.
            generator: source of randomness.
            values: int64 tensor (A,), the edits; expression is replaced by a changing one. All 0 if not given.

        Returns:
            Subjects (F, S) and values (F, A). Pose follows slow sines with periods of at least `frames`
            frames; expression holds each value for about a third of the clip.
        """
        device = subject.device
        subjects = subject.repeat(frames, 1)
        time = torch.linspace(0, 1, frames, device=device)[:, None]  # (F, 1)
        draws = torch.rand(3, len(NUISANCE), generator=generator, device=generator.device).to(device)
        swing = torch.sin(2 * math.pi * (time * (0.5 + 0.5 * draws[0]) + draws[1])) * (0.4 + 0.6 * draws[2])
        swing[:, NUISANCE.index("framing")] = _framing(swing[:, NUISANCE.index("framing")])
        # Half of the subject's own view and half of the motion: smooth, and within range without clamping.
        subjects[:, len(IDENTITY) :] = 0.5 * subjects[:, len(IDENTITY) :] + 0.5 * swing
        base = torch.zeros(len(self.attributes), dtype=torch.long) if values is None else values
        all_values = base.to(device).repeat(frames, 1)
        order = torch.randperm(3, generator=generator, device=generator.device).to(device)
        thirds = (torch.arange(frames, device=device) * 3).div(frames, rounding_mode="floor")
        all_values[:, attribute_index(self, "expression")] = order[thirds]
        return subjects, all_values

    def _check(self, subjects: Tensor, values: Tensor) -> None:
        """Raise ValueError unless these are states of this source."""
        sizes = attribute_sizes(self)
        if subjects.ndim != 2 or subjects.shape[1] != len(SUBJECT):
            raise ValueError(f"subjects {tuple(subjects.shape)}: expected (B, {len(SUBJECT)})")
        if values.shape != (len(subjects), len(sizes)):
            raise ValueError(f"values {tuple(values.shape)}: expected ({len(subjects)}, {len(sizes)})")
        limit = values.new_tensor(sizes)
        wrong = ((values < 0) | (values >= limit)).any(0).nonzero().flatten().tolist()
        if wrong:
            names = ", ".join(f"{self.attributes[i].name} (0 to {sizes[i] - 1})" for i in wrong)
            raise ValueError(f"values out of range for {names}")
