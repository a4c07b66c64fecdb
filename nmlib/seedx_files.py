"""Reading weights that others wrote: sharded or not, `.bin`, `.pt` or safetensors, lazily and without running code.

Torch files are opened with `weights_only` and mapped into memory, so that a shard is read tensor by tensor; a file
whose pickle would call anything is refused.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nmlib import runtime
from nmlib.checkpoint import CheckpointError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt")


class Header(NamedTuple):
    """What is known of a stored tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a folder: shards of an index, or one file; a file is itself.

    Raises:
        CheckpointError: there is none, a shard is missing, or the index points outside its folder.
    """
    if path.is_file():
        return [path]
    for name in INDEXES:
        if (path / name).is_file():
            return _shards(path, name)
    singles = [path / name for name in SINGLES if (path / name).is_file()]
    others = sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)
    if singles or len(others) == 1:
        return singles[:1] or others
    found = f"found {', '.join(file.name for file in others)}" if others else "found no file of weights"
    raise CheckpointError(f"{path}: expected {' or '.join((*INDEXES, *SINGLES))}; {found}")


def _shards(folder: Path, index: str) -> list[Path]:
    try:
        listed = runtime.read_json(folder / index)["weight_map"]
        names = sorted(set(listed.values()))
    except (runtime.RunError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / index}: no `weight_map` of tensors to files; fetch it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{folder / index}: shard {name!r} lies outside its folder; expected a plain name")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
    return [folder / name for name in names]


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, one at a time.

    Raises:
        CheckpointError: the file is damaged, holds something else than tensors, or would run code.
    """
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as archive:
                for name in archive.keys():  # noqa: SIM118 (no dict)
                    yield name, archive.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged or truncated ({error}); fetch it again") from None
        return
    loaded = _load(file)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file}: holds {type(loaded).__name__}; expected a dictionary of tensors")
    for name, tensor in loaded.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{file}: {name!r} is {type(tensor).__name__}; expected a tensor")
        yield str(name), tensor


def _load(file: Path) -> object:
    """A torch file as it lies on disk; one of the old format, which cannot be mapped, is read whole."""
    try:
        with file.open("rb") as opened:
            mapped = opened.read(2) == b"PK"
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])
        raise CheckpointError(
            f"{file}: refused, for reading it may run code ({reason}); expected tensors only, get a safetensors copy"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        line = str(error).partition("\n")[0]
        raise CheckpointError(f"{file}: damaged or truncated ({line}); fetch it again") from None


def headers_of(files: list[Path]) -> dict[str, Header]:
    """Shapes and number types of all tensors in files.

    Raises:
        CheckpointError: also where a name stands in two of them.
    """
    found: dict[str, Header] = {}
    for file in files:
        for name, tensor in tensors_of(file):
            if name in found:
                raise CheckpointError(f"{file}: {name} stands in {found[name].file.name} too; expected it once")
            found[name] = Header(tuple(tensor.shape), tensor.dtype, file)
    return found
