"""Conversations in one sequence: the same losses as in rows of their own, and nothing seen of one another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import conversations, make_model, random_features, random_tree

from nmlib.conversation import Conversation
from nmlib.layout import PADDING
from nmlib.packing import Blocks, Packed, block_mask, buckets, first_fit, pack, use_blocks

MODEL, TEMPLATE = make_model(3)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def talks() -> list[Conversation]:
    """Six of two to five rounds, with descriptions and uploads."""
    return [*conversations(), *(random_tree(seed, 2 + seed % 4, upload=seed % 2 == 0) for seed in range(4))]


def sizes() -> list[int]:
    return [len(TEMPLATE.packed_row(talk).ids) for talk in talks()]


def test_boxes_by_hand() -> None:
    assert first_fit([3, 7, 5, 2, 4], 10) == [[1, 0], [2, 4], [3]]
    assert first_fit([12, 3], 10) == [[0], [1]] and first_fit([], 10) == []


def test_buckets_by_hand() -> None:
    """Sorted 9 8 4 4 3 1: two of 9, then 8 does not fit beside a third; room counts what is padded."""
    assert buckets([4, 9, 1, 4, 8, 3], 18) == [[1, 4], [0, 3, 5, 2]]
    assert buckets([4, 9, 1, 4, 8, 3], 12) == [[1], [4], [0, 3, 5], [2]]
    assert buckets([30, 1], 10) == [[0], [1]] and buckets([], 10) == []


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=30), room=st.integers(1, 100))
def test_everything_is_in_one_box_and_no_box_is_too_full(lengths: list[int], room: int) -> None:
    for boxes, padded in ((first_fit(lengths, room), False), (buckets(lengths, room), True)):
        assert sorted(thing for box in boxes for thing in box) == list(range(len(lengths)))
        for box in boxes:
            full = max(lengths[thing] for thing in box) * len(box) if padded else sum(lengths[thing] for thing in box)
            assert full <= room or len(box) == 1


@pytest.mark.parametrize("room", [1, 150, 10_000])
def test_the_losses_and_gradients_are_those_of_rows_of_their_own(room: int) -> None:
    features = random_features(6, 5)
    model, template = make_model(3)
    found = []
    for layout in (template.packed(talks()), pack(template, talks(), room)):
        losses = model(layout, features)
        losses.total.backward()
        found.append([losses.text, losses.image, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad(set_to_none=True)
    assert len(found[0]) == len(found[1]) > 20
    for plain, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


def test_nothing_is_padded_that_need_not_be() -> None:
    one = pack(TEMPLATE, talks(), 10_000)
    assert one.input_ids.shape == (1, sum(sizes())) and not bool((one.segments == PADDING).any())
    rows = TEMPLATE.packed(talks())
    assert bool((rows.segments == PADDING).any())
    two = pack(TEMPLATE, talks(), max(sizes()) + 1)
    assert int((two.segments != PADDING).sum()) == sum(sizes())
    assert bool((two.documents == -1).eq(two.segments == PADDING).all())
    assert sorted(map(tuple, two.queries.tolist())) == sorted(map(tuple, rows.queries.tolist()))


@torch.no_grad()
def test_no_conversation_sees_another() -> None:
    """Other pictures in one conversation leave every other one's predictions bit for bit as they were."""
    layout, features = pack(TEMPLATE, talks(), 10_000), random_features(6, 5)
    other = features.clone()
    other[2] = random_features(1, 5, seed=9)[0]
    first, second = (
        MODEL.predict(layout, given_[layout.history[:, 0], layout.history[:, 1]]).images for given_ in (features, other)
    )
    apart = layout.queries[:, 0] != 2
    assert torch.equal(first[apart], second[apart]) and not torch.allclose(first[~apart], second[~apart], **CLOSE)
    assert not bool((layout.attention_mask()[0, 0] & (layout.documents[0, :, None] != layout.documents[0])).any())


@torch.no_grad()
def test_block_masks_say_and_give_the_same_as_the_dense_mask() -> None:
    """FlexAttention as its own uncompiled reference."""
    model, template = make_model(3)
    layout, features = pack(template, talks(), 150), random_features(6, 5)
    assert len(layout.input_ids) > 1 and bool((layout.segments == PADDING).any())
    mask = block_mask(layout)
    count, length = layout.input_ids.shape
    index = torch.arange(length)
    dense = torch.stack([mask.mask_mod(torch.tensor(b), None, index[:, None], index) for b in range(count)])[:, None]
    same = layout.attention_mask() | torch.eye(length, dtype=torch.bool)
    assert torch.equal(dense, same)
    plain = model(layout, features)
    blocks = use_blocks(model, layout)
    assert isinstance(blocks, Blocks) and isinstance(blocks.to("cpu"), Packed)
    again = model(blocks, features)
    torch.testing.assert_close(again.total, plain.total, **CLOSE)
    torch.testing.assert_close(again.text, plain.text, **CLOSE)
