"""The portrait world seen as a world of people: the same pictures, with the view as something to ask for.

Two attributes join the world's six: `framing` and `pose`. Their value `own` keeps the view that the subject's own
numbers say; every other value sets these numbers, so that a picture that was asked for is exactly known.
"""

from dataclasses import replace

import torch
from torch import Generator, Tensor

from nmlib.names import NAMES
from nmlib.sources import Attribute, Clip, attribute_index
from nmlib.world import WorldSource, is_heldout
from nmlib.world_canvas import FAR
from nmlib.world_phrases import ATTRIBUTES, BACKGROUND, COLOURS, DYES, EXPRESSION, GLASSES, HAIR, HAT, SHIRT
from nmlib.world_portrait import IDENTITY, SUBJECT, face_boxes

FRAMINGS = {"close-up": 1.0, "bust": -0.5, "full body": FAR}  # framing numbers; `own` lies between bust and close-up
POSES = {"front": 0.0, "left": -1.0, "right": 1.0}  # yaw as the viewer sees it
FRAMES = 4  # of a clip
MAX_DISTANCE = 1.0  # of look-alikes; further apart two people are not alike

FRAMING = Attribute(
    name="framing",
    nouns=("the framing", "the distance"),
    values=("own", *FRAMINGS),
    commands={
        "own": ("use the usual framing", "go to the usual distance"),
        "close-up": ("make it a close up", "move closer", "i want a close up", "change the framing to a close up"),
        "bust": ("make it a bust", "show the shoulders", "i want a bust", "change the framing to a bust"),
        "full body": ("show the whole body", "show the full body", "i want a full body picture", "move far away"),
    },
    looks={
        "own": ("the usual framing", "the usual distance"),
        "close-up": ("the close up", "a close up"),
        "bust": ("the bust", "a bust"),
        "full body": ("the full body", "the whole body"),
    },
    relative=True,
    brought="own",
    details={
        "close-up": ("a close up of {name}", "a close up picture of {name}", "{name} close up"),
        "bust": ("a bust of {name}", "{name} from the chest up", "{name} down to the shoulders"),
        "full body": ("a full body picture of {name}", "{name} from head to toe", "a picture of all of {name}"),
    },
)

POSE = Attribute(
    name="pose",
    nouns=("the pose", "the view"),
    values=("own", *POSES),
    commands={
        "own": ("use the usual pose", "go to the usual view"),
        "front": ("turn the head to the front", "look at the camera", "face the camera"),
        "left": ("turn the head to the left", "look to the left", "look left"),
        "right": ("turn the head to the right", "look to the right", "look right"),
    },
    looks={
        "own": ("the usual pose", "the usual view"),
        "front": ("the look at the camera", "a look at the camera"),
        "left": ("the look to the left", "a look to the left"),
        "right": ("the look to the right", "a look to the right"),
    },
    relative=True,
    brought="own",
    details={
        "front": ("looking at the camera", "facing the camera", "from the front"),
        "left": ("looking left", "looking to the left", "turned to the left"),
        "right": ("looking right", "looking to the right", "turned to the right"),
    },
)


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _colours(*templates: str) -> dict[str, tuple[str, ...]]:
    return {colour: tuple(template.format(a_word=_article(colour)) for template in templates) for colour in COLOURS}


def _worn(attribute: Attribute, article: bool) -> dict[str, tuple[str, ...]]:
    noun = "" if article else f" {attribute.name}"
    details: dict[str, tuple[str, ...]] = {
        "none": (f"without {'a hat' if article else 'glasses'}", f"with no {attribute.name}")
    }
    for value in attribute.values[1:]:
        worn = (_article(value) if article else value) + noun
        details[value] = (f"with {worn}", f"wearing {worn}")
    return details


PEOPLE_ATTRIBUTES: tuple[Attribute, ...] = (
    replace(BACKGROUND, details=_colours("on {a_word} wall", "in front of {a_word} wall", "on {a_word} background")),
    replace(GLASSES, details=_worn(GLASSES, article=False)),
    replace(HAT, details=_worn(HAT, article=True)),
    replace(SHIRT, details=_colours("in {a_word} shirt", "wearing {a_word} shirt", "in {a_word} sweater")),
    replace(
        EXPRESSION,
        details={
            "neutral": ("looking calm", "with a neutral face"),
            "smile": ("smiling", "with a big smile", "looking happy"),
            "surprised": ("looking surprised", "looking amazed", "with a surprised face"),
        },
    ),
    replace(
        HAIR,
        details={
            "own": ("with natural hair", "with undyed hair"),
            **{dye: (f"with {dye} hair", f"with the hair dyed {dye}") for dye in DYES},
        },
    ),
    FRAMING,
    POSE,
)


