"""Non-Markov conversations from chains of edits that nobody can draw: real data sets (paper, data 1).

Going back needs no new picture: it shows an earlier one again. What follows is an edit of the chain itself, whose
picture is known, or a new one that a diffusion pipeline paints.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from nmlib.config import DataConfig
from nmlib.conversation import Conversation, ConversationError, Edit, from_picture, to_picture
from nmlib.rollback import ConversationBuilder

NEW_SHARE = 0.5  # of the edits that could be the chain's own, how many a painter makes instead


def clause(instruction: str) -> str:
    """An instruction as a part of a longer sentence: without the full stop, and begun with a small letter."""
    said = " ".join(instruction.split()).rstrip(".! ")
    is_short = said[:2].isupper() and len(said.partition(" ")[0]) > 1  # "USA flag behind her"
    return said if is_short else said[:1].lower() + said[1:]


class Painter:
    """New edits of photographs by a diffusion pipeline.

    Args:
        pipeline: of `full_body.open_pipeline`: called with `prompt`, `image` (PIL) and `generator`; returns `images`.
        instructions: of the data set; a new edit is one of them, made to another picture.
        arguments: more arguments of the pipeline, by its own names, for example `num_inference_steps`.
    """

    def __init__(self, pipeline: Any, instructions: Sequence[str], arguments: dict[str, Any] | None = None) -> None:
        self.pipeline, self.instructions, self.arguments = pipeline, instructions, arguments or {}

    def paint(self, picture: Tensor, instruction: str) -> Tensor:
        """A picture (3, H, W) uint8 edited by an instruction; the same noise for the same words."""
        generator = Generator().manual_seed(random.Random(instruction).getrandbits(63))
        image = to_picture(picture)
        made = self.pipeline(prompt=instruction, image=image, generator=generator, **self.arguments).images[0]
        return from_picture(made, f"pipeline, {instruction!r}", picture.shape[-1])


class ChainEditor:
    """An `Editor` that knows the edits of one chain.

    Args:
        chain: a Markov conversation with pictures.
        painter: makes other edits; None makes none.
    """

    def __init__(self, chain: Conversation, painter: Painter | None = None) -> None:
        if chain.images is None:
            raise ConversationError(f"conversation {chain.id!r}: has no pictures; expected one in every round")
        self.chain, self.pictures, self.painter = chain, chain.images, painter

    def propose(self, conversation: Conversation, base: int, rng: random.Random) -> tuple[Edit | None, str] | None:
        """What the chain does to the picture of round `base`, or what the painter is asked for."""
        own = self._next(conversation, base)
        if self.painter is not None and (own is None or rng.random() < NEW_SHARE):
            return None, clause(rng.choice(self.painter.instructions))
        return None if own is None else (None, clause(self.chain.rounds[own].instruction))

    def apply(
        self, conversation: Conversation, base: int, edit: Edit | None, clause_: str
    ) -> tuple[tuple[int, ...] | None, Tensor | None]:
        """The chain's own picture, or a painted one."""
        own = self._next(conversation, base)
        if own is not None and clause_ == clause(self.chain.rounds[own].instruction):
            return None, self.pictures[own]
        assert self.painter is not None and conversation.images is not None
        return None, self.painter.paint(conversation.images[base], clause_)

    def _next(self, conversation: Conversation, base: int) -> int | None:
        """The round of the chain that edits the picture of round `base`; None if it shows no other or the last one."""
        assert conversation.images is not None
        shown = conversation.images[base]
        places = [place for place, picture in enumerate(self.pictures) if torch.equal(picture, shown)]
        return places[-1] + 1 if places and places[-1] + 1 < len(self.pictures) else None


def longest_chain(conversation: Conversation) -> Conversation:
    """The rounds before the first that does not start from the one before it."""
    length = next((index for index in range(len(conversation)) if conversation.depth(index)), len(conversation))
    return conversation.prefix(length)


def with_rollbacks(
    chain: Conversation, settings: DataConfig, rng: random.Random, split: str, painter: Painter | None = None
) -> Conversation:
    """A conversation that begins as a chain does, then goes back, and goes on from there.

    Args:
        chain: Markov, with pictures, of two rounds or more.
        settings: lengths, share of rollbacks, deepest rollback.
        rng: source of chance.
        split: phrasings to use: `train`, `heldout` or `any`.
        painter: makes edits that the chain does not have.

    Raises:
        ConversationError: the chain has no pictures, is no chain, or is too short.
    """
    if not chain.is_markov or len(chain) < 2:
        raise ConversationError(f"conversation {chain.id!r}: expected a Markov chain of at least two rounds")
    editor = ChainEditor(chain, painter)
    builder = ConversationBuilder((), editor, settings, split)
    back = ConversationBuilder((), editor, settings.model_copy(update={"rollback_share": 1.0}), split)
    rounds = rng.choice(settings.rounds)
    conversation = chain.prefix(rng.randint(2, max(2, min(len(chain), rounds - 1))))
    while len(conversation) < rounds:
        can_go_on = editor.propose(conversation, len(conversation) - 1, rng) is not None
        conversation = (builder if can_go_on else back).extend(conversation, rng)
    return conversation
