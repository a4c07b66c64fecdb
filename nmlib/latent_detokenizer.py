"""The DiT detokenizer at full size: it draws the latents of a VAE, which the VAE turns into pixels.

The transformer, its losses and its sampling are those of `detokenizer`; only what is drawn differs. The VAE comes from
a local folder (SDXL's has four channels, those of later models sixteen), is frozen, and is no part of what is trained.
What SEED-X predicts, the average of each four neighbours in a row, is laid out on the square grid of its encoder, so
that every token stands where it belongs.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from nmlib import checkpoint
from nmlib.checkpoint import CheckpointError
from nmlib.config import DetokenizerConfig
from nmlib.detokenizer import Detokenizer, DetokenizerLosses
from nmlib.seedx import count_parameters
from nmlib.seedx_detokenizer import load_vae
from nmlib.seedx_vision import repeat_tokens

VAE_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # the first that is there is read


class LatentDetokenizer(Detokenizer):
    """Tokens (B, N or M, D_feature) to pictures (B, 3, H, W) by way of latents (B, C, H / f, W / f).

    Args:
        settings: sizes, sampling steps, guidance; `patch_size` is in latents.
        image_size: pixels a side.
        tokens: M, of the encoder's square grid; fewer are repeated until they are as many.
        feature_dim: width of a token.
        vae: frozen, and neither trained nor saved with this module.

    Raises:
        ValueError: the sides of picture, latents, patches and tokens do not divide.
    """

    def __init__(
        self, settings: DetokenizerConfig, image_size: int, tokens: int, feature_dim: int, vae: AutoencoderKL
    ) -> None:
        frozen: Any = vae
        known = frozen.config
        factor = 2 ** (len(known.block_out_channels) - 1)
        side = image_size // factor
        if image_size % factor or side % settings.patch_size or side < int(tokens**0.5):
            raise ValueError(
                f"image_size {image_size}: a VAE that shrinks {factor} times and detokenizer.patch_size "
                f"{settings.patch_size} need a multiple of {factor * settings.patch_size}, and at least "
                f"{factor * int(tokens**0.5)} for {tokens} tokens"
            )
        super().__init__(settings, side, tokens, feature_dim, known.latent_channels)
        self._frozen = [frozen]
        self.scaling = float(known.scaling_factor)
        self.shift = float(getattr(known, "shift_factor", None) or 0.0)

    def forward(self, tokens: Tensor, images: Tensor) -> DetokenizerLosses:
        """Flow-matching loss of pictures (B, 3, H, W) in [0, 1] given tokens (B, N or M, D_feature)."""
        return super().forward(repeat_tokens(tokens, len(self.null)), images)

    def decode(
        self, tokens: Tensor, *, seed: int = 0, steps: int | None = None, guidance_scale: float | None = None
    ) -> Tensor:
        """Pictures of tokens (B, N or M, D_feature); see `Detokenizer.decode`."""
        spread = repeat_tokens(tokens, len(self.null))  # (B, M, D_feature)
        return super().decode(spread, seed=seed, steps=steps, guidance_scale=guidance_scale)

    @torch.no_grad()
    def from_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of about unit size: the VAE's mode, in 32 bits, since SDXL's overflows in 16."""
        vae = self._vae(images)
        with torch.autocast(images.device.type, enabled=False):
            latents = vae.encode(images.float() * 2 - 1).latent_dist.mode()  # (B, C, h, w)
        return (latents - self.shift) * self.scaling

    @torch.no_grad()
    def to_images(self, drawn: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of latents (B, C, h, w)."""
        vae = self._vae(drawn)
        with torch.autocast(drawn.device.type, enabled=False):
            pixels = vae.decode(drawn.float() / self.scaling + self.shift, return_dict=False)[0]  # (B, 3, H, W)
        return super().to_images(pixels)

    def _vae(self, beside: Tensor) -> Any:
        self._frozen[0] = self._frozen[0].to(beside.device)
        return self._frozen[0]


def latent_detokenizer(
    settings: DetokenizerConfig, image_size: int, tokens: int, feature_dim: int, folder: Path
) -> tuple[LatentDetokenizer, dict[str, Any]]:
    """A fresh detokenizer, and what rebuilds it beside its VAE.

    Args:
        settings, image_size, tokens, feature_dim: as in `LatentDetokenizer`.
        folder: `vae/` of a diffusers pipeline.
    """
    module = LatentDetokenizer(settings, image_size, tokens, feature_dim, load_vae(folder))
    metadata = {
        "settings": settings.model_dump(mode="json"),
        "image_size": image_size,
        "tokens": tokens,
        "feature_dim": feature_dim,
        "vae": vae_fingerprint(folder),
    }
    return module, metadata


def vae_fingerprint(folder: Path) -> str:
    """Hash of a VAE's settings and weights.

    Raises:
        CheckpointError: there is no VAE in the folder.
    """
    weights = next((folder / name for name in VAE_WEIGHTS if (folder / name).is_file()), None)
    if weights is None or not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no VAE; expected config.json and {' or '.join(VAE_WEIGHTS)}")
    state = hashlib.blake2b(digest_size=8)
    for path in (folder / "config.json", weights):
        with path.open("rb") as file:
            state.update(hashlib.file_digest(file, "blake2b").digest())
    return state.hexdigest()


def load_latent_detokenizer(path: Path, folder: Path) -> LatentDetokenizer:
    """A trained detokenizer, frozen, with the VAE whose latents it draws.

    Args:
        path: of the file that the training wrote.
        folder: of the VAE.

    Raises:
        CheckpointError: a file is missing or damaged, or the VAE is another one than that of the training.
    """
    tensors, metadata = checkpoint.load(path)
    if "vae" not in metadata:
        raise CheckpointError(f"{path}: draws pixels and needs no VAE; load it with `codec.load_detokenizer`")
    settings = DetokenizerConfig.model_validate_json(checkpoint.as_json(metadata["settings"]))
    sizes = (metadata["image_size"], metadata["tokens"], metadata["feature_dim"])
    if vae_fingerprint(folder) != metadata["vae"]:
        raise CheckpointError(f"{folder}: another VAE than the one that {path} was trained with")
    module, _ = latent_detokenizer(settings, *sizes, folder)
    return checkpoint.freeze(module, tensors, path)


def count_latent(
    settings: DetokenizerConfig, image_size: int, tokens: int, feature_dim: int, channels: int = 4, shrink: int = 8
) -> int:
    """Numbers of a detokenizer, counted on the meta device; `channels` and `shrink` are those of SDXL's VAE."""
    with torch.device("meta"):
        return count_parameters(Detokenizer(settings, image_size // shrink, tokens, feature_dim, channels))
