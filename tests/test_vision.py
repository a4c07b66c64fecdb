"""The image encoder: SEED-X's attention layout, and that the small one can be trained."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toy import SOURCE, TOKENS, vision_settings

from nmlib import data
from nmlib.config import OptimConfig
from nmlib.sources import attribute_sizes
from nmlib.train import fit
from nmlib.vision import EncoderTrainer, PixelDecoder, VisionTransformer, VisualAttention, VisualBlock

PICTURES = data.sample_pictures(SOURCE, 16, "train", data.step_generator(0, 0))


def test_query_key_value_are_interleaved_by_head() -> None:
    """The fused projection's rows: q, k, v of head 0, then q, k, v of head 1, ... by hand, head for head."""
    torch.manual_seed(0)
    module, hidden_states = VisualAttention(15, 3), torch.randn(2, 7, 15)
    fused = hidden_states @ module.in_proj.weight.T + module.in_proj.bias  # (B, P, 45)
    mixed = []
    for head in range(3):
        q, k, v = (fused[..., 15 * head + 5 * part : 15 * head + 5 * part + 5] for part in range(3))
        mixed.append((q @ k.transpose(1, 2) / 5**0.5).softmax(-1) @ v)
    torch.testing.assert_close(module(hidden_states), module.out_proj(torch.cat(mixed, -1)), rtol=1e-5, atol=1e-5)


def test_a_block_is_pre_norm_with_exact_gelu() -> None:
    torch.manual_seed(0)
    block, x = VisualBlock(15, 3, 22), torch.randn(2, 7, 15)
    middle = x + block.attn(F.layer_norm(x, (15,), eps=1e-6))
    inner = F.layer_norm(middle, (15,), eps=1e-6) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(block(x), middle + block.mlp.c_proj(inner), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"feature_dim": 36}, {"tokens": 16}])
def test_tokens_have_mean_zero_and_variance_one(changes: dict[str, Any]) -> None:
    settings = vision_settings(**changes)
    tokens = VisionTransformer(settings, 16)(PICTURES[2])
    assert tokens.shape == (16, settings.tokens, settings.feature_dim)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(16, settings.tokens), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(16, settings.tokens), rtol=0, atol=1e-3)
    plain = VisionTransformer(settings, 16, normalize=False)(PICTURES[2])
    assert not torch.allclose(plain.var(-1, unbiased=False), torch.ones(16, settings.tokens), atol=1e-2)


def test_other_sizes_resize_the_positions() -> None:
    torch.manual_seed(0)
    encoder = VisionTransformer(vision_settings(), 16)
    larger = F.interpolate(PICTURES[2], size=(24, 24), mode="nearest")
    assert encoder(larger).shape == (16, TOKENS, 20)
    own = VisionTransformer(vision_settings(), 24)
    own.load_state_dict(encoder.state_dict() | {"positional_embedding": own.positional_embedding})
    grid = encoder.positional_embedding.T.reshape(1, 32, 4, 4)
    resized = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    own.positional_embedding.data.copy_(resized.reshape(32, 36).T)
    torch.testing.assert_close(own(larger), encoder(larger), rtol=1e-4, atol=1e-4)


def test_a_batch_equals_one_by_one() -> None:
    encoder = VisionTransformer(vision_settings(), 16).eval()
    alone = torch.cat([encoder(picture[None]) for picture in PICTURES[2]])
    torch.testing.assert_close(alone, encoder(PICTURES[2]), rtol=1e-4, atol=1e-5)


