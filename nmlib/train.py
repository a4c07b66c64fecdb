"""One training loop for everything that learns here: encoder, detokenizer, face embedder and every stage.

- A batch is a pure function of the step, and so is all randomness inside a step: the data position and the
  random state of a training are one integer, and a resumed training equals an uninterrupted one.
- The module computes its own loss and returns a named tuple whose `total` is minimised.
- The learning rate is a pure function of the optimizer step.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from nmlib import checkpoint, config, runtime
from nmlib.config import OptimConfig, Settings
from nmlib.runtime import Run

LOG_EVERY = 10
History = list[dict[str, float]]


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Learning rate of an optimizer step: linear warm-up, then cosine to a floor.

    Args:
        optim: the schedule.
        step: 0 for the first step.
    """
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    floor = optim.min_learning_rate_ratio
    return optim.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def step_seed(seed: int, step: int) -> int:
    """Seed of everything random within one step; distinct for every (seed, step)."""
    return (seed * 1_000_003 + step) % 2**63


class Training:
    """The state of one training: module, optimizer, running average and position.

    Args:
        module: returns a named tuple with `total` when called with a batch.
        optim: length, batch and schedule.
        path: file of the training's own checkpoint.
        seed: seed of the order of data and of all noise.
        key: identifies everything else that the training depends on; a checkpoint of another key is refused.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, path: Path, seed: int, key: str = "") -> None:
        self.module, self.optim, self.path, self.seed, self.key = module, optim, path, seed, key
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        decayed = [p for p in self.parameters.values() if p.ndim >= 2]
        plain = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, fused=True)
        self.wrapped, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if optim.ema_decay else {}
        self.step = 0
        self.history: list[dict[str, float]] = []

    def save(self) -> None:
        """Write everything needed to go on, as one atomic file."""
        tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        checkpoint.save(self.path, tensors, {**self._identity(), "step": self.step, "history": self.history})

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "optim": config.digest(self.optim), "key": self.key}

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one of this very training.

        Raises:
            CheckpointError: the file is damaged, or belongs to other settings.
        """
        if not self.path.exists():
            return
        tensors, metadata = checkpoint.load(self.path)
        if {name: metadata.get(name) for name in self._identity()} != self._identity():
            raise checkpoint.CheckpointError(f"{self.path}: belongs to other settings; delete it to train anew")
        part = _split_by_prefix(tensors)
        checkpoint.load_into(self.module, part["module"], str(self.path))
        for name, tensor in part.get("average", {}).items():
            self.average[name].copy_(tensor)
        for key, tensor in part.get("optimizer", {}).items():
            kind, name = key.split(".", 1)
            self.optimizer.state[self.parameters[name]][kind] = tensor.to(self.parameters[name].device)
        self.step, self.history = metadata["step"], metadata["history"]

    def update(self, batch: Mapping[str, Any], dtype: torch.dtype) -> Any:
        """One optimizer step; returns the losses."""
        torch.manual_seed(step_seed(self.seed, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.optim, self.step)
        device = self.accelerator.device
        moved = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = self.wrapped(**moved)
        self.accelerator.backward(losses.total)
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.optim.max_grad_norm)
        for name, value in (("loss", losses.total), ("gradient", norm)):
            if not math.isfinite(float(value.detach())):
                where = f"training {self.path.parent.name!r}, step {self.step}"
                raise FloatingPointError(f"{where}: the {name} is {float(value.detach())}; lower the learning rate")
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, tensor in self.average.items():
            tensor.lerp_(self.parameters[name].detach(), 1 - self.optim.ema_decay)
        self.step += 1
        return losses

    @torch.no_grad()
    def finish(self) -> None:
        """Put the running average, where there is one, into the module."""
        for name, tensor in self.average.items():
            self.parameters[name].copy_(tensor)


def _split_by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, rest = name.split(".", 1)
        parts.setdefault(prefix, {})[rest] = tensor
    return parts


