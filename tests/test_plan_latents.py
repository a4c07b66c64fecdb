"""The plan of the detokenizer on latents against a small one that was trained."""

from pathlib import Path

import pytest
import torch

from nmlib import config, plan_latents
from nmlib.config import DetokenizerConfig, OptimConfig
from nmlib.detokenizer import Detokenizer
from nmlib.plan_latents import LATENT_CHANNELS, part_cost, training_bytes
from nmlib.train import Training

SIDE, TOKENS, WIDTH = 8, 4, 6
PAPER = Path(__file__).parent.parent / "params" / "paper.yaml"


def optim(**changes: object) -> OptimConfig:
    return OptimConfig.model_validate({"steps": 3, "batch_size": 6, "learning_rate": 1e-3, "parts": 2, **changes})


def sizes() -> DetokenizerConfig:
    return DetokenizerConfig(patch_size=2, width=32, layers=3, heads=2, sampling_steps=2, optim=optim())


@pytest.mark.parametrize("again", [False, True])
def test_counted_is_measured(again: bool) -> None:
    """What is counted of shapes is what a real step of three pictures does and keeps."""
    wanted = optim(activation_checkpointing=again)
    counted = part_cost(sizes(), SIDE, TOKENS, WIDTH, wanted)
    assert counted == part_cost(sizes(), SIDE, TOKENS, WIDTH, wanted, fake=False)
    assert counted.flops > 0 and counted.activations > 0


def test_repeated_passes_cost_operations_and_save_memory() -> None:
    kept, repeated = (
        part_cost(sizes(), SIDE, TOKENS, WIDTH, optim(activation_checkpointing=on)) for on in (False, True)
    )
    assert repeated.flops > kept.flops and repeated.activations < kept.activations
    double = part_cost(sizes(), SIDE, TOKENS, WIDTH, optim(batch_size=12))
    assert double.flops == pytest.approx(2 * kept.flops, rel=1e-3)


def test_attention_is_counted() -> None:
    """With four times the patches attention to one another takes sixteen times the operations, the rest four times."""
    small, large = (part_cost(sizes(), side, TOKENS, WIDTH, optim()).flops for side in (SIDE, 2 * SIDE))
    patches, width, layers = (SIDE // 2) ** 2, 32, 3
    pictures, passes = 3, 3.5  # forward, and backward with the scores computed again
    own = passes * pictures * layers * 4 * width * patches**2
    assert large - 4 * small == pytest.approx((16 - 4) * own, rel=0.35)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_bytes_of_a_training_are_those_it_keeps(ema_decay: float, tmp_path: Path) -> None:
    module = Detokenizer(sizes(), SIDE, TOKENS, WIDTH, LATENT_CHANNELS)
    training = Training(module, optim(parts=1, ema_decay=ema_decay), tmp_path / "x", 0)
    latents = torch.zeros(6, LATENT_CHANNELS, SIDE, SIDE)
    training.update({"tokens": torch.zeros(6, TOKENS, WIDTH), "images": latents}, torch.float32)
    states = [value for state in training.optimizer.state.values() for value in state.values() if value.ndim]
    kept = [*training.parameters.values(), *training.parameters.values(), *states, *training.average.values()]
    numbers = sum(parameter.numel() for parameter in module.parameters())
    found = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    scalars = 8 * 4 * sum(parameter.ndim == 0 for parameter in module.parameters())
    assert training_bytes(numbers, training.optim) == pytest.approx(found, abs=scalars)


def test_the_papers_detokenizer_is_planned() -> None:
    params = config.load(PAPER)
    assert params.seedx is not None
    text = plan_latents.report(params, params.seedx, 8)
    assert "latents of 4 x 56 x 56: 613,357,236 parameters, all of them trained" in text
    assert [line.split()[0] for line in text.splitlines()[2:5]] == [
        "detokenizer",
        "detokenizer-faces",
        "detokenizer-predicted",
    ]
