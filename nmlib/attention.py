"""Attention of a training on a CPU: two products of matrices and a softmax, instead of one fused kernel.

On a CPU the backward pass of `torch`'s fused attention is slow: with bfloat16 and up to some hundred tokens plain
products take a tenth to a half of its time. They keep the scores of all heads, which at these lengths is little. On a
GPU, and where nothing is trained, attention is fused.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

LANGUAGE = "products_where_trained"  # name of `attend` in a config of `transformers`
_TRAINING = ContextVar("training", default=False)  # whether a CPU is within `training_attention`


@contextlib.contextmanager
def training_attention(device: torch.device) -> Iterator[None]:
    """Let attention in the block multiply matrices in the block's precision, where `device` is a CPU.

    That is `scaled_dot_product_attention` of `torch`, and `attend`, with gradients or without: the fused kernel is out
    of reach in the block.
    """
    if device.type != "cpu":
        yield
        return
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # of every device, whatever its name says
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    token = _TRAINING.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _TRAINING.reset(token)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of `transformers`' form under a mask: plain products where a CPU trains, fused elsewhere.

    The products that `training_attention` asks for look at every score for rows that see nothing, which is an eighth of
    a step; here every token sees itself.

    Args:
        module: the layer.
        query: (B, heads, T, D_head).
        key: (B, heads, S, D_head).
        value: (B, heads, S, D_head).
        attention_mask: (B, 1, T, S) bool, True where a row may look; every row sees something.
        scaling: what scores are multiplied by.
        options: of the fused attention; what products do not offer is left to it.

    Returns:
        (B, T, heads, D_head), and nothing.
    """
    trains = query.device.type == "cpu" and (query.requires_grad or _TRAINING.get())
    masked = attention_mask is not None and attention_mask.dtype == torch.bool and key.shape[1] == query.shape[1]
    more = options.get("dropout") or any(options.get(name) is not None for name in ("position_bias", "cache"))
    if not trains or attention_mask is None or not masked or more:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    unseen = torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, torch.finfo(dtype).min)
    with torch.autocast("cpu", enabled=False):  # which would keep the softmax in float32
        scores = (query * scaling) @ key.transpose(-1, -2)  # (B, heads, T, S)
        mixed = scores.add_(unseen).softmax(-1) @ value  # (B, heads, T, D_head)
    return mixed.transpose(1, 2).contiguous(), None  # (B, T, heads, D_head)


AttentionInterface.register(LANGUAGE, attend)
AttentionMaskInterface.register(LANGUAGE, sdpa_mask)
