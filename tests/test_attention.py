"""Attention of a training: the same numbers as the fused kernel's, and only where a CPU trains."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nmlib import attention

B, H, T, D = 2, 3, 7, 5


def states(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, H, T, D, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def mask() -> Tensor:
    """Who sees whom, at random; every row sees itself, and the last of the second sequence nothing else."""
    seen = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(2)) < 0.5
    seen[1, :, -1] = False
    return seen | torch.eye(T, dtype=torch.bool)


def gradients(mixed: Tensor, of: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, mixed.numel()).view(mixed.shape).to(mixed.dtype)
    return list(torch.autograd.grad((mixed * weights).sum(), of))


def count_fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    return calls


def test_products_equal_the_fused_kernel_in_value_and_gradient() -> None:
    given = states()
    fused = F.scaled_dot_product_attention(*given, attn_mask=mask(), scale=0.3).transpose(1, 2)  # (B, T, H, D)
    mixed, _ = attention.attend(torch.nn.Module(), *given, mask(), 0.3)
    torch.testing.assert_close(mixed, fused, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(mixed, given), gradients(fused, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_products_are_computed_in_the_precision_of_autocast() -> None:
    given = states()
    exact, _ = attention.attend(torch.nn.Module(), *given, mask(), 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = attention.attend(torch.nn.Module(), *given, mask(), 0.3)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), exact, rtol=0.03, atol=0.03)
    for ours, theirs in zip(gradients(mixed, given), gradients(exact, given), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


def test_a_row_that_sees_only_itself_gives_its_own_value() -> None:
    given = states()
    mixed, _ = attention.attend(torch.nn.Module(), *given, mask(), 0.3)
    torch.testing.assert_close(mixed[1, -1], given[2][1, :, -1])


@pytest.mark.parametrize("trained", [False, True])
def test_the_fused_kernel_is_left_where_nothing_is_trained(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_fused(monkeypatch)
    given = [state.requires_grad_(trained) for state in map(Tensor.detach, states())]
    attention.attend(torch.nn.Module(), *given, mask(), 0.3)
    assert len(calls) == (not trained)


def test_a_pass_without_gradients_within_a_training_multiplies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own history is drawn within a step; the fused kernel is out of reach there."""
    calls, given = count_fused(monkeypatch), [state.detach() for state in states()]
    expected, _ = attention.attend(torch.nn.Module(), *given, mask(), 0.3)
    assert len(calls) == 1
    with attention.training_attention(torch.device("cpu")):
        mixed, _ = attention.attend(torch.nn.Module(), *given, mask(), 0.3)
    assert len(calls) == 1
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)


def test_after_a_training_that_failed_the_fused_kernel_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, given = count_fused(monkeypatch), [state.detach() for state in states()]
    with pytest.raises(RuntimeError, match="stop"), attention.training_attention(torch.device("cpu")):
        raise RuntimeError("stop")
    attention.attend(torch.nn.Module(), *given, mask(), 0.3)
    assert len(calls) == 1


def test_dropout_and_biases_are_left_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, given = count_fused(monkeypatch), states()
    attention.attend(torch.nn.Module(), *given, mask(), 0.3, dropout=0.5)
    biased, _ = attention.attend(torch.nn.Module(), *given, mask(), 0.3, position_bias=torch.zeros(1, H, T, T))
    assert len(calls) == 2
    plain, _ = attention.attend(torch.nn.Module(), *given, mask(), 0.3, dropout=0.0, position_bias=None)
    assert len(calls) == 2, "no dropout and no bias are no options"
    torch.testing.assert_close(plain, biased, rtol=1e-5, atol=1e-6)


def test_training_attention_multiplies_in_bfloat16_and_puts_everything_back() -> None:
    """The plain path rounds what it keeps to bfloat16, so that its results are bfloat16 products, to the bit."""
    given = states(torch.bfloat16)
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(), torch.backends.cuda.flash_sdp_enabled()
    root = D**-0.25
    scores = (given[0] * root) @ (given[1] * root).transpose(-1, -2)
    with attention.training_attention(torch.device("cpu")):
        mixed = F.scaled_dot_product_attention(*given)
    assert torch.equal(mixed, scores.softmax(-1) @ given[2])
    after = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(), torch.backends.cuda.flash_sdp_enabled()
    assert after == before


def test_on_another_device_training_attention_changes_nothing() -> None:
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    with attention.training_attention(torch.device("meta")):
        within = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    assert within == before
