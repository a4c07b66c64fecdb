"""Where pictures come from: the interface every source of editable pictures offers.

A *state* is a subject (who or what is shown, continuous numbers) and one value index for every attribute
(what an edit can change). A source draws any state exactly, which is what makes ground truth exact: the
builder, the encoder, the model and the experiments only ever talk to this interface, never to a
particular source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

from nmlib.conversation import Box


@dataclass(frozen=True)
class Attribute:
    """One thing an edit can change, with the words people use for it.

    Args:
        name: identifier, for example `background`.
        nouns: noun phrases for content references, for example `the wall` in "before you changed the wall".
        values: names of the values, in index order; for example `("red", "blue")`.
        commands: value -> imperative clauses that set it, for example `"make the wall blue"`.
        looks: value -> noun phrases for the look it gives, for example `"the blue wall"`, used in "the one
            before the blue wall" and, joined by commas, in descriptions. A value with no visible look
            (for example no hat) has phrases such as `"no hat"`.
        relative: no single picture reveals the value for certain, because it is defined against the subject as
            it first was (a mirrored photograph). A conversation does: a picture that a person brings is how the subject
            first was, so that `brought` must be given.
        brought: the value of every picture that a person brings, which is as it was taken; None where it may be any.
        details: value -> clauses that say it of a person asked for by name, for example `"on a blue wall"`; one that
            contains `{name}` opens the sentence. A value without any cannot be said of a person.
    """

    name: str
    nouns: tuple[str, ...]
    values: tuple[str, ...]
    commands: Mapping[str, tuple[str, ...]]
    looks: Mapping[str, tuple[str, ...]]
    relative: bool = False
    brought: str | None = None
    details: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("commands", "looks"):
            phrases: Mapping[str, tuple[str, ...]] = getattr(self, name)
            if set(phrases) != set(self.values) or not all(phrases.values()):
                raise ValueError(
                    f"attribute {self.name!r}: {name} has phrases for {sorted(phrases)}, expected at least one for "
                    f"each of {sorted(self.values)}"
                )
        expected = [*self.values, *([] if self.relative else [None])]
        if self.brought not in expected:
            raise ValueError(f"attribute {self.name!r}: brought is {self.brought!r}, expected one of {expected}")


@runtime_checkable
class Source(Protocol):
    """A source of exactly editable pictures."""

    name: str
    image_size: int
    attributes: tuple[Attribute, ...]
    names: tuple[str, ...]  # first names of the people it can show; none where it shows nobody by name

    def sample_subjects(self, count: int, split: str, generator: Generator) -> Tensor:
        """Draw subjects; `split` is "train" or "heldout" and the two never share one.

        Returns:
            Float tensor (B, S), S numbers a subject.
        """
        ...

    def other_view(self, subjects: Tensor, generator: Generator) -> Tensor:
        """The same subjects (B, S) seen otherwise: another pose and light, or a slightly different crop."""
        ...

    def render(self, subjects: Tensor, values: Tensor) -> Tensor:
        """Draw exact pictures.

        Args:
            subjects: float tensor (B, S).
            values: int64 tensor (B, A), one value index for each attribute.

        Returns:
            Float32 tensor (B, 3, H, W) in [0, 1], H = W = `image_size`.
        """
        ...


@dataclass(frozen=True)
class Clip:
    """Pictures (frames) of one person: known exactly, or as pixels, or both.

    Args:
        subjects: (F, S) numbers of the person and the view in each frame, where known.
        values: (F, A) value indices of each frame, where known.
        images: uint8 (F, 3, H, W), where the frames cannot be drawn.
        boxes: (F, 4) left, top, right, bottom of the face in pixels, where known.
    """

    subjects: Tensor | None = None
    values: Tensor | None = None
    images: Tensor | None = None
    boxes: Tensor | None = None

    def face(self, frame: int) -> Box | None:
        """Where the face of a frame of pixels is, as shares of width and height; None where that is not known."""
        if self.boxes is None or self.images is None:
            return None
        left, top, right, bottom = (self.boxes[frame] / self.images.shape[-1]).tolist()
        return left, top, right, bottom


@runtime_checkable
class IdentityClips(Protocol):
    """A source of people, each seen in several frames."""

    name: str
    attributes: tuple[Attribute, ...]  # none where only pixels are known

    def clips(self, count: int, split: str, generator: Generator, distance: float | None = None) -> list[Clip]:
        """Draw people, at least two frames each; no person is in both splits.

        Args:
            count: how many different people.
            split: `train` or `heldout`.
            generator: source of randomness.
            distance: how far the others are from the first, where the source can tell.
        """
        ...


def attribute_sizes(source: Source) -> tuple[int, ...]:
    """Number of values of each attribute of a source, in order."""
    return tuple(len(attribute.values) for attribute in source.attributes)


def attribute_index(source: Source, name: str) -> int:
    """Position of an attribute by name; raises KeyError that lists the names."""
    names: Sequence[str] = [attribute.name for attribute in source.attributes]
    if name not in names:
        raise KeyError(f"source {source.name!r} has no attribute {name!r}; it has {', '.join(names)}")
    return names.index(name)
