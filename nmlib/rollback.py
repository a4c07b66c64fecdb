"""Rollback-style conversations from any Markov chain (paper, data 1).

A builder walks along a conversation, and at some rounds goes back to an older base instead of the last picture:
undo k rounds, return to picture j, return to before a named edit, return to the start, each with or without a
new edit from there (a branch). Pictures that no chain contains come from an `Editor`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nmlib import phrases
from nmlib.config import DataConfig
from nmlib.conversation import Conversation, ConversationError, Edit, Reference, Round
from nmlib.sources import Attribute, Source, attribute_index

HELDOUT_STATES = 8


def is_heldout_state(values: Sequence[int]) -> bool:
    """Whether a combination of attribute values is kept out of training (one in eight, in a lattice)."""
    return sum((2 * place + 1) * value for place, value in enumerate(values)) % HELDOUT_STATES == 0


class Editor(Protocol):
    """Supplies new edits and their pictures."""

    def propose(self, conversation: Conversation, base: int, rng: random.Random) -> tuple[Edit | None, str] | None:
        """A new edit of the picture of round `base`, as (structured edit if known, clause); None if there is none."""
        ...

    def apply(
        self, conversation: Conversation, base: int, edit: Edit | None, clause: str
    ) -> tuple[tuple[int, ...] | None, Tensor | None]:
        """The edited picture as (exact state if known, uint8 image (3, H, W) or None if it can be rendered later)."""
        ...


@dataclass(frozen=True)
class ExactEditor:
    """Edits in a source that draws every state exactly.

    Args:
        source: the source of pictures.
        split: `train` keeps away from held-out combinations of values; `any` does not.
    """

    source: Source
    split: str = "train"

    def propose(self, conversation: Conversation, base: int, rng: random.Random) -> tuple[Edit | None, str] | None:
        """A uniformly drawn attribute set to a uniformly drawn other value."""
        values = _known_values(conversation, base)
        for _ in range(100):
            place = rng.randrange(len(self.source.attributes))
            attribute = self.source.attributes[place]
            value = rng.choice([v for v in range(len(attribute.values)) if v != values[place]])
            if self.split == "any" or not is_heldout_state((*values[:place], value, *values[place + 1 :])):
                edit = Edit(attribute.name, attribute.values[value])
                return edit, phrases.edit_clause(rng, attribute, edit.value)
        return None

    def apply(
        self, conversation: Conversation, base: int, edit: Edit | None, clause: str
    ) -> tuple[tuple[int, ...] | None, Tensor | None]:
        """The state with one value changed; the picture is rendered with all others at the end."""
        values = list(_known_values(conversation, base))
        if edit is not None:
            place = attribute_index(self.source, edit.attribute)
            values[place] = self.source.attributes[place].values.index(edit.value)
        return tuple(values), None


def _known_values(conversation: Conversation, index: int) -> tuple[int, ...]:
    values = conversation.rounds[index].values
    if values is None:
        raise ConversationError(
            f"conversation {conversation.id!r}, round {index}: field 'values' is empty; exact edits need the state"
        )
    return values


class ConversationBuilder:
    """Draws conversations round by round.

    Args:
        attributes: words for references by content; empty for sources without attributes.
        editor: supplies new edits.
        settings: lengths, share of rollbacks, deepest rollback.
        split: phrasings to use: `train`, `heldout` or `any`.
    """

    def __init__(self, attributes: Sequence[Attribute], editor: Editor, settings: DataConfig, split: str) -> None:
        self.attributes = {attribute.name: attribute for attribute in attributes}
        self.editor, self.settings, self.split = editor, settings, split

    def extend(self, conversation: Conversation, rng: random.Random) -> Conversation:
        """Add one round: a rollback with probability `rollback_share`, else an edit of the last picture.

        The kind of reference is drawn before the base: drawn the other way round, references by content, which few
        pictures allow, would be too rare to be learned.
        """
        last = len(conversation) - 1
        if last >= 1 and rng.random() < self.settings.rollback_share:
            kinds = self._depths_by_reference(conversation, rng)
            weights = [self.settings.content_weight if kind == "content" else 1 for kind in sorted(kinds)]
            kind = rng.choices(sorted(kinds), weights)[0]
            return self.roll_back(conversation, rng.choice(kinds[kind]), rng, branch=rng.random() < 0.5, reference=kind)
        return self.edit(conversation, last, rng)

    def _depths_by_reference(self, conversation: Conversation, rng: random.Random) -> dict[Reference, list[int]]:
        """Depths within the settings' bounds that each kind of reference can name."""
        found: dict[Reference, list[int]] = {}
        counted, last = self.settings.max_depth, len(conversation) - 1
        named = self.settings.named_depth or counted
        for depth in range(1, min(max(named, counted), last) + 1):
            for kind in self.references(conversation, last - depth, rng):
                if depth <= (counted if kind == "count" else named):
                    found.setdefault(kind, []).append(depth)
        return found

    def edit(self, conversation: Conversation, base: int, rng: random.Random) -> Conversation:
        """Add a new edit of the last picture."""
        proposal = self.editor.propose(conversation, base, rng)
        if proposal is None:
            raise ConversationError(f"conversation {conversation.id!r}: no edit left to make from round {base}")
        edit, clause = proposal
        if edit is None:
            instruction = clause
        else:
            attribute, value = self.attributes[edit.attribute], edit.value
            instruction = phrases.edit_sentence(rng, attribute, value, self.split)
        return self._append(conversation, Round(instruction, "edit", base, edit), clause)

    def roll_back(
        self,
        conversation: Conversation,
        depth: int,
        rng: random.Random,
        branch: bool,
        reference: Reference | None = None,
    ) -> Conversation:
        """Add a round that starts from the picture `depth` rounds before the last one.

        Args:
            conversation: at least `depth + 1` rounds.
            depth: 1 or more.
            rng: source of chance.
            branch: also apply a new edit there.
            reference: how to name the base; None draws among those that name it unambiguously.

        Raises:
            ConversationError: the conversation is too short, or the wanted reference would be ambiguous.
        """
        base = len(conversation) - 1 - depth
        if depth < 1 or base < 0:
            raise ConversationError(
                f"conversation {conversation.id!r}: depth {depth} does not exist after {len(conversation)} rounds; "
                f"expected 1 to {len(conversation) - 1}"
            )
        options = self.references(conversation, base, rng)
        if reference is not None and reference not in options:
            raise ConversationError(
                f"conversation {conversation.id!r}: round {base} cannot be named by {reference!r}; "
                f"possible: {sorted(options)}"
            )
        kind: Reference = rng.choice(sorted(options)) if reference is None else reference
        proposal = self.editor.propose(conversation, base, rng) if branch else None
        edit, clause = proposal if proposal else (None, "")
        command = self._command(edit, clause, rng) if proposal else None
        instruction = phrases.rollback_sentence(rng, options[kind], command, self.split)
        return self._append(conversation, Round(instruction, "rollback", base, edit, kind), clause)

    def _command(self, edit: Edit | None, clause: str, rng: random.Random) -> Callable[[], str]:
        if edit is None:
            return lambda: clause
        attribute, value = self.attributes[edit.attribute], edit.value
        return lambda: phrases.edit_clause(rng, attribute, value)

    def references(
        self, conversation: Conversation, base: int, rng: random.Random
    ) -> dict[Reference, Callable[[], str]]:
        """Ways to name the picture of round `base` without ambiguity, each a maker of clauses."""
        depth = len(conversation) - 1 - base
        found: dict[Reference, Callable[[], str]] = {"ordinal": lambda: phrases.ordinal_clause(rng, base)}
        if depth <= len(phrases.NUMBERS):
            found["count"] = lambda: phrases.count_clause(rng, depth)
        if base == 0:
            found["start"] = lambda: phrases.start_clause(rng)
        makers = self._content_references(conversation, base, rng)
        if makers:
            found["content"] = rng.choice(makers)
        return found

    def _content_references(self, conversation: Conversation, base: int, rng: random.Random) -> list[Callable[[], str]]:
        edits = [(index, item) for index, item in enumerate(conversation.rounds) if item.kind in ("edit", "rollback")]
        makers: list[Callable[[], str]] = []
        for index, item in edits:
            # "The one before the hat" is the picture *shown* before it: the previous round, which is its base.
            if item.base != base or index != base + 1 or item.kind != "edit":
                continue
            if item.edit is None:
                said = [phrases.clean(other.instruction) for _, other in edits]
                if said.count(phrases.clean(item.instruction)) == 1:
                    makers.append(lambda text=item.instruction: phrases.quote_clause(rng, text))  # type: ignore[misc]
                continue
            changes = [other.edit for _, other in edits if other.edit is not None]
            attribute, value = self.attributes[item.edit.attribute], item.edit.value
            recalled = any(attribute.name in other.named for other in conversation.rounds)
            if sum(edit.attribute == attribute.name for edit in changes) == 1 and not recalled:
                makers.append(lambda a=attribute, v=value: phrases.content_clause(rng, a, v, True))  # type: ignore[misc]
            if changes.count(item.edit) == 1 and not self._starts_with(conversation, item.edit):
                makers.append(lambda a=attribute, v=value: phrases.content_clause(rng, a, v, False))  # type: ignore[misc]
        return makers

    def _starts_with(self, conversation: Conversation, edit: Edit) -> bool:
        """Whether a picture that no edit made has the look of an edit, so that "before the hat" would mislead."""
        place = list(self.attributes).index(edit.attribute)
        value = self.attributes[edit.attribute].values.index(edit.value)
        unedited = [item.values for item in conversation.rounds if item.kind not in ("edit", "rollback")]
        return any(values is not None and values[place] == value for values in unedited)

    def _append(self, conversation: Conversation, item: Round, clause: str) -> Conversation:
        assert item.base is not None
        images = conversation.images
        if item.edit is None and not clause:  # a pure rollback shows its base again
            values, image = conversation.rounds[item.base].values, None if images is None else images[item.base]
        else:
            values, image = self.editor.apply(conversation, item.base, item.edit, clause)
        if images is not None:  # a picture that is to be drawn later leaves none: `with_images` draws them all
            images = None if image is None else torch.cat([images, image[None]])  # (R + 1, 3, H, W)
        made = replace(item, values=values, subject=conversation.rounds[item.base].subject)
        return replace(conversation, rounds=(*conversation.rounds, made), images=images)


