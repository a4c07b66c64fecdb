"""SEED-X's resampler: the facts of the released weights, and an initialisation that looks straight ahead."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy import raised

from nmlib.resampler import Resampler, resize_positions, sincos_grid

SIZES = {"queries": 9, "embed_dim": 28, "heads": 7, "kv_dim": 11}


def resampler(seed: int = 0, **changes: int) -> Resampler:
    """With lively weights everywhere, so that no part can be left out unnoticed."""
    torch.manual_seed(seed)
    module = Resampler(**(SIZES | changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def attention(module: Resampler, features: Tensor) -> Tensor:
    """The restatement of SEEDX.md, section 3, by torch's own attention on the same weights."""
    keys_values = module.ln_kv(module.kv_proj(features)).transpose(0, 1)  # (M, B, D)
    query = (module.ln_q(module.query) + module.pos_embed)[:, None].expand(-1, len(features), -1)  # (N, B, D)
    keys = keys_values + resize_positions(module.pos_embed, features.shape[1])[:, None]
    return module.attn(query, keys, keys_values)[0].transpose(0, 1)


def test_positions_by_hand() -> None:
    """Raster order; the first half encodes x, the second y; in each half first the sines, then the cosines."""
    grid = sincos_grid(8, 3)
    assert grid.shape == (9, 8) and grid.dtype == torch.float32
    x, y = 2, 1
    expected = [math.sin(x), math.sin(x / 100), math.cos(x), math.cos(x / 100)]
    expected += [math.sin(y), math.sin(y / 100), math.cos(y), math.cos(y / 100)]
    assert grid[3 * y + x].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(grid[0, :4], grid[6, :4]) and not torch.equal(grid[0, :4], grid[1, :4])
    assert "dim 10 must be a multiple of 4" in raised(lambda: sincos_grid(10, 3), ValueError)


def test_positions_are_resized_bicubically() -> None:
    positions = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_positions(positions, 9), positions)
    for count in (25, 4):
        side = math.isqrt(count)
        picture = positions.T.reshape(1, 5, 3, 3)
        expected = F.interpolate(picture, size=(side, side), mode="bicubic", align_corners=False)
        assert torch.equal(resize_positions(positions, count), expected.reshape(5, count).T)
    assert resize_positions(positions.bfloat16(), 25).dtype == torch.bfloat16
    assert raised(lambda: resize_positions(positions, 10), ValueError) == (
        "resize_positions: 10 tokens do not form a square grid"
    )


@pytest.mark.parametrize("count", [9, 25, 4])
def test_it_is_torch_attention_on_the_same_weights(count: int) -> None:
    module, features = resampler(), torch.randn(3, count, 11)
    tokens = module(features)
    assert tokens.shape == (3, 9, 28)
    torch.testing.assert_close(tokens, attention(module, features), rtol=1e-5, atol=1e-5)


def test_only_keys_are_resized_and_only_queries_and_keys_have_positions() -> None:
    """With equal features everywhere the values are equal, and positions can change nothing."""
    module = resampler()
    flat = torch.randn(1, 1, 11)
    for count in (4, 25):
        torch.testing.assert_close(
            module(flat.expand(1, count, -1)), module(flat.expand(1, 9, -1)), rtol=1e-4, atol=1e-5
        )
    features = torch.randn(1, 9, 11)
    before = module(features)
    module.pos_embed.data.zero_()
    assert not torch.allclose(module(features), before)


def test_positions_do_not_train() -> None:
    module = resampler()
    module(torch.randn(2, 9, 11)).square().sum().backward()
    assert module.pos_embed.grad is None
    assert {name for name, p in module.named_parameters() if p.requires_grad and p.grad is None} == set()


@pytest.mark.parametrize("side", range(2, 9))
@pytest.mark.parametrize(("dim", "heads"), [(64, 4), (192, 4)])
def test_a_fresh_one_looks_at_its_own_place(side: int, dim: int, heads: int) -> None:
    """The mean weight that a query gives to the feature at its own place, over heads and random features."""
    torch.manual_seed(side)
    module = Resampler(side * side, dim, heads, 40)
    module.start_at_own_position()
    features = torch.randn(5, side * side, 40)
    keys = module.ln_kv(module.kv_proj(features)).transpose(0, 1) + module.pos_embed[:, None]
    query = (module.ln_q(module.query) + module.pos_embed)[:, None].expand(-1, 5, -1)
    weights = module.attn(query, keys, keys)[1]  # (B, N, M)
    assert weights.detach().diagonal(dim1=1, dim2=2).mean() > 0.6
    torch.testing.assert_close(module(features), attention(module, features), rtol=1e-4, atol=1e-4)


def test_a_fresh_one_keeps_what_it_sees() -> None:
    """Its output is nearly a linear map of the feature at the same place: the places can be told apart."""
    torch.manual_seed(0)
    module = Resampler(16, 64, 4, 32)
    module.start_at_own_position()
    features = torch.randn(200, 16, 32)
    tokens = module(features)
    inputs = torch.cat([features.flatten(0, 1), torch.ones(3200, 1)], 1)
    fitted = inputs @ torch.linalg.lstsq(inputs, tokens.flatten(0, 1)).solution
    unexplained = (fitted - tokens.flatten(0, 1)).square().mean() / tokens.var()
    assert unexplained.detach() < 0.2


@pytest.mark.parametrize(
    ("name", "queries", "dim", "kv_dim", "count"),
    [("input", 64, 5120, 4096, 126_525_440), ("output", 64, 4096, 5120, 88_637_440)],
)
def test_full_size_has_the_keys_of_the_agent_file(name: str, queries: int, dim: int, kv_dim: int, count: int) -> None:
    """SEEDX.md section 7: keys and shapes of `agent/pytorch_model.bin`, and its size in bytes."""
    with torch.device("meta"):
        module = Resampler(queries, dim, 32, kv_dim)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == {
        "pos_embed": (queries, dim),
        "query": (queries, dim),
        "kv_proj.weight": (dim, kv_dim),
        "attn.in_proj_weight": (3 * dim, dim),
        "attn.in_proj_bias": (3 * dim,),
        "attn.out_proj.weight": (dim, dim),
        "attn.out_proj.bias": (dim,),
        "ln_q.weight": (dim,),
        "ln_q.bias": (dim,),
        "ln_kv.weight": (dim,),
        "ln_kv.bias": (dim,),
    }
    assert sum(p.numel() for p in module.parameters()) == count, f"{name}_resampler"
    assert module.ln_q.eps == 1e-5