class PeopleSource(WorldSource):
    """Portraits of people whose framing and pose can be asked for; a `Source`, and the pictures of `WorldSource`.

    Args:
        image_size: height and width of the pictures, at least 16.
    """

    name = "people"
    attributes = PEOPLE_ATTRIBUTES
    names = NAMES

    def viewed(self, subjects: Tensor, values: Tensor) -> Tensor:
        """The subjects (B, S) with the view that their values (B, A) ask for."""
        viewed = subjects.clone()
        for attribute, numbers, number in (("framing", FRAMINGS, "framing"), ("pose", POSES, "yaw")):
            place, column = attribute_index(self, attribute), SUBJECT.index(number)
            table = subjects.new_tensor([0.0, *numbers.values()])
            asked = values[:, place].to(subjects.device)  # (B,)
            viewed[:, column] = torch.where(asked > 0, table[asked], viewed[:, column])
        for number in ("shift_x", "shift_y", "lighting"):  # `asked` is that of the pose, the last one
            viewed[:, SUBJECT.index(number)] *= (asked == 0).to(subjects.dtype)
        return viewed

    def render(self, subjects: Tensor, values: Tensor) -> Tensor:
        """Draw exact pictures; see `WorldSource.render`."""
        self._check(subjects, values)
        return self._draw(self.viewed(subjects, values), values[:, : len(ATTRIBUTES)])

    def face_boxes(self, subjects: Tensor, values: Tensor) -> Tensor:
        """Where the faces are; see `world_portrait.face_boxes`.

        Args:
            subjects: (B, S).
            values: (B, A).

        Returns:
            (B, 4) left, top, right, bottom in pixels, within the picture.
        """
        self._check(subjects, values)
        return face_boxes(self.viewed(subjects, values).float(), self.image_size)

    def clips(self, count: int, split: str, generator: Generator, distance: float | None = None) -> list[Clip]:
        """People with random looks in clips of FRAMES frames; see `IdentityClips.clips`."""
        subjects = self.sample_subjects(count, split, generator)  # (count, S)
        if distance is not None and count > 1:
            alike = self.look_alikes(subjects[0], count - 1, distance, generator)
            subjects = torch.cat([subjects[:1], self.other_view(alike, generator)])
        made = []
        for subject in subjects:
            looks = [torch.randint(len(a.values), (1,), generator=generator) for a in ATTRIBUTES]
            own = torch.zeros(len(self.attributes) - len(ATTRIBUTES), dtype=torch.long)  # framing and pose
            made.append(Clip(*self.clip(subject, FRAMES, generator, torch.cat([*looks, own]))))
        return made

    def look_alikes(self, subject: Tensor, count: int, distance: float, generator: Generator) -> Tensor:
        """People of the same split who differ from one by a given distance, in the same view.

        Args:
            subject: (S,).
            count: how many.
            distance: Euclidean distance of the identity numbers, above 0 and at most MAX_DISTANCE; two people drawn
                by chance are about 2.8 apart.
            generator: source of randomness.

        Returns:
            (count, S).

        Raises:
            ValueError: a distance out of range.
        """
        if not 0 < distance <= MAX_DISTANCE:
            raise ValueError(f"distance {distance}: look-alikes are above 0 and at most {MAX_DISTANCE} apart")
        found = subject.new_empty(0, len(subject))
        held = is_heldout(subject[None])
        while len(found) < count:
            drawn = subject.repeat(16 * count, 1)  # (K, S)
            steps = torch.randn(len(drawn), len(IDENTITY), generator=generator, device=generator.device)
            steps = (steps / steps.norm(dim=1, keepdim=True) * distance).to(subject)
            own = drawn[:, : len(IDENTITY)]
            steps = torch.where((own + steps).abs() > 1, -steps, steps)  # the other way, where it leaves the range
            drawn[:, : len(IDENTITY)] = own + steps
            found = torch.cat([found, drawn[is_heldout(drawn) == held]])
        return found[:count]
