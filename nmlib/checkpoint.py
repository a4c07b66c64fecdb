"""Strict, safe and atomic storage of weights: safetensors files whose metadata rebuilds the model.

A checkpoint is one file, written under a temporary name and renamed, so that it is there in full or not at
all. Its metadata is JSON: the settings the weights belong to, and whatever a training needs to go on.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nmlib import runtime
from nmlib.runtime import atomic_path

M = TypeVar("M", bound=nn.Module)


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or does not fit; the message says what to do."""


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write named tensors and JSON metadata as one file, atomically.

    Args:
        path: file to write, for example `runs/cpu/encoder.safetensors`.
        tensors: name -> tensor.
        metadata: plain values that describe them.
    """
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(owned, temporary, metadata={"nmlib": json.dumps(metadata, sort_keys=True)})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, or was not written by this library.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; run the notebook that writes it (`python -m nmlib run`)")
    try:
        with safe_open(path, framework="pt") as archive:
            metadata = (archive.metadata() or {}).get("nmlib")
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error}); delete it and run again") from None
    if metadata is None:
        raise CheckpointError(f"{path}: not written by nmlib (no `nmlib` metadata); expected a file that `save` wrote")
    return tensors, json.loads(metadata)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a module, strictly: no missing, extra or misshapen key.

    Raises:
        CheckpointError: names every key that does not fit.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    require_fit(own, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, type(module).__name__, where)
    module.load_state_dict(dict(tensors), strict=True)


def misfits(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, unexpected or misshapen among named shapes; empty when all fits."""
    faults = [f"missing {name} {expected[name]}" for name in expected if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in expected]
    faults += [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    return faults


def require_fit(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], kind: str, where: str
) -> None:
    """Hold named shapes to those of a module.

    Raises:
        CheckpointError: names every key that does not fit.
    """
    faults = misfits(expected, found)
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise CheckpointError(f"{where}: does not fit {kind}: {shown}")


def freeze(module: M, tensors: Mapping[str, Tensor], path: Path) -> M:
    """The module with the tensors of a file, on this machine's device, in evaluation mode and without gradients."""
    load_into(module, tensors, str(path))
    return module.to(runtime.device()).eval().requires_grad_(False)


def as_json(value: Any) -> str:
    """Settings as they stand in a checkpoint's metadata, for a strict settings class to read."""
    return json.dumps(value)
