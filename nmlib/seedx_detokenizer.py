"""SEED-X's released detokenizer as a `TokenDecoder`: its SDXL adapter loaded from its files, and sampled.

The files are `seed_detokenizer/{first_stage,second_stage}/pytorch_model.bin`. Whether the first holds SDXL's whole UNet
or its keys and values alone is not known from outside, so both are read, each strictly; the rest then comes from SDXL's
own `unet/`.
Source: SEED-X `adapter_modules.py`, `pipeline_stable_diffusion_xl_t2i_edit.py` (restated in our own words).
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from torch import Tensor, nn

from nmlib.checkpoint import CheckpointError, require_fit
from nmlib.config import SeedXVisionConfig
from nmlib.seedx_adapter import SDXLAdapter
from nmlib.seedx_files import headers_of, tensors_of, weight_files
from nmlib.seedx_vision import QwenViT, pool_tokens

UNET = "unet."
KEYS_AND_VALUES = re.compile(r"^unet\..*\.to_[kv]\.weight$")
NOISE: dict[str, Any] = {  # SDXL's schedule
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "timestep_spacing": "leading",
}  # fmt: skip


def load_adapter(
    path: Path,
    unet: Path | None = None,
    *,
    condition_image: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    sizes: Mapping[str, dict[str, Any]] | None = None,
) -> SDXLAdapter:
    """The adapter of a file that SEED-X released, every tensor accounted for.

    Args:
        path: `pytorch_model.bin` of a stage, or its folder.
        unet: SDXL's own `unet/`, needed where the file holds keys and values of the UNet only.
        condition_image: the second stage, whose UNet reads a picture in four more channels.
        dtype: number type of all weights.
        device: where they go.
        sizes: `unet` and `resampler` sizes of `SDXLAdapter`; by default the released ones.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshapen; or the UNet is not whole and `unet` is not given.
    """
    with torch.device("meta"):
        adapter = SDXLAdapter(condition_image, **(sizes or {}))
    files = weight_files(path)
    found = {name: header.shape for name, header in headers_of(files).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    own = dict(wanted)
    if all(KEYS_AND_VALUES.match(name) for name in found if name.startswith(UNET)):
        own = {name: shape for name, shape in wanted.items() if not _of_the_base(name)}
    require_fit(own, found, "SDXLAdapter", str(path))
    if len(own) < len(wanted):
        _move_base(adapter, unet, path, wanted, dtype, device)
    for file in files:
        for name, tensor in tensors_of(file):
            _place(adapter, name, tensor, dtype, device)
    return adapter.eval().requires_grad_(False)


def _of_the_base(name: str) -> bool:
    """Whether a tensor is one of the UNet that SEED-X's first stage leaves as SDXL has it."""
    return name.startswith(UNET) and not KEYS_AND_VALUES.match(name)


