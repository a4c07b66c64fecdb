"""Conversations about people by name (paper, data 2).

Somebody is introduced with a picture and a name; later rounds use the name alone. What such a *recall* shows is
decided by the pairing, one for each stage of the paper's curriculum: the very picture of the introduction (`same`),
the whole person of whom the introduction shows the face alone (`masked`), or the person in another view (`paired`).
Between recalls come edits, rollbacks, other people, new names and new pictures for old names. What a recall does not
say stays as in the introduction.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from nmlib import phrases, rollback
from nmlib.config import DataConfig, PeopleConfig
from nmlib.conversation import Box, Conversation, ConversationError, Round
from nmlib.face_region import face_token_weights, mask_faces
from nmlib.names import names
from nmlib.people import PeopleSource
from nmlib.rollback import ConversationBuilder, ExactEditor, is_heldout_state
from nmlib.sources import Clip, IdentityClips, Source, attribute_index

ALWAYS = {"same": (), "masked": ("background", "shirt", "hat"), "paired": ("background",)}  # said in every recall
VIEW = ("framing", "pose")
OWN = "own"  # the value of an attribute that says: as the subject's numbers have it
PROBE_SEED = 80_000


@dataclass
class Cast:
    """Who is in a conversation under construction.

    Args:
        clips: of the people who may appear, in order; those after the first `people` stand in when an old name gets
            a new face.
        people: how many are introduced by a name of their own.
        unused: names left to give.
        shown: for each round that introduced somebody, the clip and the frame.
    """

    clips: Sequence[Clip]
    people: int
    unused: list[str]
    shown: dict[int, tuple[int, int]] = field(default_factory=dict)

    def absent(self, first: int, last: int) -> list[int]:
        """Clips from `first` up to `last` that were not shown yet."""
        seen = {clip for clip, _ in self.shown.values()}
        return [clip for clip in range(first, last) if clip not in seen]


class PeopleBuilder:
    """Draws conversations about people round by round.

    Args:
        source: where the people come from; edits and rollbacks need one whose states are known.
        settings: lengths, shares and pairing.
        split: `train` or `heldout`: phrasings, and in `train` combinations of values.
    """

    def __init__(self, source: IdentityClips, settings: PeopleConfig, split: str) -> None:
        self.source, self.settings, self.split = source, settings, split
        self.states = "train" if split == "train" else "any"
        self.exact = bool(source.attributes)
        edits = DataConfig(conversations=1, rounds=(2,), max_depth=3)
        editor = ExactEditor(cast(Source, source), self.states)
        self.edits = ConversationBuilder(source.attributes, editor, edits, split)

    def extend(self, conversation: Conversation, who: Cast, rng: random.Random) -> Conversation:
        """Add one round of a kind drawn by the settings' shares, or of one that is possible."""
        if who.absent(0, who.people) and (not len(conversation) or rng.random() < 0.5):
            return self.introduce(conversation, who, rng)
        kinds: dict[str, Callable[[], Conversation | None]] = {
            "recall": lambda: self.recall_somebody(conversation, who, rng),
            "rollback": lambda: self.roll_back(conversation, rng),
            "rename": lambda: self.rename(conversation, who, rng),
            "reintroduce": lambda: self.reintroduce(conversation, who, rng),
        }
        weights = [getattr(self.settings, f"{kind}_share") for kind in kinds]
        kinds["edit"] = lambda: self.edit(conversation, rng)
        first = rng.choices([*kinds], [*weights, max(0.0, 1 - sum(weights))])[0]
        for kind in (first, "recall", "edit"):
            if (made := kinds[kind]()) is not None:
                return made
        return self.reintroduce(conversation, who, rng)

    def introduce(self, conversation: Conversation, who: Cast, rng: random.Random) -> Conversation:
        """Introduce the next person, by a picture or a description."""
        return self._introduce(conversation, who, who.unused.pop(), who.absent(0, who.people)[0], rng)

    def reintroduce(self, conversation: Conversation, who: Cast, rng: random.Random) -> Conversation:
        """Give a name that is known another picture, of the same person or of somebody else."""
        people = conversation.people(len(conversation))
        name = rng.choice(sorted(people))
        same, others = who.shown[people[name]][0], who.absent(who.people, len(who.clips))
        return self._introduce(conversation, who, name, rng.choice([same, *others]), rng)

    def _introduce(
        self, conversation: Conversation, who: Cast, name: str, clip: int, rng: random.Random
    ) -> Conversation:
        shown = who.clips[clip]
        used = {frame for other, frame in who.shown.values() if other == clip}
        count = next(len(part) for part in (shown.values, shown.images) if part is not None)
        frame = rng.choice([number for number in range(count) if number not in used] or range(count))
        if shown.values is None or shown.subjects is None:
            item = Round(phrases.introduce_sentence(rng, name, self.split), "introduce", name=name)
        else:
            values = self._allowed(shown.values[frame].tolist(), rng)
            item = self._introduction(name, values, rng)
            item = replace(item, subject=tuple(shown.subjects[frame].tolist()))
        who.shown[len(conversation)] = (clip, frame)
        image = None if shown.images is None else self._seen(shown, frame)
        return _append(conversation, replace(item, face=shown.face(frame)), image)

    def _introduction(self, name: str, values: tuple[int, ...], rng: random.Random) -> Round:
        if rng.random() >= self.settings.describe_share:
            return Round(phrases.introduce_sentence(rng, name, self.split), "introduce", values=values, name=name)
        said = [place for place, attribute in enumerate(self.source.attributes) if attribute.name not in VIEW]
        attributes = [self.source.attributes[place] for place in said]
        text = phrases.introduce_by_words(rng, name, attributes, [values[place] for place in said], self.split)
        return Round(text, "describe", values=values, name=name, named=tuple(a.name for a in attributes))

    def _seen(self, clip: Clip, frame: int) -> Tensor:
        """What an introduction shows of a frame of pixels, (3, H, W)."""
        assert clip.images is not None
        if self.settings.pairing != "masked":
            return clip.images[frame]
        if clip.boxes is None:
            raise ConversationError(f"source {self.source.name!r}: pairing 'masked' needs face boxes, which it has not")
        return mask_faces(clip.images[frame : frame + 1], clip.boxes[frame : frame + 1])[0]

    def _allowed(self, values: Sequence[int], rng: random.Random) -> tuple[int, ...]:
        """A state of the split: the given one, or one near it."""
        state = list(values)
        while self.states == "train" and is_heldout_state(state):
            place = rng.choice([p for p, a in enumerate(self.source.attributes) if a.name not in VIEW])
            state[place] = rng.randrange(len(self.source.attributes[place].values))
        return tuple(state)

    def edit(self, conversation: Conversation, rng: random.Random) -> Conversation | None:
        """Edit the last picture; None where its state is not known, or only a face is shown."""
        last = len(conversation) - 1
        return self.edits.edit(conversation, last, rng) if self._editable(conversation, last) else None

    def _editable(self, conversation: Conversation, index: int) -> bool:
        hidden = self.settings.pairing == "masked" and conversation.rounds[index].kind == "introduce"
        return self.exact and not hidden

    def roll_back(self, conversation: Conversation, rng: random.Random) -> Conversation | None:
        """Go back to an earlier picture, with or without an edit; None if there is none to go back to."""
        last = len(conversation) - 1
        depths = [depth for depth in range(1, min(3, last) + 1) if self._editable(conversation, last - depth)]
        return self.edits.roll_back(conversation, rng.choice(depths), rng, rng.random() < 0.5) if depths else None

    def rename(self, conversation: Conversation, who: Cast, rng: random.Random) -> Conversation | None:
        """Call the person shown otherwise from now on, and edit the picture; None if nobody by name is shown."""
        last = len(conversation) - 1
        shown = conversation.path(last)[0]
        if shown not in conversation.people(len(conversation)).values() or not self._editable(conversation, last):
            return None
        made, name = self.edits.edit(conversation, last, rng), who.unused.pop()
        edit = made.rounds[-1].edit
        assert edit is not None
        attribute = self.source.attributes[attribute_index(cast(Source, self.source), edit.attribute)]
        text = phrases.rename_sentence(rng, name, lambda: phrases.edit_clause(rng, attribute, edit.value), self.split)
        renamed = replace(made.rounds[-1], instruction=text, name=name)
        return replace(made, rounds=(*made.rounds[:-1], renamed))

    def recall_somebody(self, conversation: Conversation, who: Cast, rng: random.Random) -> Conversation | None:
        """Recall somebody drawn by chance; None if everybody was introduced too long ago."""
        index = len(conversation)
        near = [n for n, base in sorted(conversation.people(index).items()) if index - base <= self.settings.max_delay]
        return self.recall(conversation, who, rng.choice(near), rng) if near else None

    def recall(self, conversation: Conversation, who: Cast, name: str, rng: random.Random) -> Conversation:
        """Ask for a picture of somebody by name.

        Raises:
            ConversationError: nobody has that name.
        """
        base = conversation.introduction(name, len(conversation))
        if base is None:
            raise ConversationError(f"conversation {conversation.id!r}: nobody was introduced as {name!r}")
        start, clip = conversation.rounds[base], who.clips[who.shown[base][0]]
        if start.values is None:
            text = phrases.recall_sentence(rng, name, (), (), self.split)
            picture, face = self._target(who, base, rng)
            return _append(conversation, Round(text, "recall", base, name=name, face=face), picture)
        values, named = self._asked(start.values, rng)
        places = [attribute_index(cast(Source, self.source), attribute) for attribute in named]
        attributes = [self.source.attributes[place] for place in places]
        text = phrases.recall_sentence(rng, name, attributes, [values[place] for place in places], self.split)
        item = Round(text, "recall", base, values=values, subject=start.subject, name=name, named=named)
        if clip.images is None:
            return _append(conversation, item, None)
        picture, face = self._target(who, base, rng)
        return _append(conversation, replace(item, face=face), picture)

    def _target(self, who: Cast, base: int, rng: random.Random) -> tuple[Tensor, Box | None]:
        """The picture of a recall from pixels (the introduction's frame, or another one of its clip) and its face."""
        number, frame = who.shown[base]
        clip = who.clips[number]
        assert clip.images is not None
        if self.settings.pairing == "paired":
            frame = rng.choice([other for other in range(len(clip.images)) if other != frame])
        return clip.images[frame], clip.face(frame)

    def _asked(self, start: tuple[int, ...], rng: random.Random) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The state that a recall shows, given that of the introduction, and the attributes that are said."""
        pairing, attributes = self.settings.pairing, self.source.attributes
        while True:
            named = self._said(rng)
            values = list(start)
            for place, attribute in enumerate(attributes):
                if attribute.name not in named or pairing == "same":
                    continue
                options = [value for value, word in enumerate(attribute.values) if attribute.details.get(word)]
                if attribute.values[start[place]] != OWN:  # nobody knows somebody's own hair who only saw it dyed
                    options = [value for value in options if attribute.values[value] != OWN]
                if attribute.name in VIEW:  # another view than that of the introduction
                    options = [value for value in options if value != start[place]]
                values[place] = rng.choice(options)
                if attribute.name == "framing":
                    far = rng.random() < self.settings.full_body_share
                    kept = [value for value in options if (attribute.values[value] == "full body") == far]
                    values[place] = rng.choice(kept or options)
            if self.states == "any" or pairing == "same" or not is_heldout_state(values):
                return tuple(values), tuple(a.name for a in attributes if a.name in named)

    def _said(self, rng: random.Random) -> set[str]:
        pairing = self.settings.pairing
        always = set(ALWAYS[pairing])
        if pairing == "paired":
            always |= set(rng.choice((("framing",), ("pose",), VIEW)))
        others = [a.name for a in self.source.attributes if a.name not in always and a.name not in VIEW]
        return always | set(rng.sample(others, rng.randint(1 if pairing == "same" else 0, 3)))


def _append(conversation: Conversation, item: Round, image: Tensor | None) -> Conversation:
    """Add a round, with its picture where that is known already."""
    images = None
    if image is not None:
        before = image[None, :0] if conversation.images is None else conversation.images
        images = torch.cat([before.reshape(-1, *image.shape), image[None]])  # (R + 1, 3, H, W)
    return replace(conversation, rounds=(*conversation.rounds, item), images=images)


def _new_cast(
    source: IdentityClips, settings: PeopleConfig, people: int, split: str, rng: random.Random, seed: int
) -> Cast:
    generator = torch.Generator().manual_seed(seed)
    count = people + (settings.reintroduce_share > 0)
    clips = source.clips(count, split, generator, settings.look_alike_distance)
    known = list(names(split))
    rng.shuffle(known)
    return Cast(clips, people, known)


def build_conversations(
    source: IdentityClips, settings: PeopleConfig, *, seed: int, split: str, name: str = "people"
) -> list[Conversation]:
    """Draw conversations about people; from an exact source without pictures, see `with_images`.

    Args:
        source: where the people come from.
        settings: lengths, shares and pairing.
        seed: seeds people, names, states and words.
        split: `train` or `heldout`: people, names, phrasings and (in `train`) combinations of values.
        name: prefix of the ids.
    """
    builder = PeopleBuilder(source, settings, split)
    conversations = []
    for index in range(settings.conversations):
        rng = random.Random(f"{seed}.{split}.{index}")
        people, rounds = rng.choice(settings.people), rng.choice(settings.rounds)
        who = _new_cast(source, settings, people, split, rng, rng.getrandbits(60))
        conversation = Conversation(f"{name}-{index:05d}", source.name, ())
        while len(conversation) < rounds - 1:
            conversation = builder.extend(conversation, who, rng)
        # The last round is a recall, if anybody can still be asked for.
        conversations.append(builder.recall_somebody(conversation, who, rng) or builder.extend(conversation, who, rng))
    return conversations


def probe_conversations(
    source: IdentityClips, settings: PeopleConfig, *, people: int, delay: int, seed: int = PROBE_SEED
) -> list[Conversation]:
    """Test conversations of one shape: introductions, then `delay - 1` rounds of other things, then a recall.

    People, names and phrasings are held out. All have their introductions at the same rounds, so that they can be
    run side by side.

    Args:
        source: where the people come from.
        settings: number, pairing and shares of recalls and rollbacks in between.
        people: how many are introduced.
        delay: rounds from the last introduction to the recall, 1 or more.
        seed: of people, names, states and words.
    """
    changes = {"describe_share": 0.0, "rename_share": 0.0, "reintroduce_share": 0.0, "max_delay": people + delay}
    settings = settings.model_copy(update=changes)
    builder = PeopleBuilder(source, settings, "heldout")
    conversations = []
    for index in range(settings.conversations):
        rng = random.Random(f"{seed}.{people}.{delay}.{index}")
        who = _new_cast(source, settings, people, "heldout", rng, rng.getrandbits(60))
        conversation = Conversation(f"people-{people}-{delay}-{index:04d}", source.name, ())
        while len(conversation) < people + delay - 1:
            step = builder.introduce if len(conversation) < people else builder.extend
            conversation = step(conversation, who, rng)
        asked = rng.choice(sorted(conversation.people(len(conversation))))
        conversations.append(builder.recall(conversation, who, asked, rng))
    return conversations


def with_images(source: PeopleSource, conversations: Sequence[Conversation], pairing: str) -> list[Conversation]:
    """Draw the pictures of conversations whose states are known.

    Args:
        source: draws them.
        conversations: as `build_conversations` makes them.
        pairing: with `masked`, introductions show the face alone.
    """
    drawn = rollback.with_images(source, conversations)
    if pairing != "masked":
        return drawn
    masked = []
    for conversation in drawn:
        assert conversation.images is not None
        images = conversation.images.clone()
        rows = [row for row, item in enumerate(conversation.rounds) if item.kind == "introduce"]
        images[rows] = mask_faces(images[rows], _boxes(source, [conversation.rounds[row] for row in rows]))
        masked.append(replace(conversation, images=images))
    return masked


def _boxes(source: PeopleSource, rounds: Sequence[Round]) -> Tensor:
    """Where the faces of rounds with known states are, (R, 4)."""
    subjects = torch.tensor([item.subject for item in rounds])  # (R, S)
    return source.face_boxes(subjects, torch.tensor([item.values for item in rounds]))


def face_weights(source: PeopleSource, tokens: int, weight: float) -> Callable[[Conversation], Tensor]:
    """Loss weights (R, N) of a conversation, to be computed beside its features.

    Args:
        source: knows where the faces of exact states are; rounds without one say it themselves (`found_face_weights`).
        tokens: N.
        weight: of a token inside the face, relative to one outside.
    """

    def weigh(told: Conversation) -> Tensor:
        if any(item.values is None for item in told.rounds):
            return found_face_weights(told, tokens, weight)
        return face_token_weights(_boxes(source, told.rounds), source.image_size, tokens, weight)  # (R, N)

    return weigh


def found_face_weights(told: Conversation, tokens: int, weight: float) -> Tensor:
    """Loss weights (R, N) of a conversation made of pixels; ones where a round does not say where its face is.

    Args:
        told: of which the rounds hold `face`.
        tokens: N.
        weight: of a token inside the face, relative to one outside.
    """
    boxes = torch.tensor([item.face or (0.0, 0.0, 0.0, 0.0) for item in told.rounds])  # (R, 4)
    return face_token_weights(boxes, 1, tokens, weight)  # (R, N)
