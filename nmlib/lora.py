"""LoRA on a language model: which layers, and in which order their products are computed.

`peft` computes W x and then B (A x). Where the rank is not small beside the width, as in the small models of the book,
(W + B A) x takes fewer operations: W + B A is computed once a pass, and not B A x for each of thousands of tokens.
Both give the same outputs and the same gradients.
"""

import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers import PreTrainedModel

from nmlib.config import ModelConfig

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_FULLY_TRAINED = ("input_layernorm", "post_attention_layernorm", "norm")


def folds(rank: int, inputs: int, outputs: int) -> bool:
    """Whether W + B A takes fewer operations a token than W and B A apart.

    Forward and backward, a frozen W costs two products of its size a token, and A and B three of theirs. Their sum
    costs three of W's size.
    """
    return 3 * rank * (inputs + outputs) > inputs * outputs


class FoldedLinear(lora.Linear):
    """A linear layer with LoRA of rank `r` that adds the weights first, where that is less work."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if args or kwargs or not self._folds(x):
            return super().forward(x, *args, **kwargs)
        base = cast(nn.Linear, self.get_base_layer())
        return F.linear(x, base.weight + self.get_delta_weight(self.active_adapters[0]), base.bias)

    def _folds(self, x: Tensor) -> bool:
        """Whether (W + B A) x is all that `peft` computes, in one precision, and less work."""
        if self.merged or self.disable_adapters or len(self.active_adapters) != 1:
            return False
        (name,) = self.active_adapters
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return False
        base, a = cast(nn.Linear, self.get_base_layer()), cast(nn.Linear, self.lora_A[name])
        alike = x.dtype == base.weight.dtype == a.weight.dtype or torch.is_autocast_enabled(x.device.type)
        plain = isinstance(self.lora_dropout[name], nn.Identity)
        return alike and plain and folds(self.r[name], base.in_features, base.out_features)


def add(model: PreTrainedModel, settings: ModelConfig) -> PeftModel:
    """A LLaMA with LoRA around it: everything is frozen but LoRA and the norms.

    Args:
        model: keeps its weights.
        settings: rank, scale and dropout.
    """
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(LORA_TARGETS),
        modules_to_save=list(LORA_FULLY_TRAINED),
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: FoldedLinear})
    with warnings.catch_warnings():  # peft asks transformers by an old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)