def from_chain(chain: Conversation, builder: ConversationBuilder, rng: random.Random, rounds: int) -> Conversation:
    """Turn any Markov chain into a non-Markov conversation.

    The chain's own rounds come first, as many as leave room; rollbacks and branches from its states follow.

    Args:
        chain: a Markov conversation, from the world or from any data set.
        builder: draws the added rounds.
        rng: source of chance.
        rounds: length of the result.

    Raises:
        ConversationError: the chain is not Markov, or has fewer than two rounds.
    """
    if not chain.is_markov or len(chain) < 2:
        raise ConversationError(f"conversation {chain.id!r}: expected a Markov chain of at least two rounds")
    kept = rng.randint(2, max(2, min(len(chain), rounds - 1)))
    conversation = chain.prefix(kept)
    while len(conversation) < rounds:
        conversation = builder.extend(conversation, rng)
    return conversation


def open_conversation(
    source: Source, id_: str, subject: Tensor, rng: random.Random, *, split: str, describe: bool = False
) -> Conversation:
    """A conversation of one round, with a random state of the source; of a picture brought, as it is.

    Nobody can tell from a picture of something unknown which way up it was taken, nor from a grey one its colours. So
    attributes of a picture that a person brings have their value `brought`, where there is one, and all that is asked
    later has an answer.

    Args:
        source: an exact source.
        id_: unique name.
        subject: (S,) numbers of the subject.
        rng: source of chance.
        split: `train` keeps away from held-out combinations.
        describe: the picture is made from words rather than brought by the person.
    """
    while True:
        values = tuple(
            rng.randrange(len(attribute.values))
            if describe or attribute.brought is None
            else attribute.values.index(attribute.brought)
            for attribute in source.attributes
        )
        if split == "any" or not is_heldout_state(values):
            break
    if describe:
        first = Round(phrases.describe_sentence(rng, source.attributes, values), "describe", values=values)
    else:
        first = Round(phrases.upload_sentence(rng), "upload", values=values)
    return Conversation(id_, source.name, (replace(first, subject=tuple(subject.tolist())),))


