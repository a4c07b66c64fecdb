"""The image encoder: Qwen-VL's ViT with attention pooling at any size, and how the small one is trained.

Differences from a textbook ViT: no class token; a learned 16 x 16 style position grid resized bicubically to
the patches; query, key and value are interleaved for each head; a `Resampler` pools the patches to N tokens.
Source: SEED-X `qwen_visual.py`, architecture only (restated in our own words), module names kept.

Trained once on its source (reconstruction and reading the labels from *noisy* tokens), then frozen. The noise
is the point: a feature that is small in the tokens would be lost, so every attribute takes a large share of
them, and the language model's feature loss cannot overlook it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmlib.config import VisionConfig
from nmlib.resampler import Resampler, resize_positions


class VisualAttention(nn.Module):
    """Self-attention whose fused projection holds [q, k, v] of head 0, then of head 1, and so on."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        mixed = self.in_proj(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, P, 3*D/H)
        q, k, v = mixed.chunk(3, dim=-1)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, P, D)


class VisualMLP(nn.Module):
    """Feed-forward with exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        return self.c_proj(F.gelu(self.c_fc(hidden_states)))


class VisualBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisualAttention(width, heads)
        self.mlp = VisualMLP(width, hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states))
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class VisualBlocks(nn.Module):
    """The stack of blocks, under SEED-X's name."""

    def __init__(self, blocks: list[VisualBlock]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        for block in self.resblocks:
            hidden_states = block(hidden_states)
        return hidden_states


class VisionTransformer(nn.Module):
    """Pictures to N tokens of width `feature_dim`.

    Args:
        settings: sizes; `tokens` is N.
        image_size: pixels a side.
        normalize: give every token zero mean and unit variance (the small encoder; SEED-X's does not).
    """

    def __init__(self, settings: VisionConfig, image_size: int, normalize: bool = True) -> None:
        super().__init__()
        width, grid = settings.width, image_size // settings.patch_size
        self.normalize = normalize
        self.conv1 = nn.Conv2d(3, width, settings.patch_size, settings.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(grid * grid, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        blocks = [VisualBlock(width, settings.heads, 4 * width) for _ in range(settings.layers)]
        self.transformer = VisualBlocks(blocks)
        pool_dim = max(settings.feature_dim, width)
        self.attn_pool = Resampler(settings.tokens, pool_dim, settings.heads, width, eps=1e-6)
        self.attn_pool.start_at_own_position()
        self.ln_post = nn.LayerNorm(pool_dim, eps=1e-6)
        self.proj = nn.Parameter(pool_dim**-0.5 * torch.randn(pool_dim, settings.feature_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to tokens (B, N, feature_dim), on the device of the images."""
        patches = self.conv1(images.to(self.proj.device) * 2 - 1).flatten(2).transpose(1, 2)  # (B, P, D)
        hidden_states = self.ln_pre(patches + resize_positions(self.positional_embedding, patches.shape[1]))
        hidden_states = self.transformer(hidden_states)  # (B, P, D)
        tokens = self.ln_post(self.attn_pool(hidden_states)) @ self.proj  # (B, N, feature_dim)
        return (F.layer_norm(tokens, tokens.shape[-1:]) if self.normalize else tokens).to(images.device)


class EncoderLosses(NamedTuple):
    """What the encoder is trained on; `total` is the weighted sum."""

    total: Tensor
    pixels: Tensor
    attributes: Tensor
    subject: Tensor


class EncoderTrainer(nn.Module):
    """Scaffolding around the encoder while it learns: a pixel decoder and linear label heads.

    Args:
        settings: the encoder's settings.
        image_size: pixels a side.
        attribute_sizes: number of values of each attribute.
        subject_dim: numbers of a subject.
    """

    def __init__(
        self, settings: VisionConfig, image_size: int, attribute_sizes: tuple[int, ...], subject_dim: int
    ) -> None:
        super().__init__()
        self.settings, self.attribute_sizes = settings, attribute_sizes
        self.encoder = VisionTransformer(settings, image_size)
        self.decoder = PixelDecoder(settings, image_size)
        flat = settings.tokens * settings.feature_dim
        self.attribute_head = nn.Linear(flat, sum(attribute_sizes))
        self.subject_head = nn.Linear(flat, subject_dim)

    def forward(self, images: Tensor, values: Tensor, subjects: Tensor) -> EncoderLosses:
        """Losses of a batch.

        Args:
            images: (B, 3, H, W) in [0, 1].
            values: (B, A) int64.
            subjects: (B, S).
        """
        tokens = self.encoder(images)  # (B, N, D)
        tokens = tokens + self.settings.noise * torch.randn_like(tokens)
        pixels = F.mse_loss(self.decoder(tokens).float(), images)
        logits = self.attribute_head(tokens.flatten(1)).float().split(self.attribute_sizes, dim=1)
        attributes = sum(
            (F.cross_entropy(part, values[:, index]) for index, part in enumerate(logits)), start=pixels.new_zeros(())
        ) / len(logits)
        subject = F.mse_loss(self.subject_head(tokens.flatten(1)).float(), subjects)
        weights = self.settings
        total = 100 * pixels + weights.attribute_weight * attributes + weights.subject_weight * subject
        return EncoderLosses(total, pixels, attributes, subject)


class PixelDecoder(nn.Module):
    """A plain transformer from tokens to pixels in one pass; only the encoder's training needs it."""

    def __init__(self, settings: VisionConfig, image_size: int) -> None:
        super().__init__()
        width, self.patch = settings.width, settings.patch_size
        self.grid, self.side = int(settings.tokens**0.5), image_size // settings.patch_size
        self.condition = nn.Linear(settings.feature_dim, width)
        self.canvas = nn.Parameter(0.02 * torch.randn(self.side**2, width))
        self.blocks = nn.ModuleList([VisualBlock(width, settings.heads, 4 * width) for _ in range(settings.layers)])
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, 3 * self.patch**2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, feature_dim) -> (B, 3, H, W), not clamped."""
        cells = self.condition(tokens).transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, D, g, g)
        spread = F.interpolate(cells, size=(self.side, self.side), mode="nearest")  # (B, D, p, p)
        hidden_states = spread.flatten(2).transpose(1, 2) + self.canvas  # (B, P, D)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        patches = self.pixels(self.norm(hidden_states)) + 0.5  # (B, P, 3*patch*patch)
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (self.side, self.side)), self.patch)
