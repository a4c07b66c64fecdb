"""A training that a test runs alone, and `accelerate launch` in two processes: prints the losses of ten steps as JSON.

shared_training.py FOLDER copies     weights copied, gradients averaged; stops half way and goes on from its file
shared_training.py FOLDER sharded    weights sharded, as FSDP does it on cards
shared_training.py FOLDER words      as copies, of words alone, which leave the resamplers without a gradient
"""

import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy import conversations, make_model, random_features

from nmlib import checkpoint, curriculum
from nmlib.config import OptimConfig
from nmlib.layout import Template
from nmlib.mllm import HistoryMLLM
from nmlib.train import Training

OPTIM = OptimConfig(steps=10, batch_size=12, learning_rate=3e-3, warmup_steps=2, ema_decay=0.8, parts=2)


@cache
def template() -> Template:
    """The words of the batches."""
    return make_model()[1]


def batch_at(step: int, kind: str = "copies") -> dict[str, Any]:
    """Three conversations, which two parts share unequally, with everything that a stage may ask for."""
    chance = torch.Generator().manual_seed(step)
    told = conversations()
    if kind == "words":
        return {"words": template().packed([told[step % 2], told[1], told[0]], pictures=False)}
    weights = torch.rand(3, 4, 4, generator=chance) + 0.5
    return {
        "layout": template().packed([told[step % 2], told[1], told[0]]),
        "features": random_features(3, 4, seed=step),
        "weights": weights / weights.mean(-1, keepdim=True),
        "replaced": torch.rand(3, 4, generator=chance) < 0.5,
        "history_noise": 0.1,
        "words": template().packed(told, pictures=False),
    }


def begin(folder: Path, **changes: Any) -> Training:
    """A training of a model with LoRA and dropout; goes on from its file if there is one."""
    model, _ = make_model(0, 2.0, lora_dropout=0.1)
    model.add_lora()
    model.train()
    optim = OPTIM.model_copy(update=changes)
    training = Training(model, optim, folder / "progress.safetensors", 3, split=curriculum.split)
    training.resume()
    return training


def go_on(training: Training, steps: int, kind: str = "copies") -> list[list[float]]:
    """Losses of the next steps."""
    found = [training.update(batch_at(training.step, kind), torch.float32) for _ in range(steps)]
    return [[float(value) for value in losses] for losses in found]


def shard(self: Accelerator, module: HistoryMLLM, optimizer: torch.optim.Optimizer) -> Any:
    """What `accelerate` does with a module for FSDP, on processors, where it declines to."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    order = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    mesh = init_device_mesh("cpu", (self.num_processes,))
    for layer in module.base_llm.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    now = dict(module.named_parameters())
    for group, wanted in zip(optimizer.param_groups, order, strict=True):
        group["params"] = [now[name] for name in wanted]
    return module, optimizer


def main(folder: Path, kind: str) -> None:
    """Five steps, a checkpoint, a fresh training that goes on from it, five more steps, the result."""
    torch.set_num_threads(1)
    if kind == "sharded":
        Accelerator.prepare = shard  # type: ignore[assignment,method-assign]
    training = begin(folder)
    assert training.accelerator.num_processes == 2
    if not training.accelerator.is_main_process:
        checkpoint.save = refuse
    losses = go_on(training, 5, kind)
    training.save()
    training = begin(folder)
    assert training.step == 5
    losses += go_on(training, 5, kind)
    training.save()
    training.finish()
    weights = dict(training.module.state_dict())
    assert all(type(tensor) is torch.Tensor for tensor in weights.values()), "every weight is whole"
    if training.accelerator.is_main_process:
        torch.save(weights, folder / "weights.pt")
        (folder / "losses.json").write_text(json.dumps(losses))


def refuse(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Stands in for writing where nothing may be written."""
    raise AssertionError(f"{path}: only the main process writes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
