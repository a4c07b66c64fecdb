"""Attention for training on a CPU: the same as torch's own, in float32 where gradients are wanted."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaModel

from nmlib import attention


def states(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, length, 5, generator=generator).to(dtype) for length in (7, 11, 11)]


def test_without_gradients_it_is_torchs_own() -> None:
    query, key, value = states(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(attention.attend(query, key, value), F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize("autocast", [False, True])
def test_with_gradients_it_is_computed_in_float32(autocast: bool) -> None:
    query, key, value = (part.requires_grad_() for part in states(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mixed = attention.attend(query, key, value)
    exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, exact.to(torch.bfloat16))
    mixed.float().square().sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in (query, key, value))


@pytest.mark.parametrize("masked", [False, True])
def test_a_llama_learns_with_it_what_it_learns_with_torchs_own(masked: bool) -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 13,
    }
    model = LlamaModel(LlamaConfig(**sizes))
    ids = torch.randint(13, (3, 11))
    sees = torch.ones(11, 11, dtype=torch.bool).tril().expand(3, 1, 11, 11).clone()
    sees[1, :, :, 2], sees[1, :, 2, 2] = False, True
    gradients = []
    for name in ("sdpa", attention.FULL):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(
            ids, attention_mask=sees if masked else None, use_cache=False
        ).last_hidden_state.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)
