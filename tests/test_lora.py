"""LoRA folded into the weight: the outputs and gradients of peft's own layer, where it is the fewer operations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from nmlib import lora

INPUTS, OUTPUTS, TOKENS = 13, 7, 11
sizes = st.integers(1, 300)


def layers(rank: int, dropout: float = 0.0) -> list[Linear]:
    """The same layer as peft computes it and as we do, with an A and a B of their own kind."""
    found = []
    for kind in (Linear, lora.FoldedLinear):
        torch.manual_seed(3)
        base = nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=5, lora_dropout=dropout, init_lora_weights=False)
        found.append(kind(base, "default", config=config, r=rank, lora_alpha=5))
    return found


@pytest.mark.parametrize("rank", [1, 6])
def test_outputs_and_gradients_are_those_of_peft(rank: int) -> None:
    assert lora.folds(rank, INPUTS, OUTPUTS) == (rank == 6)
    inputs = torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(0))
    found = []
    for layer in layers(rank):
        given_inputs = inputs.clone().requires_grad_()
        outputs = layer(given_inputs)
        outputs.square().sum().backward()
        trained = [p.grad for p in layer.parameters() if p.requires_grad]
        assert len(trained) == 2 and all(gradient is not None for gradient in trained)
        found.append([outputs, given_inputs.grad, *trained])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_with_dropout_it_is_left_to_peft() -> None:
    theirs, ours = layers(6, dropout=0.5)
    inputs = torch.ones(TOKENS, INPUTS)
    torch.manual_seed(7)
    expected = theirs(inputs)
    torch.manual_seed(7)
    assert torch.equal(ours(inputs), expected)
    assert len(expected.unique(dim=0)) > 1, "every token has its own dropout"


def test_merged_it_is_the_base_layer() -> None:
    _, layer = layers(6)
    inputs = torch.randn(TOKENS, INPUTS)
    before = layer(inputs)
    layer.merge()
    torch.testing.assert_close(layer(inputs), before)


@given(sizes, sizes, sizes, st.integers(10_000, 20_000))
def test_it_folds_where_that_is_less_work(rank: int, inputs: int, outputs: int, tokens: int) -> None:
    """Forward and backward, a product of (T, m) and (m, n) costs T*m*n; sums of weights cost little."""
    apart = tokens * (2 * inputs * outputs + 3 * rank * (inputs + outputs))
    together = tokens * 3 * inputs * outputs
    assert lora.folds(rank, inputs, outputs) == (together < apart)
