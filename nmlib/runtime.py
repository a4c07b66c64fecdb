"""What every run needs: seeds, threads, number types, run folders, logs, and writing that is whole or absent.

Files and folders are made under a temporary name beside their place and renamed when they are complete, so
a killed run never leaves something half-written that a later run could take for whole.
"""

import ast
import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from tqdm import tqdm

from nmlib import config

T = TypeVar("T")
MAX_THREADS = 8
_TEMPORARY = ".tmp-"
_HOST = "".join(letter if letter.isalnum() else "_" for letter in platform.node())  # of a temporary's process
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BLOCK, _KEPT_HEAP = 2**25, 2**31 - 1  # the largest that glibc takes, in bytes


class RunError(RuntimeError):
    """A run that cannot go on; the message is one line that says what, where and what to do."""


# ---------------------------------------------------------------------------------------------------------
# the machine


def seed_everything(seed: int) -> None:
    """Seed the random states of Python, numpy and torch (all devices).

    Args:
        seed: any integer from 0 to 2**32 - 1.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def cores() -> int:
    """Physical cores this process may use."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))


def set_threads(n: int = 0) -> int:
    """Bound the threads of torch.

    Args:
        n: number of threads; 0 takes the physical cores, at most 8.

    Returns:
        The number that was set.
    """
    threads = n if n > 0 else min(cores(), MAX_THREADS)
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory() -> None:
    """Let the allocator keep freed memory for the next step, where the C library is glibc; elsewhere do nothing.

    A training step takes and frees the same large tensors again and again. glibc hands each of them back to the
    system at once, which then clears its pages for the next step: half of the time of a step on two cores.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no C library by that name, or another one
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_HEAP)


def device() -> torch.device:
    """The device to compute on: the GPU when there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(precision: str, on: torch.device | None = None) -> torch.dtype:
    """The number type for the heavy products of a model, to be given to `torch.autocast`.

    Args:
        precision: `float32`, `bfloat16`, or `auto`: bfloat16 where the hardware multiplies in it.
        on: the device that will compute; by default `device()`.

    Raises:
        ValueError: another word for the precision.
    """
    if precision == "auto":
        return torch.bfloat16 if _has_bfloat16(on or device()) else torch.float32
    if precision in ("float32", "bfloat16"):
        return torch.float32 if precision == "float32" else torch.bfloat16
    raise ValueError(f"precision must be 'float32', 'bfloat16' or 'auto', found {precision!r}")


def _has_bfloat16(on: torch.device) -> bool:
    if on.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public query for this: AVX-512 BF16 or AMX tiles, without which oneDNN emulates bfloat16
    queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, query, lambda: False)() for query in queries)


