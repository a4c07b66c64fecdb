"""How long something takes: repeats that take turns, medians with intervals, ratios beside what arithmetic allows."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

RESAMPLES = 1000


class Result(BaseModel):
    """One number of the benchmark.

    Args:
        id: dotted name; the first part is the workload.
        value: the median over the repeats, or the number itself where nothing was timed.
        low: lower end of the 95% bootstrap interval of the median.
        high: upper end of it.
        repeats: how many were timed; 1 for arithmetic and for bytes that are counted.
        unit: for example `x` for a ratio, `ms`, `bytes`.
        limit: what arithmetic alone would give, where it says something.
        meaning: what is compared, and what the limit is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: str = Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$")
    value: float
    low: float | None = None
    high: float | None = None
    repeats: int = Field(default=1, ge=1)
    unit: str
    limit: float | None = None
    meaning: str


class Task(NamedTuple):
    """Something to time, and what makes it ready before each time, which is not timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def measure(tasks: Mapping[str, Task], repeats: int, warmup: int) -> dict[str, np.ndarray]:
    """Seconds of several tasks that take turns, so that a machine that slows down slows them all.

    Args:
        tasks: what to time, by name.
        repeats: how often each is timed.
        warmup: how often each is run before, untimed.

    Returns:
        Seconds (repeats,) of each task; those of one index were measured one after the other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(-warmup, repeats):
        for name, task in tasks.items():
            task.prepare()
            _wait()
            start = time.perf_counter()
            task.run()
            _wait()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def _wait() -> None:
    """Wait for a GPU, whose work goes on after a call returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(samples: np.ndarray) -> dict[str, Any]:
    """Median of repeats (n,) with its 95% bootstrap interval, as fields of a `Result`."""
    drawn = np.random.default_rng(0).choice(samples, (RESAMPLES, len(samples)))  # (RESAMPLES, n)
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return {"value": float(np.median(samples)), "low": float(low), "high": float(high), "repeats": len(samples)}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The p of the power law cost ~ size^p that fits best, by least squares of the logarithms."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float)), 1)[0])
