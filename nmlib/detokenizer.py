"""The DiT detokenizer: image tokens to pixels by flow matching.

`diffusers`' PixArt transformer reads the tokens by cross-attention (each with a code of its place) and, laid out
as a map, as extra input channels: the tokens are a picture already, and a transformer that is told where each
belongs learns several times faster. It predicts the clean picture; a light convolution over the result removes
the seams between patches. Trained for reconstruction, with a learned null condition for guidance.
"""

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from torch import Tensor, nn

from nmlib.config import DetokenizerConfig
from nmlib.resampler import sincos_grid

MAP_CHANNELS = 16
SMOOTHING_CHANNELS = 16
LEAST_TIME = 0.15


class DetokenizerLosses(NamedTuple):
    """`total` weights the squared error of each picture by its noise level; `pixels` does not."""

    total: Tensor
    pixels: Tensor


@runtime_checkable
class TokenDecoder(Protocol):
    """What makes pictures of tokens: the DiT below, or SEED-X's adapter (`seedx_detokenizer`)."""

    def decode(
        self, tokens: Tensor, *, seed: int = 0, steps: int | None = None, guidance_scale: float | None = None
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of tokens (B, N, D_feature)."""
        ...


class Detokenizer(nn.Module):
    """Tokens (B, N, D_feature) to pictures (B, 3, H, W).

    Args:
        settings: sizes, sampling steps, guidance.
        image_size: pixels a side.
        tokens: N, a square number.
        feature_dim: width of a token.
        channels: of what is drawn, 3 for pixels.
    """

    def __init__(
        self, settings: DetokenizerConfig, image_size: int, tokens: int, feature_dim: int, channels: int = 3
    ) -> None:
        super().__init__()
        self.settings, self.image_size, self.channels = settings, image_size, channels
        self.grid = int(tokens**0.5)
        self.cells = math.gcd(image_size // self.grid, 4)
        self.null = nn.Parameter(torch.zeros(tokens, feature_dim))
        self.register_buffer("places", sincos_grid(settings.width, self.grid))
        self.place_tokens = nn.Linear(feature_dim, settings.width)
        self.to_map = nn.Linear(feature_dim, MAP_CHANNELS * self.cells**2)
        self.dit: Any = PixArtTransformer2DModel(
            num_attention_heads=settings.heads,
            attention_head_dim=settings.width // settings.heads,
            in_channels=channels + MAP_CHANNELS,
            out_channels=channels,
            num_layers=settings.layers,
            cross_attention_dim=settings.width,
            sample_size=image_size,
            patch_size=settings.patch_size,
            caption_channels=settings.width,
            use_additional_conditions=False,
            interpolation_scale=1,
        )
        self.smooth = nn.Sequential(
            nn.Conv2d(channels + MAP_CHANNELS, SMOOTHING_CHANNELS, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(SMOOTHING_CHANNELS, channels, 3, padding=1),
        )
        for parameter in self.smooth[-1].parameters():
            nn.init.zeros_(parameter)

    def from_images(self, images: Tensor) -> Tensor:
        """What the transformer draws, (B, channels, H, W) of about unit size, for pictures (B, 3, H, W) in [0, 1]."""
        return images * 2 - 1

    def to_images(self, drawn: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]; undoes `from_images`."""
        return (drawn / 2 + 0.5).clamp(0, 1)

    def condition(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens as a caption (B, N, D) and as a map (B, C, H, W)."""
        caption = self.place_tokens(tokens) + self.places  # (B, N, D)
        cells = self.to_map(tokens).transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, C*k*k, g, g)
        layout = F.pixel_shuffle(cells, self.cells)  # (B, C, g*k, g*k)
        size = (self.image_size, self.image_size)
        return caption, F.interpolate(layout.float(), size, mode="bilinear", align_corners=False)  # (B, C, H, W)

    def predict(self, noisy: Tensor, time: Tensor, caption: Tensor, layout: Tensor) -> Tensor:
        """What was drawn, before the noise: the clean (B, channels, H, W) that a noisy one comes from.

        Args:
            noisy: (1 - time) * clean + time * noise.
            time: (B,) in (0, 1].
            caption: from `condition`.
            layout: from `condition`.
        """
        stacked = torch.cat([noisy, layout], dim=1)  # (B, channels + C, H, W)
        clean = self.dit(stacked, encoder_hidden_states=caption, timestep=time * 1000, return_dict=False)[0]
        return clean + self.smooth(torch.cat([clean, layout], dim=1))  # (B, channels, H, W)

    def forward(self, tokens: Tensor, images: Tensor) -> DetokenizerLosses:
        """Flow-matching loss of pictures given their tokens.

        Args:
            tokens: (B, N, D_feature).
            images: (B, 3, H, W) in [0, 1].
        """
        count = len(images)
        strength = self.settings.token_noise * torch.rand(count, 1, 1, device=tokens.device)
        tokens = tokens + strength * torch.randn_like(tokens)
        dropped = torch.rand(count, device=tokens.device) < self.settings.condition_dropout
        tokens = torch.where(dropped[:, None, None], self.null, tokens)  # (B, N, D_feature)
        clean = self.from_images(images)  # (B, channels, H, W)
        time = torch.sigmoid(1.2 * torch.randn(count, device=tokens.device) + 0.3)  # (B,)
        level = time[:, None, None, None]
        noisy = (1 - level) * clean + level * torch.randn_like(clean)
        error = (self.predict(noisy, time, *self.condition(tokens)).float() - clean).square().mean((1, 2, 3))  # (B,)
        return DetokenizerLosses((error / time.clamp_min(LEAST_TIME) ** 2).mean(), error.mean())

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, *, seed: int = 0, steps: int | None = None, guidance_scale: float | None = None
    ) -> Tensor:
        """Pictures of tokens; the same tokens, seed and settings give the same pixels, alone or in a batch.

        Args:
            tokens: (B, N, D_feature).
            seed: of the starting noise, one noise for all pictures.
            steps: sampling steps; None takes the settings'.
            guidance_scale: 1 is no guidance; None takes the settings'.

        Returns:
            (B, 3, H, W) in [0, 1], on the device of the tokens.
        """
        given, tokens = tokens.device, tokens.to(self.null.device)
        scale = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        count = self.settings.sampling_steps if steps is None else steps
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.channels, self.image_size, self.image_size, generator=generator)
        picture = noise.to(tokens.device).expand(len(tokens), -1, -1, -1)  # (B, channels, H, W)
        conditions = [self.condition(tokens)]
        if scale != 1:
            conditions.append(self.condition(self.null.expand_as(tokens)))
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1 - step / count for step in range(count)], device=tokens.device)
        for timestep in scheduler.timesteps:
            time = (timestep / 1000).expand(len(tokens))
            clean = [self.predict(picture, time, *condition).float() for condition in conditions]
            guided = clean[0] if scale == 1 else clean[1] + scale * (clean[0] - clean[1])
            velocity = (picture - guided) / time[:, None, None, None]
            picture = scheduler.step(velocity, timestep, picture, return_dict=False)[0]
        return self.to_images(picture).to(given)  # (B, 3, H, W)
