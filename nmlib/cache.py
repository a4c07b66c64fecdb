"""What a conversation remembers: predicted tokens in a tree, and keys and values of the history read so far.

`TokenCache` keeps the *predicted* tokens of every picture exactly (paper: token-level caching); undo and branch
move a pointer in its tree. `PrefixCache` keeps the keys and values of everything the model has read, so that a
round costs its new tokens only; a fork shares all tensors with its origin until one of them writes.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nmlib import checkpoint
from nmlib.mllm import HistoryMLLM

MIN_ROOM = 64  # tokens that a layer has room for beyond those it holds, when it moves


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


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer with room to grow, so that a new token is written and the old ones stay in place.

    A copy made by `share` has the same memory. Whichever of the two writes first moves to memory of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None  # (B, heads, capacity, D_head), None while it is shared

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, heads, t, D_head); returns all of them, (B, heads, L + t, D_head)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        total = length + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < total:
            capacity = total + max(total // 2, MIN_ROOM)
            rooms = [part.new_empty(*part.shape[:2], capacity, part.shape[3]) for part in (key_states, value_states)]
            for room, kept in zip(rooms, (self.keys, self.values), strict=True):
                if kept is not None and length:
                    room[..., :length, :] = kept
            self._room = (rooms[0], rooms[1])
        self._room[0][..., length:total, :], self._room[1][..., length:total, :] = key_states, value_states
        self.keys, self.values = (room[..., :total, :] for room in self._room)  # (B, heads, L + t, D_head)
        return self.keys, self.values

    def share(self) -> "GrowingLayer":
        """A copy in the same memory, which from now on neither of the two writes to."""
        self._room = None
        return copy.copy(self)


class PrefixCache:
    """Keys and values of a batch of histories; equal to recomputing them.

    Args:
        model: reads the history.
        image_ids: ids of the N query tokens.
        batch: number of histories side by side.
    """

    def __init__(self, model: HistoryMLLM, image_ids: Sequence[int], batch: int = 1) -> None:
        self.model, self.image_ids, self.batch = model, image_ids, batch
        self.device = next(model.parameters()).device
        self.states: Any = DynamicCache(config=model.base_llm.config)
        self.states.layers = [GrowingLayer() for _ in self.states.layers]
        self.visible = torch.zeros(batch, 0, dtype=torch.bool, device=self.device)  # (B, L)
        self.position = torch.zeros(batch, dtype=torch.int64, device=self.device)  # (B,)
        self.images: dict[int, Tensor] = {}  # round -> embedded history block (B, N, D)
        self.ends: list[End] = []

    def fork(self) -> "PrefixCache":
        """A second history that shares every tensor with this one and grows on its own."""
        other = copy.copy(self)
        other.images, other.ends = dict(self.images), list(self.ends)
        other.states = copy.copy(self.states)
        other.states.layers = [layer.share() for layer in self.states.layers]
        return other

    @property
    def length(self) -> int:
        """Tokens read, padding included."""
        return self.visible.shape[1]

    def end_round(self, node: int) -> None:
        """Note that the round of a node ends here, so that `segment` and `back_to` can find it."""
        self.ends.append(End(node, self.length, self.position))

    def back_to(self, rounds: int) -> None:
        """Forget all that was read after the end of so many rounds; what remains stays where it is."""
        start = self.ends[rounds - 1] if rounds else End(-1, 0, torch.zeros_like(self.position))
        self.states.crop(start.length - self.length)
        self.visible, self.position = self.visible[:, : start.length], start.position  # (B, L), (B,)
        self.images = {index: image for index, image in self.images.items() if index < rounds}
        self.ends = self.ends[:rounds]

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
        for number, layer in enumerate(self.states.layers):
            keys, values = torch.cat([part.states[number] for part in segments], dim=3)  # (B, heads, t, D_head)
            layer.update(keys, values)
        for node, part in zip(nodes, segments, strict=True):
            self.visible = torch.cat([self.visible, part.visible], dim=1)  # (B, L + t)
            self.position, self.images[len(self.ends)] = part.position, part.image
            self.end_round(node)

    @torch.no_grad()
    def read(self, embeds: Tensor, valid: Tensor, keep: bool) -> Tensor:
        """Run embeddings after the history; texts and pictures are read through this.

        Args:
            embeds: (B, t, D).
            valid: (B, t) False on padding.
            keep: whether they become part of the history.

        Returns:
            Hidden states (B, t, D).
        """
        count = embeds.shape[1]
        position_ids = (self.position[:, None] + valid.cumsum(1) - 1).clamp_min(0)  # (B, t)
        causal = torch.ones(count, count, dtype=torch.bool, device=self.device).tril()
        fresh = (causal & valid[:, None, :]) | torch.eye(count, dtype=torch.bool, device=self.device)  # (B, t, t)
        past = self.visible[:, None, :].expand(-1, count, -1)  # (B, t, L)
        hidden_states = self.model.base_llm.model(
            inputs_embeds=embeds,
            attention_mask=torch.cat([past, fresh], dim=2)[:, None],  # (B, 1, t, L + t)
            position_ids=position_ids,
            past_key_values=self.states,
            use_cache=True,
        ).last_hidden_state  # (B, t, D)
        if keep:
            self.visible = torch.cat([self.visible, valid], dim=1)  # (B, L + t)
            self.position = self.position + valid.sum(1)
        else:
            self.states.crop(-count)
        return hidden_states

    def read_text(self, ids: Sequence[Sequence[int]], index: int) -> Tensor:
        """Append texts of any lengths in round `index`, one a history; returns the logits (B, V) after each."""
        longest = max(len(row) for row in ids)
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=self.device)  # (B, t)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        valid = torch.arange(longest, device=self.device) < lengths[:, None]  # (B, t)
        embeds = self.model.embed_text(padded, torch.full_like(padded, index))  # (B, t, D)
        hidden_states = self.read(embeds, valid, keep=True)
        last = hidden_states[torch.arange(len(ids)), (lengths - 1).clamp_min(0)]  # (B, D)
        return self.model.base_llm.lm_head(last)  # (B, V)

    def read_images(self, features: Tensor, index: int) -> None:
        """Append the history block of round `index`: features (B, N, D_feature)."""
        with torch.no_grad():
            rounds = torch.full((len(features),), index, device=self.device)
            embeds = self.model.embed_images(features.to(self.device), rounds)  # (B, N, D)
        self.images[index] = embeds
        self.read(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool, device=self.device), keep=True)

    @torch.no_grad()
    def query(self, bases: Sequence[int | None] | None = None) -> Tensor:
        """Predict the next picture (B, N, D_feature) in one forward pass; leaves the history as it was.

        Args:
            bases: for each history, the round that its reply says it starts from; by default none says any.
        """
        ids = torch.tensor(self.image_ids, device=self.device).expand(self.batch, -1)  # (B, N)
        named = [-1 if base is None else base for base in bases or [None] * self.batch]
        rows = [row for row, base in enumerate(named) if base >= 0]
        images = torch.stack([self.images[named[row]][row] for row in rows]) if rows else ids.new_zeros(0)  # (C, N, D)
        blocks = [rows.index(row) if base >= 0 else -1 for row, base in enumerate(named)]
        embeds = self.model.embed_queries(ids, images, torch.tensor(blocks, device=self.device))  # (B, N, D)
        hidden_states = self.read(embeds, torch.ones_like(ids, dtype=torch.bool), keep=False)
        return self.model.output_resampler(hidden_states).float()  # (B, N, D_feature)


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
