"""Faces in pictures: what a masked picture shows, and how much each token counts when faces matter more."""

import torch
from torch import Tensor

GREY = 128  # of a masked picture, outside the face


def mask_faces(images: Tensor, boxes: Tensor) -> Tensor:
    """Grey everything outside the faces.

    Args:
        images: uint8 (B, 3, H, W).
        boxes: (B, 4) left, top, right, bottom in pixels; a pixel is inside if its centre is.

    Returns:
        uint8 (B, 3, H, W).
    """
    left, top, right, bottom = boxes.T[:, :, None]  # (B, 1) each
    x, y = (torch.arange(images.shape[axis]) + 0.5 for axis in (3, 2))  # (W,) and (H,)
    inside = ((y >= top) & (y < bottom))[:, None, :, None] & ((x >= left) & (x < right))[:, None, None, :]
    return torch.where(inside, images, torch.full_like(images, GREY))  # (B, 3, H, W)


def face_token_weights(boxes: Tensor, image_size: int, tokens: int, weight: float) -> Tensor:
    """How much each token counts in the loss when faces matter more (paper: face-centric supervision).

    Args:
        boxes: (B, 4) left, top, right, bottom in pixels.
        image_size: height and width.
        tokens: N, on a square grid in the order of rows.
        weight: of a token whose cell lies inside the box; 1 outside, in proportion to the overlap between.

    Returns:
        (B, N), of mean 1 in each picture.
    """
    grid = round(tokens**0.5)
    cell = image_size / grid
    start = torch.arange(grid) * cell  # (G,)
    left, top, right, bottom = boxes.T[:, :, None]  # (B, 1) each
    across = (torch.minimum(right, start + cell) - torch.maximum(left, start)).clamp_min(0)  # (B, G)
    down = (torch.minimum(bottom, start + cell) - torch.maximum(top, start)).clamp_min(0)  # (B, G)
    overlap = (down[:, :, None] * across[:, None, :] / cell**2).flatten(1)  # (B, N)
    weights = 1 + (weight - 1) * overlap
    return weights / weights.mean(1, keepdim=True)  # (B, N)