def build_conversations(
    source: Source, settings: DataConfig, *, seed: int, split: str, name: str = "conversation"
) -> list[Conversation]:
    """Draw the conversations of a data set, without pictures.

    Args:
        source: an exact source.
        settings: number, lengths and share of rollbacks.
        seed: seeds subjects, states and words.
        split: `train` or `heldout`: subjects, phrasings and (in `train`) combinations of values.
        name: prefix of the ids.
    """
    generator = torch.Generator().manual_seed(seed)
    subjects = source.sample_subjects(settings.conversations, split, generator)  # (B, S)
    states = "train" if split == "train" else "any"
    builder = ConversationBuilder(source.attributes, ExactEditor(source, states), settings, split)
    conversations = []
    for index, subject in enumerate(subjects):
        rng = random.Random(f"{seed}.{index}")
        describe = rng.random() < settings.describe_share
        conversation = open_conversation(source, f"{name}-{index:05d}", subject, rng, split=states, describe=describe)
        rounds = rng.choice(settings.rounds)
        while len(conversation) < rounds:
            conversation = builder.edit(conversation, len(conversation) - 1, rng)
        if settings.rollback_share and rounds > 2:
            conversation = from_chain(conversation, builder, rng, rounds)
        conversations.append(conversation)
    return conversations


def with_images(source: Source, conversations: Sequence[Conversation], chunk: int = 256) -> list[Conversation]:
    """Draw the pictures of conversations whose states are known, every distinct state once.

    Args:
        source: draws them.
        conversations: whose rounds have `subject` and `values`.
        chunk: pictures drawn at a time.
    """
    keys = [
        (item.subject, _known_values(conversation, index))
        for conversation in conversations
        for index, item in enumerate(conversation.rounds)
    ]
    distinct = list(dict.fromkeys(keys))
    parts = []
    for start in range(0, len(distinct), chunk):
        part = distinct[start : start + chunk]
        subjects = torch.tensor([subject for subject, _ in part])  # (B, S)
        drawn = source.render(subjects, torch.tensor([values for _, values in part]))  # (B, 3, H, W)
        parts.append((drawn * 255).round().to(torch.uint8))
    pictures, place = torch.cat(parts), {key: index for index, key in enumerate(distinct)}
    result = []
    for conversation in conversations:
        rows = [place[(item.subject, item.values)] for item in conversation.rounds]  # type: ignore[index]
        result.append(replace(conversation, images=pictures[rows]))
    return result