def fit(
    module: nn.Module,
    batch_at: Callable[[int], Mapping[str, Any]],
    optim: OptimConfig,
    folder: Path,
    *,
    seed: int,
    precision: str = "auto",
    title: str = "training",
    key: str = "",
) -> list[dict[str, float]]:
    """Train a module in place, resuming where a killed training left off.

    Args:
        module: called with a batch as keyword arguments; returns a named tuple of losses with `total`.
        batch_at: step -> batch; a pure function.
        optim: length and schedule.
        folder: takes `progress.safetensors` (delete it once the result is stored) and TensorBoard logs.
        seed: order of data and noise.
        precision: `float32`, `bfloat16` or `auto`.
        title: shown beside the progress bar.
        key: identifies everything else that the training depends on; a checkpoint of another key is refused.

    Returns:
        Loss history: one record every few steps with `step`, `learning_rate` and each loss.

    Raises:
        FloatingPointError: the loss is not finite; names the step.
        CheckpointError: the checkpoint is damaged, or belongs to other settings.
    """
    training = Training(module, optim, folder / "progress.safetensors", seed, key)
    training.resume()
    dtype = runtime.compute_dtype(precision)
    module.train()
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=training.step)
    for step in runtime.progress(range(training.step, optim.steps), desc=title):
        losses = training.update(batch_at(step), dtype)
        if step % LOG_EVERY == 0 or step == optim.steps - 1:
            training.history.append(_log(writer, step, losses, optim))
        if training.step % optim.checkpoint_every == 0 or training.step == optim.steps:
            training.save()
    writer.close()
    training.finish()
    module.eval()
    return training.history


def _log(writer: SummaryWriter, step: int, losses: Any, optim: OptimConfig) -> dict[str, float]:
    record = {name: float(value.detach()) for name, value in losses._asdict().items()}
    record |= {"step": step, "learning_rate": learning_rate(optim, step)}
    for name, value in record.items():
        writer.add_scalar(name, value, step)
    return record


def training_key(run: Run, module: str, seed: int, *settings: Settings) -> str:
    """Identifies what a training gives: all that it depends on is in its settings, its seed and the code of a module.

    Args:
        run: gives precision and the first seed.
        module: of the library; it and all that it imports count.
        seed: added to the run's seed.
        settings: everything the training reads.
    """
    parts = [config.digest(part) for part in settings]
    return "-".join([*parts, run.params.precision, str(run.params.seed + seed), runtime.library_digest(module)])


def run_training(
    run: Run,
    name: str,
    module: nn.Module,
    batch_at: Callable[[int], dict[str, Any]],
    optim: OptimConfig,
    seed: int,
    settings: Iterable[Settings],
) -> History:
    """Train, or go on with a training that was interrupted under the same settings; see `fit`.

    Args:
        run: takes the training's own files in `training/<name>`, and a line in its log.
        name: of the result.
        module: trained in place.
        batch_at: step -> batch.
        optim: length and schedule.
        seed: order of data and noise.
        settings: everything else that the training depends on.
    """
    history = fit(
        module,
        batch_at,
        optim,
        run.path("training", name),
        seed=seed,
        precision=run.params.precision,
        title=name,
        key="-".join(config.digest(part) for part in settings),
    )
    run.log("trained", name=name, steps=optim.steps, **{f"final_{k}": v for k, v in history[-1].items()})
    return history


def finish(run: Run, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Store a result as `<name>.safetensors`, then drop the training's own checkpoint."""
    checkpoint.save(run.path(f"{name}.safetensors"), tensors, metadata)
    run.path("training", name, "progress.safetensors").unlink(missing_ok=True)


def made(path: Path, key: str) -> History | None:
    """Loss history of a result that a training of this key has made already."""
    metadata = checkpoint.load(path)[1] if path.exists() else {}
    return metadata["history"] if metadata.get("key") == key else None
