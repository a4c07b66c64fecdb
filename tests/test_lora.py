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


def layer_of(config: LoraConfig, kind: type[Linear]) -> Linear:
    torch.manual_seed(3)
    base = nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)
    return kind(base, "default", config=config, r=6, lora_alpha=5)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(init_lora_weights=False, lora_bias=True), LoraConfig(init_lora_weights=False, use_dora=True)],
    ids=["bias", "dora"],
)
def test_other_kinds_of_lora_are_left_to_peft(config: LoraConfig) -> None:
    theirs, ours = (layer_of(config, kind) for kind in (Linear, lora.FoldedLinear))
    with torch.no_grad():
        for layer in (theirs, ours):
            for parameter in layer.lora_B["default"].parameters():
                parameter.add_(0.5)
    inputs = torch.randn(TOKENS, INPUTS)
    assert torch.equal(ours(inputs), theirs(inputs))


@pytest.mark.parametrize("active", [["default", "second"], ["second"], ["elsewhere"]])
def test_several_adapters_are_added_as_peft_adds_them(active: list[str]) -> None:
    """A layer may hold two adapters, or none of those that are active."""
    config, found = LoraConfig(r=6, lora_alpha=3, init_lora_weights=False), []
    inputs = torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(0))
    for layer in layers(6):
        torch.manual_seed(4)
        layer.update_layer("second", 6, lora_alpha=3, config=config)
        layer._active_adapter = active
        found.append(layer(inputs))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_in_another_precision_than_the_base(autocast: bool) -> None:
    """Without autocast peft casts between the two; with it both are one product in bfloat16."""
    inputs, found = torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(0)).bfloat16(), []
    for layer in layers(6):
        layer.get_base_layer().bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(layer(inputs))
    assert found[1].dtype == found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[1], found[0], rtol=0.03, atol=0.03)


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