def test_full_size_has_the_keys_of_qwen_vl() -> None:
    """SEEDX.md section 7: the state keys and shapes of `qwen_vit_G.pt` and its 1.936 billion numbers."""
    sizes: dict[str, Any] = {
        "patch_size": 14,
        "width": 1664,
        "layers": 48,
        "heads": 16,
        "tokens": 256,
        "feature_dim": 4096,
    }
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("nmlib.resampler.Resampler.start_at_own_position", lambda self: None)
        encoder = VisionTransformer(vision_settings(**sizes), 224, normalize=False)
    shapes = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    expected = {
        "conv1.weight": (1664, 3, 14, 14),
        "positional_embedding": (256, 1664),
        "transformer.resblocks.47.attn.in_proj.weight": (4992, 1664),
        "transformer.resblocks.0.attn.out_proj.bias": (1664,),
        "attn_pool.pos_embed": (256, 4096),
        "attn_pool.kv_proj.weight": (4096, 1664),
        "ln_post.weight": (4096,),
        "proj": (4096, 4096),
    }
    assert expected.items() <= shapes.items()
    assert len(shapes) == 1 + 1 + 2 + 48 * 12 + 11 + 2 + 1


def test_losses_by_hand() -> None:
    """The weighted sum of pixels (times 100), cross-entropy over attributes and squared error of the subject."""
    torch.manual_seed(0)
    settings = vision_settings(noise=0.0, attribute_weight=0.7, subject_weight=0.2)
    trainer = EncoderTrainer(settings, 16, attribute_sizes(SOURCE), 2)
    subjects, values, images = PICTURES
    losses = trainer(images, values, subjects)
    tokens = trainer.encoder(images)
    torch.testing.assert_close(losses.pixels, (trainer.decoder(tokens) - images).square().mean())
    logits = trainer.attribute_head(tokens.flatten(1))
    parts = [logits[:, :3], logits[:, 3:5], logits[:, 5:]]
    each = [-part.log_softmax(1)[torch.arange(16), values[:, place]].mean() for place, part in enumerate(parts)]
    torch.testing.assert_close(losses.attributes, torch.stack(each).mean())
    torch.testing.assert_close(losses.total, 100 * losses.pixels + 0.7 * losses.attributes + 0.2 * losses.subject)


def test_noise_is_added_to_the_tokens_in_training() -> None:
    torch.manual_seed(0)
    trainer = EncoderTrainer(vision_settings(noise=0.5), 16, attribute_sizes(SOURCE), 2)
    subjects, values, images = PICTURES
    first, second = trainer(images, values, subjects), trainer(images, values, subjects)
    assert first.pixels != second.pixels and first.attributes != second.attributes
    assert torch.equal(trainer.encoder(images), trainer.encoder(images)), "never in use"


def test_the_pixel_decoder_puts_tokens_where_they_belong() -> None:
    """A changed token changes the picture at its own place most: token 1 of a 2 x 2 grid is the upper right."""
    torch.manual_seed(0)
    decoder, tokens = PixelDecoder(vision_settings(), 24), torch.randn(3, TOKENS, 20)
    other = tokens.clone()
    other[:, 1] += 1.0
    with torch.no_grad():
        change = (decoder(other) - decoder(tokens)).abs().mean((0, 1))  # (H, W)
    assert change.shape == (24, 24)
    quarters = {
        name: change[y : y + 12, x : x + 12].mean()
        for name, (y, x) in {"ul": (0, 0), "ur": (0, 12), "ll": (12, 0), "lr": (12, 12)}.items()
    }
    assert max(quarters, key=lambda name: quarters[name]) == "ur"


def test_one_batch_is_learned_by_heart(tmp_path: Any) -> None:
    """200 steps on 16 pictures: every attribute is read, pixels to a mean squared error below 0.015 (18 dB)."""
    torch.manual_seed(0)
    settings = vision_settings(layers=2, width=32)
    trainer = EncoderTrainer(settings, 16, attribute_sizes(SOURCE), 2)
    subjects, values, images = PICTURES
    batch = {"images": images, "values": values, "subjects": subjects}
    optim = OptimConfig(steps=200, batch_size=16, learning_rate=5e-3, warmup_steps=20)
    history = fit(trainer, lambda step: batch, optim, tmp_path, seed=0, precision="float32")
    assert history[0]["attributes"] > 0.5 and history[0]["pixels"] > 0.05
    assert history[-1]["attributes"] < 0.05 and history[-1]["pixels"] < 0.015
