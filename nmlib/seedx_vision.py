"""SEED-X's eyes: the Qwen ViT at its own sizes, the 256 -> 64 pooling, and any-resolution tiling.

Built from the blocks of `vision`, in which query, key and value are interleaved for each head. What differs from the
small encoder: the position grid is always that of the pooled tokens and is resized to the patches; the pooling
attention has heads of its own; tokens are not normalised; pictures come with CLIP's mean and deviation.
Source: SEED-X `qwen_visual.py`, `src/data/any_res.py` (restated in our own words), state keys kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nmlib.config import SeedXVisionConfig
from nmlib.resampler import Resampler, resize_positions
from nmlib.vision import VisualBlock, VisualBlocks

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
WHOLE = (0.5, 0.5)


class QwenViT(nn.Module):
    """Pictures to tokens, frozen in SEED-X.

    Args:
        settings: sizes.
    """

    def __init__(self, settings: SeedXVisionConfig) -> None:
        super().__init__()
        width = settings.width
        self.settings = settings
        self.conv1 = nn.Conv2d(3, width, settings.patch_size, settings.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(settings.tokens, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        blocks = [VisualBlock(width, settings.heads, settings.mlp_size) for _ in range(settings.layers)]
        self.transformer = VisualBlocks(blocks)
        dim = settings.feature_dim
        self.attn_pool = Resampler(settings.tokens, dim, settings.pool_heads, width, eps=1e-6)
        self.ln_post = nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))

    def forward(self, images: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) as `to_pixels` gives them to tokens (B, M, feature_dim)."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, P, D)
        hidden_states = self.ln_pre(patches + resize_positions(self.positional_embedding, patches.shape[1]))
        hidden_states = self.transformer(hidden_states)  # (B, P, D)
        return self.ln_post(self.attn_pool(hidden_states)) @ self.proj  # (B, M, feature_dim)


def pool_tokens(tokens: Tensor, count: int) -> Tensor:
    """Average runs of consecutive tokens in raster order: of a 16 x 16 grid, cells of one row and four columns.

    Args:
        tokens: (B, M, D).
        count: N, a divisor of M.

    Returns:
        (B, N, D), the target of a generated image (SEED-X `seed_x.py`).
    """
    return tokens.unflatten(1, (count, -1)).mean(2)  # (B, N, D)


def repeat_tokens(tokens: Tensor, count: int) -> Tensor:
    """Bring pooled tokens (B, N, D) back to (B, M, D): each M / N times, so that pooling gives them back."""
    return tokens.repeat_interleave(count // tokens.shape[1], dim=1)  # (B, M, D)


def to_pixels(picture: Image.Image, side: int) -> Tensor:
    """Resize a picture to a square, whatever its shape, and normalise it: (3, side, side)."""
    resized = picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    scaled = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255  # (3, side, side)
    return (scaled - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


class Tiles(NamedTuple):
    """A picture in pieces: pixels (n, 3, H, W), the whole picture last, and the centre (n, 2) of each in 0..1."""

    pixels: Tensor
    positions: Tensor


def _grid_size(grid: str, side: int) -> tuple[int, int]:
    columns, rows = grid.split("x")
    return int(columns) * side, int(rows) * side


def _by_area(size: tuple[int, int], candidates: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The candidate that keeps most pixels of a picture; among equals the one that wastes least."""

    def score(candidate: tuple[int, int]) -> tuple[int, int]:
        scale = min(candidate[0] / size[0], candidate[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - candidate[0] * candidate[1]

    return max(candidates, key=score)


def _by_shape(size: tuple[int, int], candidates: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The candidate nearest in aspect ratio; among equals the one nearest in area."""
    ratio, area = size[0] / size[1], size[0] * size[1]
    return min(candidates, key=lambda c: (abs(ratio - c[0] / c[1]), abs(area - c[0] * c[1])))


def select_grid(size: tuple[int, int], grids: Sequence[str], side: int) -> tuple[int, int]:
    """Pixels (width, height) that a picture is resized to before it is cut.

    Args:
        size: width and height of the picture.
        grids: columns x rows, such as `2x1`.
        side: pixels of a tile's side.

    Returns:
        The choice by kept area, unless the choice by shape is smaller (SEED-X `any_res.py`).
    """
    candidates = [_grid_size(grid, side) for grid in grids]
    first, second = _by_area(size, candidates), _by_shape(size, candidates)
    return first if first[0] * first[1] <= second[0] * second[1] else second


def tile(picture: Image.Image, grids: Sequence[str], side: int) -> Tiles:
    """Cut a picture into tiles in raster order and append the whole; even a `1x1` grid gives two pieces."""
    width, height = select_grid(picture.size, grids, side)
    resized = picture.convert("RGB").resize((width, height))
    columns, rows = width // side, height // side
    pieces, positions = [], []
    for row in range(rows):
        for column in range(columns):
            box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
            pieces.append(to_pixels(resized.crop(box), side))
            positions.append(((column + 0.5) / columns, (row + 0.5) / rows))
    pieces.append(to_pixels(picture.convert("RGB").resize((side, side)), side))
    return Tiles(torch.stack(pieces), torch.tensor([*positions, WHOLE]))