def _move_base(
    adapter: SDXLAdapter,
    unet: Path | None,
    path: Path,
    wanted: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Take what the adapter's file does not hold from SDXL's own UNet, which must be whole."""
    if unet is None:
        raise CheckpointError(f"{path}: holds keys and values of the UNet only; give SDXL's own unet/ as well")
    files = weight_files(unet)
    found = {UNET + name: header.shape for name, header in headers_of(files).items()}
    expected = {name: shape for name, shape in wanted.items() if name.startswith(UNET)}
    require_fit(expected, found, "UNet2DConditionModel", str(unet))
    for file in files:
        for name, tensor in tensors_of(file):
            if _of_the_base(UNET + name):
                _place(adapter, UNET + name, tensor, dtype, device)


def _place(module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> None:
    value = tensor.to(dtype=dtype, device=device, copy=True)
    set_module_tensor_to_device(module, name, device, value=value, dtype=dtype)


def load_vae(path: Path, device: torch.device | str = "cpu") -> AutoencoderKL:
    """SDXL's `vae/` in 32 bits, in which alone it does not overflow.

    Raises:
        CheckpointError: there is no such folder, or it does not fit its own settings.
    """
    try:
        vae = AutoencoderKL.from_pretrained(path, local_files_only=True, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no VAE ({' '.join(str(error).split())})") from None
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def black_tokens(vit: QwenViT, settings: SeedXVisionConfig) -> Tensor:
    """What SEED-X guides away from: the encoder's tokens (M, D_feature) of a picture of normalised zeros."""
    side = settings.image_size
    return vit(torch.zeros(1, 3, side, side, dtype=vit.proj.dtype, device=vit.proj.device))[0]  # (M, D_feature)


class SDXLDetokenizer(nn.Module):
    """Tokens to pictures by SDXL, which SEED-X's adapter lets read them.

    Args:
        adapter: of the first or second stage.
        vae: of SDXL.
        negative: (M, D_feature) from `black_tokens`.
        image_size: pixels a side, 1024 as released.
    """

    sampling_steps, guidance_scale, image_guidance_scale = 50, 7.5, 1.5

    def __init__(self, adapter: SDXLAdapter, vae: AutoencoderKL, negative: Tensor, image_size: int = 1024) -> None:
        super().__init__()
        self.adapter, self.image_size = adapter, image_size
        self.vae: Any = vae
        self.negative: Tensor
        self.register_buffer("negative", negative)
        self.reads_picture = adapter.unet.config.in_channels == 8

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Pictures of tokens; the same tokens, seed and settings give the same pixels.

        Args:
            tokens: (B, M, D_feature), predicted ones (64) or the encoder's (256).
            seed: of the starting noise, one noise for all pictures.
            steps: of Euler's method; None takes 50.
            guidance_scale: None takes 7.5.
            condition: (B, 3, H, W) in [0, 1], the picture that is edited; second stage only, nothing where absent.

        Returns:
            (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: a picture for the first stage, which reads none.
        """
        if condition is not None and not self.reads_picture:
            raise ValueError("condition: the first stage reads no picture; load the second with condition_image=True")
        scheduler: Any = EulerDiscreteScheduler(**NOISE)
        with warnings.catch_warnings():  # diffusers asks numpy for an array in an old way
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            scheduler.set_timesteps(steps or self.sampling_steps, device=tokens.device)
        side = self.image_size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        noise = torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed)).to(tokens)
        latents = noise.expand(len(tokens), -1, -1, -1) * scheduler.init_noise_sigma  # (B, 4, h, w)
        seen = self._latents_of(condition, latents)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            found = self._guided(scaled, timestep.expand(len(tokens)), tokens, seen, scale)  # (B, 4, h, w)
            latents = scheduler.step(found, timestep, latents, return_dict=False)[0]
        decoded = self.vae.decode(latents.float() / self.vae.config.scaling_factor, return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1)  # (B, 3, H, W)

    def _latents_of(self, condition: Tensor | None, latents: Tensor) -> Tensor | None:
        """The picture that is edited as the UNet reads it: the VAE's mode, not scaled; zeros where there is none."""
        if not self.reads_picture:
            return None
        if condition is None:
            return torch.zeros_like(latents)
        return self.vae.encode(condition.float() * 2 - 1).latent_dist.mode().to(latents)  # (B, 4, h, w)

    def _guided(self, noisy: Tensor, timestep: Tensor, tokens: Tensor, seen: Tensor | None, scale: float) -> Tensor:
        """Noise (B, 4, h, w), away from black tokens, and in the second stage away from no picture as well."""
        size = float(self.image_size)
        time_ids = tokens.new_tensor([[size, size, 0, 0, size, size]]).expand(len(tokens), -1)  # (B, 6)
        negative = pool_tokens(self.negative[None].to(tokens), tokens.shape[1]).expand_as(tokens)  # (B, M, D_feature)
        told = self.adapter(noisy, timestep, tokens, time_ids, seen)
        untold = self.adapter(noisy, timestep, negative, time_ids, seen)
        if seen is None:
            return untold + scale * (told - untold)
        blind = self.adapter(noisy, timestep, negative, time_ids, torch.zeros_like(seen))
        return blind + scale * (told - untold) + self.image_guidance_scale * (untold - blind)
