"""The detokenizer on a VAE's latents: what it draws, what it trains, and its way to and from a file."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from toy import raised

from nmlib import checkpoint, config
from nmlib.checkpoint import CheckpointError
from nmlib.config import DetokenizerConfig, OptimConfig
from nmlib.detokenizer import TokenDecoder
from nmlib.latent_detokenizer import LatentDetokenizer, count_latent, latent_detokenizer, load_latent_detokenizer
from nmlib.seedx_vision import repeat_tokens

SIDE, TOKENS, WIDTH = 28, 16, 12
SETTINGS = DetokenizerConfig(
    patch_size=2, width=24, layers=2, heads=3, sampling_steps=3,
    optim=OptimConfig(steps=1, batch_size=1, learning_rate=1e-3),
)  # fmt: skip


@cache
def vae(channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    made = AutoencoderKL(**blocks, block_out_channels=(4, 8), latent_channels=channels, norm_num_groups=2,
                         scaling_factor=0.7, shift_factor=shift).eval()  # fmt: skip
    return made.requires_grad_(False)


def detokenizer(shift: float | None = None) -> LatentDetokenizer:
    torch.manual_seed(2)
    return LatentDetokenizer(SETTINGS, SIDE, TOKENS, WIDTH, vae(4, shift))


def pictures(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def tokens(count: int = 3) -> torch.Tensor:
    return torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("shift", [None, 0.3])
def test_latents_are_those_of_the_vae(shift: float | None) -> None:
    made, images, frozen = detokenizer(shift), pictures(), vae(4, shift)
    with torch.no_grad():
        plain: Any = frozen.encode(images * 2 - 1)
        latents = plain.latent_dist.mode()  # (B, 4, 14, 14)
        pixels = frozen.decode(latents, return_dict=False)[0]  # type: ignore[index]
    torch.testing.assert_close(made.from_images(images), (latents - (shift or 0)) * 0.7)
    torch.testing.assert_close(made.to_images(made.from_images(images)), (pixels / 2 + 0.5).clamp(0, 1))
    assert made.image_size == SIDE // 2 and made.channels == 4


def test_the_vae_is_neither_trained_nor_saved() -> None:
    made = detokenizer()
    losses = made(tokens(), pictures())
    losses.total.backward()
    assert all(p.grad is None for p in vae().parameters()) and losses.total.isfinite()
    reached = {name.partition(".")[0] for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"dit", "place_tokens", "to_map"} <= reached
    assert not any("encoder" in name or "decoder" in name for name in made.state_dict())


def test_pictures_do_not_depend_on_their_batch() -> None:
    made = detokenizer().eval()
    assert isinstance(made, TokenDecoder)
    together = made.decode(tokens(), guidance_scale=2.0)
    assert together.shape == (3, 3, SIDE, SIDE) and float(together.min()) >= 0 and float(together.max()) <= 1
    alone = torch.cat([made.decode(one[None], guidance_scale=2.0) for one in tokens()])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert torch.equal(made.decode(tokens()), made.decode(tokens()))


def test_pooled_tokens_stand_where_they_belong() -> None:
    """Four tokens pooled of a 4 x 4 grid are its rows: what the second says is drawn in the second quarter."""
    made = detokenizer().eval()
    pooled = tokens()[:, :4]  # (3, 4, 12)
    spread = repeat_tokens(pooled, TOKENS)
    assert torch.equal(made.decode(pooled), made.decode(spread))
    torch.manual_seed(7)
    plain = made(pooled, pictures()).total
    torch.manual_seed(7)
    assert torch.equal(plain, made(spread, pictures()).total)
    changed = pooled.clone()
    changed[:, 1] += 5
    _, before = made.condition(repeat_tokens(pooled, TOKENS))  # (3, C, 14, 14)
    _, after = made.condition(repeat_tokens(changed, TOKENS))
    rows = (after - before).abs().sum((0, 1, 3))  # (14,)
    assert rows.argmax() in (4, 5) and rows[10:].max() == 0, "rows 3.5 to 7 of 14, a little beyond by interpolation"
    columns = (after - before).abs().sum((0, 1, 2))  # (14,)
    assert columns.min() > 0


def test_one_batch_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on three pictures, it draws for the tokens of each its latents, not those of another."""
    made, given = detokenizer(), tokens()
    images = torch.eye(3)[:, :, None, None].repeat(1, 1, SIDE, SIDE)  # red, green and blue
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3)
    torch.manual_seed(5)
    for _ in range(400):
        losses = made(given, images)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    monkeypatch.setattr(made, "to_images", lambda drawn: drawn)
    wanted, drawn = made.from_images(images), made.eval().decode(given, steps=8)  # (3, 4, 14, 14) both
    errors = (drawn[:, None] - wanted).square().mean((2, 3, 4))  # (3, 3)
    others = errors[~torch.eye(3, dtype=torch.bool)]
    assert errors.diagonal().max() < 0.5 * others.min()


def test_sizes_that_do_not_divide_are_refused() -> None:
    text = raised(lambda: LatentDetokenizer(SETTINGS, 26, TOKENS, WIDTH, vae()), ValueError)
    assert text == (
        "image_size 26: a VAE that shrinks 2 times and detokenizer.patch_size 2 need a multiple of 4, and at least 8 "
        "for 16 tokens"
    )


def test_a_file_draws_the_same_with_its_vae_alone(tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path / "vae")
    vae(6).save_pretrained(tmp_path / "other")
    torch.manual_seed(6)
    made, metadata = latent_detokenizer(SETTINGS, SIDE, TOKENS, WIDTH, tmp_path / "vae")
    path = tmp_path / "detokenizer.safetensors"
    checkpoint.save(path, made.state_dict(), metadata)
    loaded = load_latent_detokenizer(path, tmp_path / "vae")
    assert torch.equal(loaded.decode(tokens()), made.eval().decode(tokens()))
    text = raised(lambda: load_latent_detokenizer(path, tmp_path / "other"), CheckpointError)
    assert text == f"{tmp_path / 'other'}: another VAE than the one that {path} was trained with"
    assert "no VAE" in raised(lambda: load_latent_detokenizer(path, tmp_path / "none"), CheckpointError)
    del metadata["vae"]
    checkpoint.save(path, made.state_dict(), metadata)
    text = raised(lambda: load_latent_detokenizer(path, tmp_path / "vae"), CheckpointError)
    assert text == f"{path}: draws pixels and needs no VAE; load it with `codec.load_detokenizer`"


def test_the_size_of_the_paper_is_counted_without_memory() -> None:
    """28 layers of width 1152, as in PixArt, are 611 M numbers; the condition adds about one in a hundred."""
    paper = config.load(Path(__file__).parent.parent / "params" / "paper.yaml")
    assert 1.0 < count_latent(paper.detokenizer, 448, 256, 4096) / 611e6 < 1.01
    small = sum(p.numel() for p in detokenizer().parameters())
    assert count_latent(SETTINGS, SIDE, TOKENS, WIDTH, channels=4, shrink=2) == small
