"""What the model has read: keys and values of the history so far.

`PrefixCache` keeps the keys and values of everything the model has read, so that a round costs its new tokens only;
a fork shares all tensors with its origin until one of them writes. A forward pass of a few tokens costs nearly as
much as one of many, so what nobody waits for is added and read in the next pass.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from nmlib.growing_layer import GrowingLayer
from nmlib.mllm import HistoryMLLM


class PrefixCache:
    """Keys and values of a batch of histories; equal to recomputing them.

    Args:
        model: reads the history.
        image_ids: ids of the N query tokens.
        batch: number of histories side by side.
    """

    def __init__(self, model: HistoryMLLM, image_ids: Sequence[int], batch: int = 1) -> None:
        self.model, self.image_ids, self.batch = model, image_ids, batch
        self.llm = model.base_llm
        self.device = model.device
        self.states: Any = DynamicCache(config=self.llm.config)
        self.states.layers = [GrowingLayer() for _ in self.states.layers]
        self.visible = torch.zeros(batch, 0, dtype=torch.bool, device=self.device)  # (B, L)
        self.position = torch.zeros(batch, dtype=torch.int64, device=self.device)  # (B,)
        self.padded = False
        self.unread: list[Unread] = []
        self.pictures: dict[int, Tensor] = {}  # round -> features (B, N, D_feature)
        self.ends: list[End] = []

    def fork(self) -> "PrefixCache":
        """A second history that shares every tensor with this one and grows on its own."""
        other = copy.copy(self)
        other.pictures, other.ends, other.unread = dict(self.pictures), list(self.ends), list(self.unread)
        other.states = copy.copy(self.states)
        other.states.layers = [layer.share() for layer in self.states.layers]
        return other

    @property
    def length(self) -> int:
        """Tokens of the history, padding and what was not read yet included."""
        return self.visible.shape[1]

    @property
    def length_read(self) -> int:
        """Tokens whose keys and values are there."""
        return int(self.states.get_seq_length())

    def end_round(self, node: int) -> None:
        """Note that the round of a node ends here, so that `segment` and `back_to` can find it."""
        self.ends.append(End(node, self.length, self.position))

    def back_to(self, rounds: int) -> None:
        """Forget all that was read after the end of so many rounds; what remains stays where it is."""
        self.cut(self.length - (self.ends[rounds - 1].length if rounds else 0))
        self.pictures = {index: picture for index, picture in self.pictures.items() if index < rounds}
        self.ends = self.ends[:rounds]

    def cut(self, count: int) -> None:
        """Forget the last tokens: any number of those that were read, of the others whole texts and pictures."""
        kept = self.length - count
        self.position = self.position - self.visible[:, kept:].sum(1)
        self.visible = self.visible[:, :kept]  # (B, L - count)
        while self.unread and count:
            count -= self.unread.pop().embeds.shape[1]
        if count:
            self.states.crop(-count)

    def segment(self, index: int) -> "Segment":
        """A copy of what the round of that index added."""
        start, end = self.ends[index - 1].length if index else 0, self.ends[index]
        states = [
            torch.stack([part[..., start : end.length, :] for part in (layer.keys, layer.values)])
            for layer in self.states.layers
        ]
        return Segment(
            parent=self.ends[index - 1].node if index else None,
            states=torch.stack(states),  # (layers, 2, B, heads, t, D_head)
            visible=self.visible[:, start : end.length].clone(),  # (B, t)
            position=end.position,
            picture=self.pictures[index].clone(),
        )

    def extend(self, nodes: Sequence[int], segments: Sequence["Segment"]) -> None:
        """Append the rounds of nodes that were read before, in the order of their branch."""
        self.settle()
        for number, layer in enumerate(self.states.layers):
            keys, values = torch.cat([part.states[number] for part in segments], dim=3)  # (B, heads, t, D_head)
            layer.update(keys, values)
        for node, part in zip(nodes, segments, strict=True):
            self.visible = torch.cat([self.visible, part.visible], dim=1)  # (B, L + t)
            self.padded |= not bool(part.visible.all())
            self.position, self.pictures[len(self.ends)] = part.position, part.picture
            self.end_round(node)

    def add(self, embeds: Tensor, valid: Tensor | None = None) -> None:
        """Append embeddings, to be read in the forward pass of what comes next: a pass costs more than its tokens.

        Args:
            embeds: (B, t, D).
            valid: (B, t) False on padding; None where there is none.
        """
        self.padded |= valid is not None
        seen = torch.ones(embeds.shape[:2], dtype=torch.bool, device=self.device) if valid is None else valid  # (B, t)
        positions = (self.position[:, None] + seen.cumsum(1) - 1).clamp_min(0)  # (B, t)
        self.unread.append(Unread(embeds, positions))
        self.visible = torch.cat([self.visible, seen], dim=1)  # (B, L + t)
        self.position = self.position + seen.sum(1)

    def _mask(self, count: int) -> Tensor:
        """Who sees whom: (B, 1, t, L), the last t tokens all that is visible up to them, and each itself."""
        before = self.length - count
        mask = torch.ones(count, self.length, dtype=torch.bool, device=self.device).tril(before)  # (t, L)
        if not self.padded:
            return mask.expand(self.batch, 1, -1, -1)  # (B, 1, t, L)
        itself = mask ^ mask.tril(before - 1)  # (t, L)
        return ((mask & self.visible[:, None, :]) | itself)[:, None]  # (B, 1, t, L)

    @torch.no_grad()
    def settle(self) -> Tensor | None:
        """Read what was added, in one forward pass; returns its hidden states (B, t, D), None where nothing was."""
        if not self.unread:
            return None
        embeds, positions = (torch.cat(parts, dim=1) for parts in zip(*self.unread, strict=True))  # (B, t, D), (B, t)
        self.unread = []
        return self.llm.model(
            inputs_embeds=embeds,
            attention_mask=self._mask(embeds.shape[1]),
            position_ids=positions,
            past_key_values=self.states,
            use_cache=True,
        ).last_hidden_state  # (B, t, D)

    def read(self, embeds: Tensor, valid: Tensor | None, keep: bool) -> Tensor:
        """Run embeddings after the history, in one forward pass with what was added before them.

        Args:
            embeds: (B, t, D).
            valid: (B, t) False on padding; None where there is none.
            keep: whether they become part of the history.

        Returns:
            Hidden states (B, t, D).
        """
        count = embeds.shape[1]
        self.add(embeds, valid)
        hidden_states = self.settle()
        assert hidden_states is not None
        if not keep:
            self.cut(count)
        return hidden_states[:, hidden_states.shape[1] - count :]  # (B, t, D)

    @torch.no_grad()
    def _embed_text(self, ids: Sequence[Sequence[int]], index: int) -> tuple[Tensor, Tensor | None, list[int]]:
        """Embeddings (B, t, D) of texts of any lengths, where they are valid (B, t), and the lengths."""
        lengths = [len(row) for row in ids]
        longest = max(lengths)
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=self.device)  # (B, t)
        embeds = self.model.embed_text(padded, torch.full_like(padded, index))  # (B, t, D)
        if min(lengths) == longest:
            return embeds, None, lengths
        places = torch.arange(longest, device=self.device)
        return embeds, places < torch.tensor(lengths, device=self.device)[:, None], lengths

    def add_text(self, ids: Sequence[Sequence[int]], index: int) -> None:
        """Append texts of any lengths in round `index`, one a history, to be read with what comes next."""
        embeds, valid, _ = self._embed_text(ids, index)
        self.add(embeds, valid)

    @torch.no_grad()
    def read_text(self, ids: Sequence[Sequence[int]], index: int) -> Tensor:
        """Append texts of any lengths in round `index`, one a history; returns the logits (B, V) after each."""
        embeds, valid, lengths = self._embed_text(ids, index)
        hidden_states = self.read(embeds, valid, keep=True)
        last = hidden_states[torch.arange(len(ids)), [max(length - 1, 0) for length in lengths]]  # (B, D)
        return self.llm.lm_head(last)  # (B, V)

    @torch.no_grad()
    def add_images(self, features: Tensor, index: int) -> None:
        """Append the history block of round `index`, to be read with what comes next: features (B, N, D_feature)."""
        rounds = torch.full((len(features),), index, device=self.device)
        self.pictures[index] = features.to(self.device)
        self.add(self.model.embed_images(self.pictures[index], rounds))

    def read_images(self, features: Tensor, index: int) -> None:
        """Append the history block of round `index`: features (B, N, D_feature)."""
        self.add_images(features, index)
        self.settle()

    def _starts(self, bases: Sequence[int | None] | None) -> "Starts":
        """What the query block of each history starts from: the round that its reply names, if it names one."""
        named = [-1 if base is None else base for base in bases or [None] * self.batch]
        rows = [row for row, base in enumerate(named) if base >= 0]
        pictures = [self.pictures[named[row]][row] for row in rows]
        blocks = [rows.index(row) if base >= 0 else -1 for row, base in enumerate(named)]
        return Starts(
            torch.stack(pictures) if rows else torch.zeros(0, device=self.device),
            torch.tensor([named[row] for row in rows], device=self.device),
            torch.tensor(blocks, device=self.device),
        )

    def _embed_queries(self, starts: "Starts") -> Tensor:
        """Embeddings (B, N, D) of a query block for each history."""
        ids = torch.tensor(self.image_ids, device=self.device).expand(self.batch, -1)  # (B, N)
        images = self.model.embed_images(starts.pictures, starts.rounds) if len(starts.pictures) else starts.pictures
        return self.model.embed_queries(ids, images, starts.blocks)  # (B, N, D)

    @torch.no_grad()
    def query(self, bases: Sequence[int | None] | None = None) -> Tensor:
        """Predict the next picture (B, N, D_feature) in one forward pass; leaves the history as it was.

        Args:
            bases: for each history, the round that its reply says it starts from; by default none says any.
        """
        starts = self._starts(bases)
        hidden_states = self.read(self._embed_queries(starts), None, keep=False)  # (B, N, D)
        return self.model.draw(hidden_states, starts.pictures, starts.blocks).float()  # (B, N, D_feature)

    @torch.no_grad()
    def read_and_query(self, ids: Sequence[int], index: int, base: int | None) -> tuple[Tensor, Tensor]:
        """Append a text to a single history and predict the picture after it, in one forward pass.

        Args:
            ids: words of round `index`.
            index: the round.
            base: the round that the reply says it starts from.

        Returns:
            The picture (1, N, D_feature), and the logits (t, V) after every word.
        """
        starts = self._starts([base])
        words, queries = self._embed_text([ids], index)[0], self._embed_queries(starts)  # (1, t, D), (1, N, D)
        hidden_states = self.read(torch.cat([words, queries], dim=1), None, keep=True)  # (1, t + N, D)
        self.cut(queries.shape[1])
        queries = hidden_states[:, len(ids) :]  # (1, N, D)
        images = self.model.draw(queries, starts.pictures, starts.blocks).float()  # (1, N, D_feature)
        return images, self.llm.lm_head(hidden_states[0, : len(ids)])  # (t, V)


class Starts(NamedTuple):
    """Pictures (C, N, D_feature) that query blocks start from, their rounds (C,), which one each block takes (B,)."""

    pictures: Tensor
    rounds: Tensor
    blocks: Tensor


class Unread(NamedTuple):
    """Embeddings (B, t, D) that wait for the next forward pass, and their positions (B, t)."""

    embeds: Tensor
    positions: Tensor


@dataclass(frozen=True)
class End:
    """Where the round of a node ends in a cache: tokens read by then, and the next position (B,) of each history."""

    node: int
    length: int
    position: Tensor


@dataclass(frozen=True)
class Segment:
    """What one round added to a history of B conversations.

    Args:
        parent: node of the round before; None for the first.
        states: keys and values (layers, 2, B, heads, t, D_head) of its t tokens.
        visible: (B, t) False on padding.
        position: (B,) the next position.
        picture: features (B, N, D_feature) of its picture.
    """

    parent: int | None
    states: Tensor
    visible: Tensor
    position: Tensor
    picture: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(part.nbytes for part in (self.states, self.visible, self.position, self.picture))
