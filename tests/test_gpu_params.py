"""`params/gpu.yaml` on a CPU: two steps of each of its trainings, on batches cut down to a few pictures."""

from pathlib import Path

import pytest
import torch
from torch import nn

from nmlib import batches, config, data, plan_stages
from nmlib.config import OptimConfig
from nmlib.detokenizer import Detokenizer
from nmlib.sources import attribute_sizes
from nmlib.train import Training
from nmlib.vision import EncoderTrainer, VisionTransformer

PARAMS = config.load(Path(__file__).parent.parent / "params" / "gpu.yaml")
SOURCE = data.open_source(PARAMS.source)


def two_steps(module: nn.Module, batch: dict[str, object], optim: OptimConfig, folder: Path) -> list[float]:
    """Total losses of two steps, both of which change weights."""
    training = Training(module.train(), optim, folder / "progress.safetensors", 0)
    weights = max((p for p in training.parameters.values() if p.ndim == 2), key=lambda p: p.numel())
    before, totals = weights.detach().clone(), []
    for _ in range(2):
        totals.append(float(training.update(batch, torch.float32).total))
        assert not torch.equal(weights, before)
        before = weights.detach().clone()
    return totals


def test_encoder_and_detokenizer(tmp_path: Path) -> None:
    subjects, values, images = data.training_pictures(PARAMS, SOURCE, 2, data.step_generator(0, 0))
    assert images.shape == (2, 3, 128, 128)
    eyes = EncoderTrainer(PARAMS.vision, 128, attribute_sizes(SOURCE), subjects.shape[1])
    batch: dict[str, object] = {"images": images, "values": values, "subjects": subjects}
    assert all(total > 0 for total in two_steps(eyes, batch, PARAMS.vision.optim, tmp_path / "encoder"))
    with torch.no_grad():
        tokens = VisionTransformer(PARAMS.vision, 128)(images)
    assert tokens.shape == (2, 64, 64)
    pixels = Detokenizer(PARAMS.detokenizer, 128, 64, 64)
    batch = {"tokens": tokens, "images": images}
    assert all(total > 0 for total in two_steps(pixels, batch, PARAMS.detokenizer.optim, tmp_path / "detokenizer"))


@pytest.mark.parametrize("name", ["base", "rollback"])
def test_stages(tmp_path: Path, name: str) -> None:
    stage = PARAMS.stage(name)
    model, template = plan_stages.build(PARAMS, stage)
    length = min(PARAMS.data[name].rounds)
    told = batches.draw(PARAMS, name, 0, "train", {"conversations": 1, "rounds": (length,)})
    batch: dict[str, object] = {"layout": template.packed(told), "features": torch.randn(1, length, 64, 64)}
    first, _ = two_steps(model, batch, stage.optim, tmp_path)
    assert 1 < first < 30, "a fresh model: words below ln of the vocabulary, pictures about six times one"
