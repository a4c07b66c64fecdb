"""Masks and token weights, by hand and by their sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmlib.face_region import GREY, face_token_weights, mask_faces


def test_masked_pictures_are_grey_outside_the_box_by_hand() -> None:
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    boxes = torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.6, 2.4, 1.4, 9.0]])  # the second has no pixel's centre
    masked = mask_faces(images, boxes)
    inside = torch.zeros(2, 4, 5, dtype=torch.bool)
    inside[0, 0:2, 1:3] = True
    kept = inside[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(masked[kept], images[kept]) and (masked[~kept] == GREY).all()


def test_weights_by_hand() -> None:
    """4 tokens of 8 x 8 pixels each."""
    whole = face_token_weights(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), 16, 4, 3.0)
    assert whole[0].tolist() == pytest.approx([3 / 1.5, 1 / 1.5, 1 / 1.5, 1 / 1.5])
    part = face_token_weights(torch.tensor([[0.0, 0.0, 12.0, 2.0]]), 16, 4, 5.0)  # covers 1/4 and 1/8
    mean = (2.0 + 1.5 + 1 + 1) / 4
    assert part[0].tolist() == pytest.approx([2.0 / mean, 1.5 / mean, 1 / mean, 1 / mean])
    rows = face_token_weights(torch.tensor([[0.0, 8.0, 8.0, 16.0]]), 16, 4, 2.0)  # the third token: rows come first
    assert int(rows.argmax()) == 2


@settings(max_examples=60, deadline=None)
@given(data=st.data(), weight=st.floats(0, 20), grid=st.sampled_from([3, 4, 8]))
def test_weights_have_mean_one_and_grow_with_the_overlap(data: st.DataObject, weight: float, grid: int) -> None:
    corners = data.draw(st.tuples(*[st.floats(0, 30)] * 2, *[st.floats(30, 48)] * 2))
    weights = face_token_weights(torch.tensor([corners]), 48, grid**2, weight)
    assert weights.shape == (1, grid**2) and weights.mean().item() == pytest.approx(1, abs=1e-4)
    same = face_token_weights(torch.tensor([corners]), 48, grid**2, 1.0)
    assert torch.allclose(same, torch.ones(1, grid**2))
    everything = face_token_weights(torch.tensor([[0.0, 0.0, 48.0, 48.0]]), 48, grid**2, 7.0)
    assert torch.allclose(everything, torch.ones(1, grid**2))
