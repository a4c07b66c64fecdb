"""What a conversation remembers: predicted tokens in a tree, and keys and values of the history read so far.

`TokenCache` keeps the *predicted* tokens of every picture exactly (paper: token-level caching); undo and branch
move a pointer in its tree. `PrefixCache` keeps the keys and values of everything the model has read, so that a
round costs its new tokens only; a fork shares all tensors with its origin until one of them writes. A forward pass
of a few tokens costs nearly as much as one of many, so what nobody waits for is added and read in the next pass.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from nmlib import checkpoint
from nmlib.growing_layer import GrowingLayer
from nmlib.mllm import HistoryMLLM


class CacheError(KeyError):
    """A node that is not in the tree; the message lists what is there."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Node:
    """One picture of a session.

    Args:
        id: number, in order of creation.
        parent: the node before it on its branch; None at the root.
        kind: `upload`, or `say` for a picture the model made.
        instruction: what the person said.
        response: what the model said before the picture.
        base: the node it started from as the model said it; None if it said nothing.
        seed: of the detokenizer's noise.
        names: names that were introduced.
    """

    id: int
    parent: int | None
    kind: str
    instruction: str
    response: str
    base: int | None
    seed: int
    names: tuple[str, ...] = ()


class TokenCache:
    """A tree of rounds whose picture tokens are kept bit for bit, with a pointer to the current one."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._tokens: list[Tensor] = []
        self.current: int | None = None

    def __len__(self) -> int:
        return len(self.nodes)

    def node(self, id_: int) -> Node:
        """The node of that number; raises CacheError with the numbers that exist."""
        if not 0 <= id_ < len(self.nodes):
            there = f"has 0 to {len(self.nodes) - 1}" if self.nodes else "is empty"
            raise CacheError(f"no picture {id_} in this session; it {there}")
        return self.nodes[id_]

    def tokens(self, id_: int) -> Tensor:
        """The tokens (N, D_feature) of a node, exactly as they were predicted."""
        return self._tokens[self.node(id_).id]

    def append(self, tokens: Tensor, **fields: Any) -> Node:
        """Add a picture after the current one and move there.

        Args:
            tokens: (N, D_feature).
            fields: of `Node`, without `id` and `parent`.
        """
        node = Node(id=len(self.nodes), parent=self.current, **fields)
        self.nodes.append(node)
        self._tokens.append(tokens.detach().clone())
        self.current = node.id
        return node

    def path(self, id_: int | None = None) -> list[Node]:
        """Nodes from the root to a node (the current one by default): the history that the model sees."""
        steps: list[Node] = []
        cursor = self.current if id_ is None else id_
        while cursor is not None:
            steps.append(self.node(cursor))
            cursor = steps[-1].parent
        return steps[::-1]

    def undo(self) -> Node:
        """Move to the parent of the current node.

        Raises:
            CacheError: there is nothing before it.
        """
        if self.current is None or self.node(self.current).parent is None:
            raise CacheError("nothing to undo: this is the first picture of the session")
        return self.go_to(self.node(self.current).parent)  # type: ignore[arg-type]

    def go_to(self, id_: int) -> Node:
        """Move to any node; what is said next branches off there."""
        node = self.node(id_)
        self.current = node.id
        return node

    def children(self, id_: int) -> list[Node]:
        """Nodes that continue a node."""
        return [node for node in self.nodes if node.parent == id_]

    def save(self, path: Path) -> None:
        """Write tree and tokens as one safetensors file with JSON metadata, atomically."""
        tensors = {str(id_): tokens for id_, tokens in enumerate(self._tokens)}
        checkpoint.save(path, tensors, {"nodes": [asdict(node) for node in self.nodes], "current": self.current})

    @classmethod
    def load(cls, path: Path) -> "TokenCache":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds something else.
        """
        tensors, metadata = checkpoint.load(path)
        if "nodes" not in metadata:
            raise checkpoint.CheckpointError(f"{path}: holds no session; expected a file that `TokenCache.save` wrote")
        cache = cls()
        cache.nodes = [Node(**{**raw, "names": tuple(raw["names"])}) for raw in metadata["nodes"]]
        cache._tokens = [tensors[str(node.id)] for node in cache.nodes]
        cache.current = metadata["current"]
        return cache


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
        self.device = next(model.parameters()).device
        self.states: Any = DynamicCache(config=self.llm.config)
        self.states.layers = [GrowingLayer() for _ in self.states.layers]
        self.visible = torch.zeros(batch, 0, dtype=torch.bool, device=self.device)  # (B, L)
        self.position = torch.zeros(batch, dtype=torch.int64, device=self.device)  # (B,)
        self.padded = False
        self.unread: list[Unread] = []
        self.images: dict[int, Tensor] = {}  # round -> embedded history block (B, N, D)
        self.ends: list[End] = []

    def fork(self) -> "PrefixCache":
        """A second history that shares every tensor with this one and grows on its own."""
        other = copy.copy(self)
        other.images, other.ends, other.unread = dict(self.images), list(self.ends), list(self.unread)
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
        self.images = {index: image for index, image in self.images.items() if index < rounds}
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
            image=self.images[index],
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
            self.position, self.images[len(self.ends)] = part.position, part.image
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
        self.images[index] = self.model.embed_images(features.to(self.device), rounds)  # (B, N, D)
        self.add(self.images[index])

    def read_images(self, features: Tensor, index: int) -> None:
        """Append the history block of round `index`: features (B, N, D_feature)."""
        self.add_images(features, index)
        self.settle()

    def _embed_queries(self, bases: Sequence[int | None] | None) -> Tensor:
        """Embeddings (B, N, D) of a query block for each history, each started from the round that its reply names."""
        ids = torch.tensor(self.image_ids, device=self.device).expand(self.batch, -1)  # (B, N)
        named = [-1 if base is None else base for base in bases or [None] * self.batch]
        rows = [row for row, base in enumerate(named) if base >= 0]
        images = torch.stack([self.images[named[row]][row] for row in rows]) if rows else ids.new_zeros(0)  # (C, N, D)
        blocks = [rows.index(row) if base >= 0 else -1 for row, base in enumerate(named)]
        return self.model.embed_queries(ids, images, torch.tensor(blocks, device=self.device))  # (B, N, D)

    @torch.no_grad()
    def query(self, bases: Sequence[int | None] | None = None) -> Tensor:
        """Predict the next picture (B, N, D_feature) in one forward pass; leaves the history as it was.

        Args:
            bases: for each history, the round that its reply says it starts from; by default none says any.
        """
        hidden_states = self.read(self._embed_queries(bases), None, keep=False)  # (B, N, D)
        return self.model.output_resampler(hidden_states).float()  # (B, N, D_feature)

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
        words, queries = self._embed_text([ids], index)[0], self._embed_queries([base])  # (1, t, D), (1, N, D)
        hidden_states = self.read(torch.cat([words, queries], dim=1), None, keep=True)  # (1, t + N, D)
        self.cut(queries.shape[1])
        images = self.model.output_resampler(hidden_states[:, len(ids) :]).float()  # (1, N, D_feature)
        return images, self.llm.lm_head(hidden_states[0, : len(ids)])  # (t, V)


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
        image: its embedded history block (B, N, D).
    """

    parent: int | None
    states: Tensor
    visible: Tensor
    position: Tensor
    image: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(part.nbytes for part in (self.states, self.visible, self.position, self.image))
