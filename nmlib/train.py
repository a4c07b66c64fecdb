"""One training loop for everything that learns here: encoder, detokenizer, face embedder and every stage.

- A batch is a pure function of the step, and so is all randomness inside a step: the data position and the
  random state of a training are one integer, and a resumed training equals an uninterrupted one.
- The module computes its own loss and returns a named tuple whose `total` is minimised.
- The learning rate is a pure function of the optimizer step.
- A batch is cut into parts, read one after the other or by several processes (`accelerate launch`). Noise belongs to
  a part and losses of parts add up to those of the batch, so that the number of processes changes nothing.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.tensorboard import SummaryWriter

from nmlib import checkpoint, config, runtime
from nmlib.attention import training_attention
from nmlib.config import OptimConfig, Settings
from nmlib.prefetch import batches_ahead
from nmlib.runtime import Run

LOG_EVERY = 10
PART_SEEDS = 1_000_000_007  # between the seeds of two parts of a step
History = list[dict[str, float]]


class Part(NamedTuple):
    """A part of a batch: what the module is called with, and what its losses are multiplied by before they add up."""

    batch: Mapping[str, Any]
    weight: float


Split = Callable[[Mapping[str, Any], int], list[Part]]


def cut_rows(rows: int, parts: int) -> list[tuple[int, int]]:
    """First row, and the row after the last, of each of `parts` runs of nearly equal length.

    Raises:
        ValueError: fewer rows than parts.
    """
    if rows < parts:
        raise ValueError(f"a batch of {rows} rows cannot be cut into {parts} parts; raise batch_size or lower parts")
    return [(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)]


def split_rows(batch: Mapping[str, Any], parts: int) -> list[Part]:
    """Cut the tensors of a batch by rows, for a module whose losses are means over rows."""
    rows = len(next(value for value in batch.values() if isinstance(value, Tensor)))
    return [
        Part(
            {name: value[start:stop] if isinstance(value, Tensor) else value for name, value in batch.items()},
            (stop - start) / rows,
        )
        for start, stop in cut_rows(rows, parts)
    ]


def processes() -> PartialState:
    """This process among those that `accelerate launch` started; alone it is the main one."""
    return PartialState(cpu=not torch.cuda.is_available())


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


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """Seed of everything random within one part of a step; distinct for every (seed, step, part)."""
    return ((seed + PART_SEEDS * part) * 1_000_003 + step) % 2**63


def repeat_forward_passes(module: nn.Module) -> None:
    """Let the layers of a module repeat their forward pass in the backward pass instead of keeping activations.

    Raises:
        ValueError: no part of the module knows how to.
    """
    able: list[Any] = [part for part in module.modules() if hasattr(part, "activation_checkpointing_enable")]
    for part in able:  # of transformers
        part.activation_checkpointing_enable({"use_reentrant": False})
    others: list[Any] = [part for part in module.modules() if hasattr(part, "enable_gradient_checkpointing")]
    for part in others:  # of diffusers
        part.enable_gradient_checkpointing()
    if not (able or others):
        raise ValueError(f"activation_checkpointing: no part of {type(module).__name__} can; set it to false")


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor in full where it is sharded over processes, all of which must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor on the device of another one, and sharded as it is."""
    moved = tensor.to(other.device)
    if not isinstance(other, DTensor) or moved.shape != other.shape:
        return moved
    return distribute_tensor(moved, other.device_mesh, other.placements)


