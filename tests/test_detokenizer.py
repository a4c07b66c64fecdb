"""The detokenizer: a function of tokens and seed alone, guided by a learned null, and able to learn."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy import FEATURES, SOURCE, TOKENS, detokenizer_settings, random_features, system

from nmlib import data, metrics
from nmlib.config import OptimConfig
from nmlib.detokenizer import Detokenizer
from nmlib.train import fit

TOKENS_OF_FIVE = random_features(1, 5)[0]


def detokenizer(**changes: object) -> Detokenizer:
    """A lively one: nothing in it is zero, so that nothing can be left out unnoticed."""
    torch.manual_seed(0)
    module = Detokenizer(detokenizer_settings(**changes), 16, TOKENS, FEATURES)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def test_the_same_tokens_and_seed_give_the_same_pixels() -> None:
    module = system().detokenizer
    first = module.decode(TOKENS_OF_FIVE, seed=3)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    assert torch.equal(module.decode(TOKENS_OF_FIVE, seed=3), first)
    assert torch.equal(torch.get_rng_state(), before), "decoding leaves the random state alone"
    assert first.shape == (5, 3, 16, 16) and first.min() >= 0 and first.max() <= 1


def test_alone_equals_in_a_batch() -> None:
    module = system().detokenizer
    together = module.decode(TOKENS_OF_FIVE, seed=3)
    for row, tokens in enumerate(TOKENS_OF_FIVE):
        torch.testing.assert_close(module.decode(tokens[None], seed=3)[0], together[row], rtol=1e-5, atol=1e-5)


def test_seed_steps_and_tokens_all_matter() -> None:
    module = detokenizer()
    first = module.decode(TOKENS_OF_FIVE, seed=3)
    assert not torch.allclose(module.decode(TOKENS_OF_FIVE, seed=4), first, atol=1e-3)
    assert not torch.allclose(module.decode(TOKENS_OF_FIVE, seed=3, steps=5), first, atol=1e-3)
    assert torch.equal(module.decode(TOKENS_OF_FIVE, seed=3, steps=2), first), "the settings' own number"
    assert not torch.allclose(first[0], first[1], atol=1e-3)
    swapped = TOKENS_OF_FIVE[:, [1, 0, 2, 3]]
    assert not torch.allclose(module.decode(swapped, seed=3), first, atol=1e-3), "tokens know their places"


def test_guidance_of_one_never_asks_the_null(monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked = detokenizer(), []
    real = module.condition

    def noted(tokens: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(tokens)
        return real(tokens)

    monkeypatch.setattr(module, "condition", noted)
    plain = module.decode(TOKENS_OF_FIVE, guidance_scale=1)
    assert len(asked) == 1 and torch.equal(asked[0], TOKENS_OF_FIVE)
    guided = module.decode(TOKENS_OF_FIVE, guidance_scale=2.0)
    assert len(asked) == 3 and torch.equal(asked[2], module.null.expand(5, -1, -1))
    assert not torch.allclose(plain, guided, atol=1e-4)
    assert torch.equal(module.decode(TOKENS_OF_FIVE), plain), "the settings' own scale is 1"


def test_conditioning_once_a_picture_equals_conditioning_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of steps, tokens and null are conditioned on once; a network told anew each time agrees."""
    module, asked = detokenizer(), []
    real, predict = module.condition, module.predict
    monkeypatch.setattr(module, "condition", lambda tokens: asked.append(tokens) or real(tokens))
    once = module.decode(TOKENS_OF_FIVE, steps=8, guidance_scale=1)
    module.decode(TOKENS_OF_FIVE, steps=8, guidance_scale=2.0)
    assert len(asked) == 1 + 2
    monkeypatch.setattr(module, "predict", lambda noisy, time, *_: predict(noisy, time, *real(TOKENS_OF_FIVE)))
    assert torch.equal(module.decode(TOKENS_OF_FIVE, steps=8, guidance_scale=1), once)