def machine() -> str:
    """One line that describes this machine, for records and logs."""
    memory = psutil.virtual_memory().total / 2**30
    line = f"{cores()} cores, {_processor()}, {memory:.0f} GB"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        line += f"; {torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GB"
    return line


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------
# whole or absent


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Write a file that is either whole or absent.

    Args:
        path: where the file shall be; its folder is made if it is missing.

    Yields:
        A temporary path in the same folder with the same suffix. When the block ends without an error the
        file is flushed to disk and renamed to `path`; otherwise it is removed.

    Raises:
        RunError: the disk is full, or the block wrote nothing.
    """
    path = Path(path)
    with _guarded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}@{_HOST}-{path.name}")
        try:
            yield temporary
            if not temporary.exists():
                raise RunError(f"{path}: nothing was written to its temporary file")
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder that is either whole or absent; an older one at `path` is replaced.

    Args:
        path: where the folder shall be.

    Yields:
        An empty temporary folder beside `path`, renamed to `path` when the block ends without an error.

    Raises:
        RunError: the disk is full.
    """
    path = Path(path)
    with _guarded(path):
        temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}@{_HOST}-{path.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                _flush(file)
            old = path.with_name(f"{temporary.name}.old")
            if path.exists():
                path.replace(old)
            temporary.replace(path)
            _flush(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Turn the many faces of a full disk into one clear line."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):  # safetensors and arrow raise their own types
            raise RunError(f"{path}: the disk is full; free some space and run again, finished work is kept") from error
        raise


def _flush(path: Path) -> None:
    """Ask the system to put a file or folder on disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as readable JSON, whole or not at all.

    Args:
        path: where the file shall be.
        value: plain Python values.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        RunError: the file is missing or is not complete JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); run the step that makes it") from None
    except ValueError as error:
        raise RunError(f"{path}: not complete JSON ({error}); delete it and run the step that makes it") from None


# ---------------------------------------------------------------------------------------------------------
# the library's own code


def library_digest(*modules: str) -> str:
    """Short hash of the library's sources, equal when and only when the files are equal.

    Args:
        modules: names such as `train`: hash these and all that they import of the library. Without names,
            the whole library.
    """
    folder = Path(__file__).parent
    names = library_imports(*modules) if modules else sorted(p.stem for p in folder.glob("*.py"))
    state = hashlib.blake2b(digest_size=8)
    for name in names:
        state.update(name.encode() + b"\0" + (folder / f"{name}.py").read_bytes() + b"\0")
    return state.hexdigest()


def library_imports(*modules: str) -> list[str]:
    """The given modules of the library with everything they import of it, sorted."""
    folder = Path(__file__).parent
    found: set[str] = set()
    left = list(modules)
    while left:
        name = left.pop()
        if name not in found and (folder / f"{name}.py").exists():
            found.add(name)
            left += imported_modules((folder / f"{name}.py").read_text(encoding="utf-8"))
    return sorted(found)


@functools.cache  # every record asks for the imports of half the library
def imported_modules(source: str) -> tuple[str, ...]:
    """Modules of the library that a piece of Python source imports itself, at any depth of nesting; sorted."""
    dotted: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            dotted |= {f"{node.module}.{alias.name}" for alias in node.names}
    return tuple(sorted({name.split(".")[1] for name in dotted if name.startswith("nmlib.")}))


# ---------------------------------------------------------------------------------------------------------
# runs


def progress(iterable: Iterable[T], total: int | None = None, desc: str = "", unit: str = "it") -> "tqdm[T]":
    """A plain progress bar with an estimate of the time left, on stderr.

    Args:
        iterable: what to walk through.
        total: number of items, where `iterable` has no length.
        desc: words before the bar.
        unit: what an item is.
    """
    return tqdm(iterable, total=total, desc=desc, unit=unit, file=sys.stderr, mininterval=1.0, ncols=80, nrows=20)


class Run:
    """A run of a params file: settings, and the folder that holds everything the run makes.

    Args:
        params: the settings.
        folder: the run's folder; it must exist.
    """

    def __init__(self, params: config.Params, folder: Path) -> None:
        self.params = params
        self.folder = folder

    @classmethod
    def open(cls, params_path: str | Path, folder: str | Path | None = None, root: str | Path = "runs") -> "Run":
        """Load the settings, make the run's folder with a copy of them, set threads and seed.

        Args:
            params_path: a file such as `params/cpu.yaml`.
            folder: the run's folder; by default `root/<name of the params>`.
            root: where runs live.

        Raises:
            config.ParamsError: the params file cannot be used.
            RunError: the disk is full.
        """
        params = config.load(params_path)
        run = cls(params, Path(folder) if folder is not None else Path(root) / params.name)
        copy = run.path("params.yaml")
        text = Path(params_path).read_bytes()
        if not copy.exists() or copy.read_bytes() != text:
            with atomic_path(copy) as temporary:
                temporary.write_bytes(text)
        _sweep(run.folder)
        set_threads(params.threads)
        keep_freed_memory()
        seed_everything(params.seed)
        return run

    @property
    def name(self) -> str:
        """Name of the params."""
        return self.params.name

    @property
    def digest(self) -> str:
        """Short hash of the settings."""
        return config.digest(self.params)

    def path(self, *parts: str) -> Path:
        """A path inside the run's folder; the folders above it are made."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, event: str, **fields: Any) -> None:
        """Append one line of JSON to `log.jsonl`.

        Args:
            event: what happened, for example `stage_end`.
            fields: plain Python values.
        """
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False)
        path = self.path("log.jsonl")
        with _guarded(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def is_temporary(path: Path) -> bool:
    """Whether a path lies in something that `atomic_path` or `atomic_folder` has not finished."""
    return any(part.startswith(_TEMPORARY) for part in path.parts)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left under temporary names; put back a folder caught while being replaced."""
    for path in list(folder.rglob(f"{_TEMPORARY}*@{_HOST}-*")):  # from here, those of other hosts look dead
        owner, _, name = path.name.removeprefix(_TEMPORARY).partition(f"@{_HOST}-")
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            whole = path.with_name(name.removesuffix(".old"))
            if name.endswith(".old") and not whole.exists():
                path.replace(whole)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
