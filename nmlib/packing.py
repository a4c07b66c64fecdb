"""Conversations of different lengths in one sequence: nothing is padded, and none sees another.

A batch of conversations of 6, 8 and 12 rounds laid out row by row is padded to the longest. Here rows stand one behind
the other in one sequence; positions start again with each, and the mask keeps them apart. Where a GPU has
FlexAttention, the mask is given as blocks, so that what is masked out is not computed; elsewhere it is the dense mask.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from nmlib.conversation import Conversation
from nmlib.layout import IGNORE, MAIN, PADDING, Layout, Template
from nmlib.mllm import HistoryMLLM

ALONE = -1  # document of padding
BLOCKS = "blocks"  # name of the attention that takes block masks
_FILLS = {"position_ids": 0, "segments": PADDING, "labels": IGNORE, "block_start": 0}


@dataclass
class Packed(Layout):
    """A batch of sequences that hold several conversations each.

    Args:
        documents: (B, T) the conversation that a token belongs to, -1 on padding.
    """

    documents: Tensor

    def attention_mask(self) -> Tensor:
        """Who sees whom, (B, 1, T, T) bool: as in any layout, within a conversation."""
        return super().attention_mask() & (self.documents[:, None, :] == self.documents[:, :, None])[:, None]


@dataclass
class Blocks(Packed):
    """The same batch for a model whose attention takes block masks (see `use_blocks`)."""

    def attention_mask(self) -> BlockMask:  # type: ignore[override]
        """Who sees whom, as blocks of which those that are masked out are left out."""
        return block_mask(self)


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Put things into as few boxes as is easy: the largest first, each into the first box that has room.

    Args:
        sizes: of the things.
        room: of a box; a thing that is larger has a box of its own.

    Returns:
        The things of each box.
    """
    boxes: list[list[int]] = []
    left: list[int] = []
    for thing in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        box = next((number for number, free in enumerate(left) if free >= sizes[thing]), len(boxes))
        if box == len(boxes):
            boxes.append([])
            left.append(room)
        boxes[box].append(thing)
        left[box] -= sizes[thing]
    return boxes


def buckets(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Batches of things of like size, so that little is padded: each as large as `room` allows when padded.

    Args:
        sizes: of the things.
        room: tokens of a batch, padding included; a thing that is larger is a batch of its own.
    """
    found: list[list[int]] = []
    for thing in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        if not found or sizes[found[-1][0]] * (len(found[-1]) + 1) > room:
            found.append([])
        found[-1].append(thing)
    return found


def pack(template: Template, conversations: Sequence[Conversation], room: int) -> Packed:
    """The batch of `packed` supervision with several conversations in a sequence.

    Args:
        template: lays conversations out.
        conversations: of any lengths; batch rows in `queries` and `history` count these.
        room: tokens of a sequence.
    """
    rows = [len(template.packed_row(conversation).ids) for conversation in conversations]
    boxes = first_fit(rows, room)
    order = [place for box in boxes for place in box]
    plain = template.packed([conversations[place] for place in order])
    parts: dict[str, Tensor] = {}
    for field in fields(Layout):
        value = getattr(plain, field.name)
        parts[field.name] = (
            value if field.name in ("queries", "history", "bases") else _join(field.name, value, plain, boxes)
        )
    owners = torch.tensor(order)
    for name in ("queries", "history"):
        parts[name] = torch.stack([owners[parts[name][:, 0]], parts[name][:, 1]], dim=1)  # (Q or C, 2)
    documents = torch.arange(len(order))[:, None].expand_as(plain.input_ids)  # (B, T)
    return Packed(**parts, documents=_join("documents", documents, plain, boxes))


def _join(name: str, values: Tensor, plain: Layout, boxes: Sequence[Sequence[int]]) -> Tensor:
    """The rows (B, T) of each box one behind the other, without their padding; what is padded anew comes last."""
    pad = int(plain.input_ids[plain.segments == PADDING][0]) if bool((plain.segments == PADDING).any()) else 0
    fill = {**_FILLS, "input_ids": pad, "documents": ALONE}.get(name, 0)
    rows = [row[segments != PADDING] for row, segments in zip(values, plain.segments, strict=True)]  # (t,) each
    start, joined = 0, []
    for box in boxes:
        joined.append(torch.cat(rows[start : start + len(box)]))
        start += len(box)
    return pad_sequence(joined, batch_first=True, padding_value=fill)  # (B', T')


# ---------------------------------------------------------------------------------------------------------
# FlexAttention


def block_mask(layout: Packed) -> BlockMask:
    """`Packed.attention_mask` in FlexAttention's form."""
    position, segment, start, document = layout.position_ids, layout.segments, layout.block_start, layout.documents

    def sees(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        causal = position[b, column] <= position[b, row]
        is_query = segment[b, row] > MAIN
        main = causal & (segment[b, column] == MAIN) & (~is_query | (position[b, column] < start[b, row]))
        own = causal & is_query & (segment[b, column] == segment[b, row])
        return ((main | own) & (document[b, row] == document[b, column])) | (row == column)

    count, length = position.shape
    return create_block_mask(sees, count, None, length, length, device=str(position.device))


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of `transformers`' form: states (B, heads, T, D_head) to (B, T, heads, D_head)."""
    attend = torch.compile(flex_attention) if query.is_cuda else flex_attention
    with warnings.catch_warnings():  # that it is slow without being compiled is known
        warnings.filterwarnings("ignore", "flex_attention called without", UserWarning)
        mixed = attend(query, key, value, block_mask=attention_mask, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


def use_blocks(model: HistoryMLLM, layout: Packed) -> Layout:
    """Let a model's attention take block masks; returns the batch that gives them.

    Compiled on a GPU; elsewhere it runs without being compiled, slowly and without gradients, which only shows that
    the results are the same: there the dense mask of `Packed` is the one to train with.
    """
    AttentionInterface.register(BLOCKS, _attend)
    model.base_llm.set_attn_implementation(BLOCKS)
    return Blocks(**vars(layout))
