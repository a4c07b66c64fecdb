"""What training the detokenizer on the latents of a VAE needs, counted on a step that has shapes and no numbers."""

import contextlib
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from nmlib.config import DetokenizerConfig, OptimConfig, Params, SeedXConfig
from nmlib.detokenizer import Detokenizer
from nmlib.latent_detokenizer import count_latent
from nmlib.plan import PEAK_TFLOPS, UTILISATION, vit_flops
from nmlib.train import repeat_forward_passes

NUMBER = 4  # bytes: everything is kept in 32 bits, products alone are taken in 16
STATES = 4  # numbers kept of every trained one: itself, its gradient, both moments of Adam
LATENT_CHANNELS, SHRINK = 4, 8  # of SDXL's VAE
VAE_WIDTHS = (128, 256, 512, 512)


def _attention() -> dict[Any, Any]:
    """What torch counts of attention on a card, for the operators in its place on a CPU, of which it counts nothing."""
    found, ops = {}, torch.ops.aten
    for name in ("_scaled_dot_product_flash_attention{}", "_scaled_dot_product_flash_attention{}_backward"):
        counted = partial(flop_registry[getattr(ops, name.format(""))])
        counted._get_raw = True  # type: ignore[attr-defined]  # it asks tensors for their shapes itself
        found[getattr(ops, name.format("_for_cpu"))] = counted
    return found


ATTENTION = _attention()


class Cost(NamedTuple):
    """Of a part of a batch: operations of a step, and bytes that the forward pass keeps for the backward pass."""

    flops: int
    activations: int


def training_bytes(parameters: int, optim: OptimConfig) -> int:
    """Bytes of weights, gradients, optimizer and running average; every process keeps them all."""
    return NUMBER * (STATES + bool(optim.ema_decay)) * parameters


@cache
def part_cost(
    settings: DetokenizerConfig, side: int, tokens: int, feature_dim: int, optim: OptimConfig, fake: bool = True
) -> Cost:
    """Count a training step on one part of a batch, in mixed precision.

    Args:
        settings: sizes of the detokenizer.
        side: of the latents.
        tokens: of a picture, M.
        feature_dim: width of a token.
        optim: says how many pictures a part has, and whether forward passes are repeated.
        fake: compute nothing: tensors have shapes alone.
    """
    pictures = -(-optim.batch_size // optim.parts)
    kept: dict[int, Tensor] = {}  # storages, held so that none takes the place of another

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        module = Detokenizer(settings, side, tokens, feature_dim, LATENT_CHANNELS).train()
        if optim.activation_checkpointing:
            repeat_forward_passes(module)
        shape = (pictures, LATENT_CHANNELS, side, side)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda tensor: tensor):
                losses = module(torch.zeros(pictures, tokens, feature_dim), torch.zeros(shape))
            losses.total.backward()
        own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    held = sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)
    return Cost(counter.get_total_flops(), held)


@cache
def vae_flops(side: int) -> int:
    """Operations of encoding one picture of `side` pixels with a VAE of SDXL's size."""
    levels = len(VAE_WIDTHS)
    with torch.device("meta"), torch.no_grad():
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=VAE_WIDTHS,
            layers_per_block=2,
            latent_channels=LATENT_CHANNELS,
        )
        with FlopCounterMode(display=False) as counter:
            vae.encode(torch.empty(1, 3, side, side))
    return counter.get_total_flops()


def report(params: Params, settings: SeedXConfig, gpus: int) -> str:
    """The plan of the detokenizer's steps in words and a table; the language model's pass before the last is left out.

    Args:
        params: names the steps in `detokenizer` and `tuning`.
        settings: sizes of the encoder.
        gpus: cards that share a batch; each holds a whole copy.
    """
    steps = {"detokenizer": params.detokenizer.optim}
    if params.tuning is not None:
        steps |= {"detokenizer-faces": params.tuning.faces, "detokenizer-predicted": params.tuning.predicted}
    vision = settings.vision
    sizes = (vision.image_size // SHRINK, vision.tokens, vision.feature_dim)
    parameters = count_latent(params.detokenizer, vision.image_size, *sizes[1:], LATENT_CHANNELS, SHRINK)
    frozen = vit_flops(settings) + vae_flops(vision.image_size)
    lines = [
        f"the detokenizer on latents of {LATENT_CHANNELS} x {sizes[0]} x {sizes[0]}: {parameters:,} parameters, "
        "all of them trained",
        f"{'step':24}{'pictures':>10}{'weights, optimizer':>20}{'activations':>14}{'operations':>12}{'time':>9}",
    ]
    for name, optim in steps.items():
        cost = part_cost(params.detokenizer, *sizes, optim)
        flops = optim.parts * cost.flops + optim.batch_size * frozen
        seconds = flops / (gpus * PEAK_TFLOPS * 1e12 * UTILISATION)
        lines.append(
            f"{name:24}{optim.batch_size:>10}{training_bytes(parameters, optim) / 1e9:>17.1f} GB"
            f"{cost.activations / 1e9:>11.1f} GB{flops:>12.2e}{seconds:>7.2f} s"
        )
    lines += [
        "activations are those of one part; operations are a step's, with the encoder's and the VAE's; the language",
        "model, which predicts the tokens of the last step in two passes, comes to that with its weights",
    ]
    return "\n".join(lines)
