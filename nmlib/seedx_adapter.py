"""SEED-X's SDXL adapter: image tokens in the place of SDXL's two text encoders.

A perceiver turns 64 or 256 tokens into SDXL's context of 64 tokens and its pooled vector. Differences from a textbook
perceiver: latents read the tokens and themselves, projections have no bias, and the pooled vector is one attention
over the latents with their mean as the query, as in CLIP.
Source: SEED-X `adapter_modules.py`, `resampler.py` (restated in our own words), state keys kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

TEXT_WIDTHS = (768, 1280)  # of SDXL's two text encoders
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


class PerceiverAttention(nn.Module):
    """Latents that read tokens and themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """Tokens (B, M, D) and latents (B, N, D) -> (B, N, D)."""
        tokens, latents = self.norm1(tokens), self.norm2(latents)
        read = torch.cat([tokens, latents], dim=1)  # (B, M + N, D)
        keys, values = self.to_kv(read).chunk(2, dim=-1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(latents), keys, values)
        )  # (B, H, ., D/H)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)


class AttentionPool(nn.Module):
    """The mean of some tokens asks them and itself: one vector, as in CLIP."""

    def __init__(self, tokens: int, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, out)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, out)."""
        read = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positional_embedding  # (B, N + 1, D)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj(read[:, :1]), self.k_proj(read), self.v_proj(read))
        )  # (B, H, ., D/H)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, 1, D)
        return self.c_proj(mixed)[:, 0]  # (B, out)


class AdapterResampler(nn.Module):
    """Image tokens to SDXL's context and pooled vector.

    Args:
        token_dim: width of an image token.
        width: of the latents.
        depth: layers.
        heads: attention heads.
        latents: tokens of the context.
        widths: of the two text encoders that are replaced.
    """

    def __init__(
        self,
        token_dim: int = 4096,
        width: int = 1024,
        depth: int = 4,
        heads: int = 16,
        latents: int = 64,
        widths: tuple[int, int] = TEXT_WIDTHS,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(width**-0.5 * torch.randn(1, latents, width))
        self.proj_in = nn.Linear(token_dim, width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, heads), _feed_forward(width)]) for _ in range(depth)
        )
        self.norm_out = nn.LayerNorm(width)
        self.unet_proj_1 = nn.Linear(width, widths[0])
        self.unet_proj_2 = nn.Linear(width, widths[1])
        self.unet_attnpool = AttentionPool(latents, width, heads, widths[1])

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, M, D_feature) to context (B, N, 2048) and pooled vector (B, 1280)."""
        latents = self.latents.expand(len(tokens), -1, -1)  # (B, N, D)
        read = self.proj_in(tokens)  # (B, M, D)
        for layer in self.layers:
            attend, feed = layer.children()
            latents = latents + attend(read, latents)
            latents = latents + feed(latents)
        states = self.norm_out(latents)  # (B, N, D)
        context = torch.cat([self.unet_proj_1(states), self.unet_proj_2(states)], dim=-1)  # (B, N, 2048)
        return context, self.unet_attnpool(states)


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
    )


class SDXLAdapter(nn.Module):
    """The released detokenizer: SDXL's UNet and the resampler that speaks to it.

    Args:
        condition_image: second stage, which also reads the latent of a picture in four more input channels.
        unet: sizes in `diffusers`' terms; by default SDXL's.
        resampler: sizes of `AdapterResampler`; by default the released ones.
    """

    def __init__(
        self,
        condition_image: bool = False,
        unet: dict[str, Any] | None = None,
        resampler: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        channels = 8 if condition_image else 4
        self.unet: Any = UNet2DConditionModel(**{**(unet or SDXL), "in_channels": channels, "out_channels": 4})
        self.resampler = AdapterResampler(**(resampler or {}))

    def forward(
        self, noisy: Tensor, timestep: Tensor, tokens: Tensor, time_ids: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """The noise that SDXL finds in latents.

        Args:
            noisy: (B, 4, h, w) latents.
            timestep: (B,).
            tokens: (B, M, D_feature) image tokens, 64 or 256.
            time_ids: (B, 6) original size, crop and target size.
            condition: (B, 4, h, w) latent of a picture, not scaled; second stage only.

        Returns:
            (B, 4, h, w).
        """
        context, pooled = self.resampler(tokens)
        extra = {"text_embeds": pooled, "time_ids": time_ids}
        read = noisy if condition is None else torch.cat([noisy, condition], dim=1)  # (B, 4 or 8, h, w)
        return self.unet(read, timestep, encoder_hidden_states=context, added_cond_kwargs=extra, return_dict=False)[0]
