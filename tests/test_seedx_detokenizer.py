"""SEED-X's adapter: loaded strictly, whole UNet or not, and sampled as diffusers samples SDXL."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import seedx_toy
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file
from toy import excite, raised, system

from nmlib import seedx_detokenizer
from nmlib.checkpoint import CheckpointError
from nmlib.detokenizer import TokenDecoder
from nmlib.seedx_adapter import SDXLAdapter
from nmlib.seedx_detokenizer import KEYS_AND_VALUES, SDXLDetokenizer, black_tokens, load_adapter

SIZES: dict[str, dict[str, Any]] = {
    "resampler": {"token_dim": 12, "width": 32, "depth": 1, "heads": 4, "latents": 5, "widths": (7, 9)},
    "unet": {
        "sample_size": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (8, 16), "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1), "attention_head_dim": (2, 4), "cross_attention_dim": 16,
        "norm_num_groups": 4, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 9 + 6 * 4, "use_linear_projection": True,
    },
}  # fmt: skip


def adapter(condition_image: bool = False, seed: int = 0) -> SDXLAdapter:
    torch.manual_seed(seed)
    made = SDXLAdapter(condition_image, **SIZES).eval()
    excite(made, 2.0)
    return made


@cache
def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2,
                         scaling_factor=0.13025).eval()  # fmt: skip


def detokenizer(condition_image: bool = False) -> SDXLDetokenizer:
    negative = torch.randn(16, 12, generator=torch.Generator().manual_seed(5))
    return SDXLDetokenizer(adapter(condition_image), vae(), negative, image_size=16)


def write(folder: Path, whole: bool, seed: int = 0) -> tuple[Path, Path, SDXLAdapter]:
    """A stage's file with the whole UNet or with keys and values of it, and SDXL's own UNet beside it."""
    made, base = adapter(seed=seed), adapter(seed=9)
    if not whole:  # all else of the UNet is SDXL's
        own = made.state_dict()
        made.load_state_dict(own | {n: t for n, t in base.state_dict().items() if seedx_detokenizer._of_the_base(n)})
    folder.mkdir(exist_ok=True)
    kept = {n: t for n, t in made.state_dict().items() if whole or not seedx_detokenizer._of_the_base(n)}
    torch.save(kept, folder / "pytorch_model.bin")
    (folder / "unet").mkdir()
    save_file(base.unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder / "pytorch_model.bin", folder / "unet", made


@pytest.mark.parametrize("whole", [True, False])
def test_both_kinds_of_files(tmp_path: Path, whole: bool) -> None:
    file, unet, written = write(tmp_path, whole)
    loaded = load_adapter(file, None if whole else unet, dtype=torch.float32, sizes=SIZES)
    for name, tensor in written.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not any(t.is_meta or t.requires_grad for t in [*loaded.parameters(), *loaded.buffers()])
    halves = load_adapter(tmp_path, unet, sizes=SIZES)
    assert {p.dtype for p in halves.parameters()} == {torch.bfloat16}


def test_faults_are_named(tmp_path: Path) -> None:
    file, unet, _ = write(tmp_path, whole=False)
    text = raised(lambda: load_adapter(file, sizes=SIZES), CheckpointError)
    assert text == f"{file}: holds keys and values of the UNet only; give SDXL's own unet/ as well"
    tensors = torch.load(file, weights_only=True)
    key = next(name for name in tensors if KEYS_AND_VALUES.match(name))
    for change, fault in (
        ({key: None}, f"missing {key}"),
        ({"resampler.latents": None}, "missing resampler.latents (1, 5, 32)"),
        ({"gate": torch.zeros(1)}, "unexpected gate"),
        ({"resampler.latents": torch.zeros(1, 4, 32)}, "resampler.latents has shape (1, 4, 32), expected (1, 5, 32)"),
    ):
        torch.save({n: t for n, t in (tensors | change).items() if t is not None}, file)  # type: ignore[operator]
        text = raised(lambda: load_adapter(file, unet, sizes=SIZES), CheckpointError)
        assert text.startswith(f"{file}: does not fit SDXLAdapter: {fault}")
    torch.save(tensors, file)
    save_file({"conv_in.bias": torch.zeros(8)}, unet / "diffusion_pytorch_model.safetensors")
    text = raised(lambda: load_adapter(file, unet, sizes=SIZES), CheckpointError)
    assert text.startswith(f"{unet}: does not fit UNet2DConditionModel: missing unet.conv_in.weight (8, 4, 3, 3)")
    assert "no VAE" in raised(lambda: seedx_detokenizer.load_vae(tmp_path / "vae"), CheckpointError)


def test_vae_round_trip(tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path)
    loaded = seedx_detokenizer.load_vae(tmp_path)
    assert loaded.config.scaling_factor == 0.13025
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), vae().parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_first_stage_samples_as_diffusers_does() -> None:
    """diffusers' own SDXL pipeline, given context and pooled vector of the tokens and of the black picture."""
    made, tokens = detokenizer(), torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(2))
    found = made.decode(tokens, seed=3, steps=3)
    with torch.no_grad():
        context, pooled = made.adapter.resampler(tokens)
        negative = made.negative.reshape(4, 4, 12).mean(1).expand(2, -1, -1)
        away, away_pooled = made.adapter.resampler(negative)
    pipeline = StableDiffusionXLPipeline(
        vae(), None, None, None, None, made.adapter.unet, EulerDiscreteScheduler(**seedx_detokenizer.NOISE)
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3)).expand(2, -1, -1, -1)
    expected = pipeline(
        prompt_embeds=context, pooled_prompt_embeds=pooled, negative_prompt_embeds=away,
        negative_pooled_prompt_embeds=away_pooled, latents=noise, height=16, width=16, num_inference_steps=3,
        guidance_scale=7.5, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.shape == (2, 3, 16, 16) and float(found.std()) > 0.01
    assert torch.equal(found, made.decode(tokens, seed=3, steps=3))
    assert not torch.allclose(found, made.decode(tokens, seed=4, steps=3))


@torch.no_grad()
def test_second_stage_guides_three_ways() -> None:
    """No picture, picture and tokens by hand at one step: g (text - image) + 1.5 (image - none)."""
    made = detokenizer(condition_image=True)
    tokens, noisy, seen = torch.randn(1, 16, 12), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    time, ids = torch.tensor([500.0]), torch.tensor([[16.0, 16, 0, 0, 16, 16]])

    def one(read: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        return made.adapter(noisy, time, read, ids, picture)

    black, none = made.negative[None], torch.zeros_like(seen)
    expected = (
        one(black, none) + 4 * (one(tokens, seen) - one(black, seen)) + 1.5 * (one(black, seen) - one(black, none))
    )
    torch.testing.assert_close(made._guided(noisy, time, tokens, seen, 4.0), expected, rtol=1e-4, atol=1e-4)
    picture = torch.rand(1, 3, 16, 16)
    latent = made._latents_of(picture, noisy)
    assert latent is not None
    torch.testing.assert_close(latent, vae().encode(picture * 2 - 1).latent_dist.mean)
    edited, plain = made.decode(tokens, steps=2, condition=picture), made.decode(tokens, steps=2)
    assert edited.shape == (1, 3, 16, 16) and not torch.allclose(edited, plain)


def test_one_interface() -> None:
    """The DiT and the adapter are asked alike."""
    assert isinstance(detokenizer(), TokenDecoder) and isinstance(system().detokenizer, TokenDecoder)
    text = raised(lambda: detokenizer().decode(torch.randn(1, 4, 12), condition=torch.rand(1, 3, 16, 16)), ValueError)
    assert text.startswith("condition: the first stage reads no picture")
    tokens = black_tokens(seedx_toy.vit(), seedx_toy.settings().vision)
    assert torch.equal(tokens, seedx_toy.vit()(torch.zeros(1, 3, seedx_toy.SIDE, seedx_toy.SIDE))[0])
