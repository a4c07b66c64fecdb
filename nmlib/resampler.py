"""SEED-X's resampler: one cross-attention from a grid of learned queries to image features.

It appears three times: it pools the ViT, it brings image features to the language model (input) and
brings hidden states back to image features (output). Differences from a textbook perceiver: one layer,
no feed-forward, no residual; positions are added to queries and keys but never to values.
Source: SEED-X `src/models/tokenizer/qwen_visual.py` (restated in our own words), class names and state keys kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITION_SHARPNESS = 10.0


def sincos_grid(dim: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of a square grid; the first half of the dimensions encodes x.

    Args:
        dim: width D, a multiple of 4.
        side: cells a side.

    Returns:
        (side * side, D), raster order.
    """
    if dim % 4:
        raise ValueError(f"sincos_grid: dim {dim} must be a multiple of 4 (sine and cosine for x and for y)")
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = []
    for axis in (x, y):
        angle = axis.reshape(-1, 1).double() * omega  # (side*side, D/4)
        halves.append(torch.cat([angle.sin(), angle.cos()], dim=1))  # (side*side, D/2)
    return torch.cat(halves, dim=1).float()  # (side*side, D)


def resize_positions(positions: Tensor, count: int) -> Tensor:
    """Resize grid positions (n*n, D) to another square count (N, D), bicubic as in SEED-X."""
    if positions.shape[0] == count:
        return positions
    old, new = int(positions.shape[0] ** 0.5), int(count**0.5)
    if new * new != count:
        raise ValueError(f"resize_positions: {count} tokens do not form a square grid")
    grid = positions.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)  # (1, D, new, new)
    return grid.permute(0, 2, 3, 1).reshape(count, -1).to(positions.dtype)  # (N, D)


class Resampler(nn.Module):
    """Cross-attention from `queries` learned grid queries to a grid of features.

    Args:
        queries: number of output tokens, a square number.
        embed_dim: width of the output.
        heads: attention heads.
        kv_dim: width of the input.
        eps: LayerNorm epsilon; 1e-5 alone, 1e-6 inside the ViT.
    """

    def __init__(self, queries: int, embed_dim: int, heads: int, kv_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(sincos_grid(embed_dim, int(queries**0.5)), requires_grad=False)
        self.query = nn.Parameter(torch.empty(queries, embed_dim))
        self.kv_proj = nn.Linear(kv_dim, embed_dim, bias=False)
        self.attn = nn.MultiheadAttention(embed_dim, heads)
        self.ln_q = nn.LayerNorm(embed_dim, eps=eps)
        self.ln_kv = nn.LayerNorm(embed_dim, eps=eps)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.kv_proj.weight, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, M, kv_dim) to tokens (B, N, embed_dim)."""
        keys_values = self.ln_kv(self.kv_proj(features))  # (B, M, D)
        query = self.ln_q(self.query) + self.pos_embed  # (N, D)
        query = query.expand(len(features), -1, -1)  # (B, N, D)
        keys = keys_values + resize_positions(self.pos_embed, features.shape[1])  # (B, M, D)
        q_weight, k_weight, v_weight = self.attn.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = self.attn.in_proj_bias.chunk(3)
        heads = self.attn.num_heads
        q = F.linear(query, q_weight, q_bias).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, N, D/H)
        k = F.linear(keys, k_weight, k_bias).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, M, D/H)
        v = F.linear(keys_values, v_weight, v_bias).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, M, D/H)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
        return self.attn.out_proj(mixed)  # (B, N, D)

    @torch.no_grad()
    def start_at_own_position(self) -> None:
        """Initialise so that each query attends to the feature at its own place of the grid.

        A fresh resampler averages all positions and must first learn to look straight ahead, which costs a
        small model most of its training. The query and key maps are set to a whitening of the fixed positions,
        the value path to an orthogonal map; shapes and keys stay SEED-X's.
        """
        dim, heads = self.query.shape[1], self.attn.num_heads
        head_dim = dim // heads
        positions = self.pos_embed.double()
        centred = positions - positions.mean(0)  # (N, D)
        _, values, basis = torch.linalg.svd(centred, full_matrices=False)
        rank = min(int((values > 1e-3 * values[0]).sum()), head_dim)
        scale = (POSITION_SHARPNESS * head_dim**0.5 * len(positions) / rank) ** 0.5
        whiten = (basis[:rank] / values[:rank, None] * scale).float()  # (rank, D)
        weight = torch.zeros(2, heads, head_dim, dim)
        weight[:, :, :rank] = whiten
        self.attn.in_proj_weight[: 2 * dim] = weight.reshape(2 * dim, dim)
        self.attn.in_proj_bias.zero_()
        self.attn.in_proj_bias[: 2 * dim] = -self.attn.in_proj_weight[: 2 * dim] @ positions.mean(0).float()
        self.attn.out_proj.bias.zero_()
        nn.init.orthogonal_(self.attn.in_proj_weight[2 * dim :])
        nn.init.orthogonal_(self.attn.out_proj.weight)
        self.ln_q.weight.zero_()
        # Values must not look like positions (nor carry a mean, which LayerNorm would subtract): otherwise their
        # content would steer where the queries attend.
        nn.init.orthogonal_(self.kv_proj.weight)
        plane = torch.cat([basis[:rank], torch.ones(1, dim)]).double()  # (rank + 1, D)
        plane = torch.linalg.qr(plane.T).Q.float()  # (D, rank + 1)
        self.kv_proj.weight -= plane @ (plane.T @ self.kv_proj.weight)