def test_guidance_of_zero_is_the_null_alone() -> None:
    module = detokenizer()
    unguided = module.decode(module.null.detach().expand(5, -1, -1), guidance_scale=1)
    torch.testing.assert_close(module.decode(TOKENS_OF_FIVE, guidance_scale=0), unguided, rtol=1e-4, atol=1e-5)


def test_guidance_by_hand_in_one_step() -> None:
    """In one step from pure noise the picture is the guided clean one: null + scale (tokens - null)."""
    module = detokenizer()
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(9)).expand(5, -1, -1, -1)
    with torch.no_grad():
        told, null = (
            module.predict(noise, torch.ones(5), *module.condition(tokens))
            for tokens in (TOKENS_OF_FIVE, module.null.expand(5, -1, -1))
        )
    expected = ((null + 1.7 * (told - null)) / 2 + 0.5).clamp(0, 1)
    decoded = module.decode(TOKENS_OF_FIVE, seed=9, steps=1, guidance_scale=1.7)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)


def test_a_perfect_prediction_arrives_at_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of steps, a network that knows the clean picture gives it back."""
    module, clean = detokenizer(), torch.rand(5, 3, 16, 16)
    times: list[float] = []

    def perfect(noisy: Tensor, time: Tensor, caption: Tensor, layout: Tensor) -> Tensor:
        times.append(float(time[0]))
        return clean * 2 - 1

    monkeypatch.setattr(module, "predict", perfect)
    for steps in (1, 2, 5):
        torch.testing.assert_close(module.decode(TOKENS_OF_FIVE, steps=steps), clean, rtol=1e-4, atol=1e-5)
    assert times == pytest.approx([1.0, 1.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_tokens_become_a_map_at_their_places() -> None:
    module, other = detokenizer(), TOKENS_OF_FIVE.clone()
    other[:, 2] += 1.0  # lower left of 2 x 2
    with torch.no_grad():
        change = (module.condition(other)[1] - module.condition(TOKENS_OF_FIVE)[1]).abs().sum((0, 1))
    assert change.shape == (16, 16)
    assert (change[11:, :5] > 0).all() and (change[:5] == 0).all() and (change[:, 11:] == 0).all()


def test_dropped_conditions_train_the_null_and_only_they() -> None:
    images = torch.rand(5, 3, 16, 16)
    for share, reached in ((1.0, True), (0.0, False)):
        module = detokenizer(condition_dropout=share)
        tokens = TOKENS_OF_FIVE.clone().requires_grad_(True)
        module(tokens, images).total.backward()
        null = module.null.grad is not None and bool((module.null.grad != 0).any())
        told = tokens.grad is not None and bool((tokens.grad != 0).any())
        assert (null, told) == (reached, not reached)


def test_token_noise_is_a_setting() -> None:
    images = torch.rand(5, 3, 16, 16)
    losses = []
    for noise in (0.0, 0.0, 2.0):
        module = detokenizer(token_noise=noise, condition_dropout=0.0)
        torch.manual_seed(1)
        losses.append(float(module(TOKENS_OF_FIVE, images).pixels.detach()))
    assert losses[0] == losses[1] != losses[2]


def test_one_batch_is_learned_by_heart(tmp_path: Path) -> None:
    """250 steps on 6 pictures: decoded in two steps they are at least 24 dB from the truth (noise is at about 8)."""
    torch.manual_seed(0)
    settings = detokenizer_settings(layers=2, width=48, condition_dropout=0.0)
    module = Detokenizer(settings, 16, TOKENS, FEATURES)
    images = data.sample_pictures(SOURCE, 6, "train", data.step_generator(0, 0))[2]
    batch = {"tokens": random_features(1, 6)[0], "images": images}
    before = metrics.psnr(module.decode(batch["tokens"]), images).mean()
    optim = OptimConfig(steps=250, batch_size=6, learning_rate=4e-3, warmup_steps=20, weight_decay=0.0)
    fit(module, lambda step: batch, optim, tmp_path, seed=0, precision="float32")
    after = metrics.psnr(module.decode(batch["tokens"]), images).mean()
    assert before < 12 and after > 24
