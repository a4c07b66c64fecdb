"""Attention that also trains fast on a CPU.

There the backward pass of torch's fused attention takes five to ten times as long in bfloat16 as in float32 (torch
2.13, a processor with AMX): a third of a step of the detokenizer. Where gradients are wanted on a CPU, attention is
therefore computed in float32, whatever `torch.autocast` asks for; everywhere else nothing changes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

FULL = "full_precision"  # name of `attend` among the attentions of `transformers`


def _trains_on_cpu(query: Tensor) -> bool:
    return query.device.type == "cpu" and torch.is_grad_enabled()


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention without a mask.

    Args:
        query: (B, H, Q, D_head).
        key: (B, H, K, D_head).
        value: (B, H, K, D_head).

    Returns:
        (B, H, Q, D_head), in the number type of `value`.
    """
    if not _trains_on_cpu(query):
        return F.scaled_dot_product_attention(query, key, value)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(value.dtype)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Attention of `transformers`' form: states (B, H, T, D_head) to (B, T, H, D_head)."""
    if not _trains_on_cpu(query):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    mask = attention_mask
    if mask is not None and mask.is_floating_point():  # added to the scores, not a choice among them
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        mixed, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **arguments)
    return mixed.to(value.dtype), None


AttentionInterface.register(FULL, _attend)
AttentionMaskInterface.register(FULL, sdpa_mask)