class Training:
    """The state of one training: module, optimizer, running average and position.

    Args:
        module: returns a named tuple with `total` when called with a batch.
        optim: length, batch and schedule.
        path: file of the training's own checkpoint.
        seed: seed of the order of data and of all noise.
        key: identifies everything else that the training depends on; a checkpoint of another key is refused.
        split: cuts a batch into `optim.parts`.

    Raises:
        ValueError: the processes cannot share the parts evenly.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        path: Path,
        seed: int,
        key: str = "",
        split: Split = split_rows,
    ) -> None:
        self.module, self.optim, self.path, self.seed, self.key, self.split = module, optim, path, seed, key, split
        # a stage that reads words alone leaves the resamplers without a gradient
        several = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[several])
        count = self.accelerator.num_processes
        if optim.parts % count:
            raise ValueError(f"optim.parts {optim.parts} cannot be shared by {count} processes; expected a multiple")
        if optim.activation_checkpointing:
            repeat_forward_passes(module)
        trained = [p for p in module.parameters() if p.requires_grad]
        decayed, plain = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, fused=True)
        self.wrapped, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if optim.ema_decay else {}
        self.step = 0
        self.history: list[dict[str, float]] = []

    def save(self) -> None:
        """Write everything needed to go on, as one atomic file; all processes call this, the main one writes."""
        tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        kept = {}
        for name, tensor in tensors.items():
            whole = whole_tensor(tensor)
            if self.accelerator.is_main_process:
                kept[name] = whole.cpu()
        if self.accelerator.is_main_process:
            checkpoint.save(self.path, kept, {**self._identity(), "step": self.step, "history": self.history})
        self.accelerator.wait_for_everyone()

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "optim": config.digest(self.optim), "key": self.key}

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one of this very training.

        Raises:
            CheckpointError: the file is damaged, or belongs to another training.
        """
        if not self.path.exists():
            return
        tensors, metadata = checkpoint.load(self.path)
        if {name: metadata.get(name) for name in self._identity()} != self._identity():
            raise checkpoint.CheckpointError(
                f"{self.path}: belongs to other settings, data or library code; delete it to train anew"
            )
        part, own = _split_by_prefix(tensors), self.module.state_dict()
        found = {name: tuple(tensor.shape) for name, tensor in part["module"].items()}
        expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
        checkpoint.require_fit(expected, found, type(self.module).__name__, str(self.path))
        for name, tensor in part["module"].items():
            own[name].copy_(like(tensor, own[name]))
        for name, tensor in part.get("average", {}).items():
            self.average[name].copy_(like(tensor, self.average[name]))
        for key, tensor in part.get("optimizer", {}).items():
            kind, name = key.split(".", 1)
            self.optimizer.state[self.parameters[name]][kind] = like(tensor, self.parameters[name])
        self.step, self.history = metadata["step"], metadata["history"]

    def update(self, batch: Mapping[str, Any], dtype: torch.dtype) -> Any:
        """One optimizer step; returns the losses of the whole batch, the same in every process."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.optim, self.step)
        losses = self._gradients(batch, dtype)
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

    def _gradients(self, batch: Mapping[str, Any], dtype: torch.dtype) -> Any:
        """Add up the gradients of the parts, this process's and all others'; returns the sum of their losses."""
        count, parts = self.accelerator.num_processes, self.optim.parts
        pieces = self.split(batch, parts) if parts > 1 else [Part(batch, 1.0)]
        own = range(
            parts * self.accelerator.process_index // count, parts * (self.accelerator.process_index + 1) // count
        )
        device, found = self.accelerator.device, list[Any]()
        for number in own:
            torch.manual_seed(step_seed(self.seed, self.step, number))
            part = {k: value.to(device) if hasattr(value, "to") else value for k, value in pieces[number].batch.items()}
            last = number == own[-1]  # gradients travel between processes once a step
            synchronized = contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)
            with synchronized, training_attention(device):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    losses = self.wrapped(**part)
                # processes average gradients, and parts add up
                self.accelerator.backward(losses.total * (pieces[number].weight * count))
            weighted = [pieces[number].weight * value.detach().float() for value in losses]
            found.append(torch.stack(weighted))
        sums = self.accelerator.reduce(torch.stack(found).sum(0), "sum")
        return type(losses)(*sums)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the running average, where there is one, into the module, and make every parameter whole."""
        for name, tensor in self.average.items():
            self.parameters[name].copy_(tensor)
        for owner in self.module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                whole = whole_tensor(parameter)
                if whole is not parameter:
                    owner._parameters[name] = nn.Parameter(whole.cpu(), parameter.requires_grad)


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
    split: Split = split_rows,
) -> list[dict[str, float]]:
    """Train a module in place, resuming where a killed training left off; in every process of a launch alike.

    Args:
        module: called with a batch as keyword arguments; returns a named tuple of losses with `total`.
        batch_at: step -> batch; a pure function.
        optim: length and schedule.
        folder: takes `progress.safetensors` (delete it once the result is stored) and TensorBoard logs.
        seed: order of data and noise.
        precision: `float32`, `bfloat16` or `auto`.
        title: shown beside the progress bar.
        key: identifies everything else that the training depends on; a checkpoint of another key is refused.
        split: cuts a batch into `optim.parts`.

    Returns:
        Loss history: one record every few steps with `step`, `learning_rate` and each loss.

    Raises:
        FloatingPointError: the loss is not finite; names the step.
        CheckpointError: the checkpoint is damaged, or belongs to another training.
        ValueError: the processes cannot share the parts of a batch.
    """
    training = Training(module, optim, folder / "progress.safetensors", seed, key, split)
    training.resume()
    dtype = runtime.compute_dtype(precision)
    module.train()
    writer, steps = None, range(training.step, optim.steps)
    if training.accelerator.is_main_process:
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=training.step)
    coming = batches_ahead(batch_at, steps, overlap=training.accelerator.device.type == "cuda")
    for step in steps if writer is None else runtime.progress(steps, desc=title):
        losses = training.update(next(coming), dtype)
        if step % LOG_EVERY == 0 or step == optim.steps - 1:
            training.history.append(_log(writer, step, losses, optim))
        if training.step % optim.checkpoint_every == 0 or training.step == optim.steps:
            training.save()
    if writer is not None:
        writer.close()
    training.finish()
    module.eval()
    return training.history


def _log(writer: SummaryWriter | None, step: int, losses: Any, optim: OptimConfig) -> dict[str, float]:
    record = {name: float(value.detach()) for name, value in losses._asdict().items()}
    record |= {"step": step, "learning_rate": learning_rate(optim, step)}
    if writer is not None:
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
    key: str,
    split: Split = split_rows,
) -> History:
    """Train, or go on with a training of the same key that was interrupted; see `fit`.

    Args:
        run: takes the training's own files in `training/<name>`, and a line in its log.
        name: of the result.
        module: trained in place.
        batch_at: step -> batch.
        optim: length and schedule.
        seed: order of data and noise.
        key: identifies everything else that the training depends on; of the result as well.
        split: cuts a batch into `optim.parts`.
    """
    history = fit(
        module,
        batch_at,
        optim,
        run.path("training", name),
        seed=seed,
        precision=run.params.precision,
        title=name,
        key=key,
        split=split,
    )
    if processes().is_main_process:
        run.log("trained", name=name, steps=optim.steps, **{f"final_{k}": v for k, v in history[-1].items()})
    return history


def finish(run: Run, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Store a result as `<name>.safetensors`, then drop the training's own checkpoint; the main process does it."""
    if processes().is_main_process:
        checkpoint.save(run.path(f"{name}.safetensors"), tensors, metadata)
        run.path("training", name, "progress.safetensors").unlink(missing_ok=True)
    processes().wait_for_everyone()


def made(path: Path, key: str) -> History | None:
    """Loss history of a result that a training of this key has made already."""
    metadata = checkpoint.load(path)[1] if path.exists() else {}
    return metadata["history"] if metadata.get("key") == key else None
