"""The benchmark: `python -m nmlib bench` measures what memory saves, each ratio beside what arithmetic allows.

Workloads are described in `workloads`. Each is a function with a docstring; the order here is that of the report.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nmlib import config, runtime, workloads
from nmlib.bench_setup import Bench, Sizes
from nmlib.config import Params
from nmlib.products import products
from nmlib.records import write_record
from nmlib.runtime import Run, RunError
from nmlib.throughput import throughput
from nmlib.timing import Result

WORKLOADS: dict[str, Callable[[Bench], None]] = {
    "training": workloads.training,
    "throughput": throughput,
    "products": products,
    "packing": workloads.packing,
    "latency": workloads.latency,
    "recompute": workloads.recompute,
    "queries": workloads.queries,
    "undo": workloads.undo,
    "memory": workloads.memory,
    "world": workloads.world,
    "growth": workloads.growth,
}


class Report(BaseModel):
    """What a run of the benchmark found.

    Args:
        params: name of the params.
        params_hash: hash of the settings.
        machine: one line.
        threads: of torch.
        weights: always `untrained`.
        repeats: how often each thing was timed.
        warmup: how often it was run before.
        results: numbers.
        series: rows of what was measured at several sizes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    params: str
    params_hash: str
    machine: str
    threads: int = Field(ge=1)
    weights: str = "untrained"
    repeats: int = Field(ge=1)
    warmup: int = Field(ge=0)
    results: tuple[Result, ...]
    series: dict[str, list[dict[str, float]]]

    def result(self, id: str) -> Result:
        """The number of that id.

        Raises:
            RunError: there is none.
        """
        for result in self.results:
            if result.id == id:
                return result
        raise RunError(f"benchmark: no result {id!r}; there are {', '.join(result.id for result in self.results)}")


def run_bench(
    params: Params, only: Sequence[str] | None = None, repeats: int = 7, warmup: int = 2, sizes: Sizes | None = None
) -> Report:
    """Measure workloads one after the other.

    Args:
        params: sizes of the models.
        only: names of workloads; all by default.
        repeats: how often each thing is timed.
        warmup: how often it is run before, untimed.
        sizes: of the workloads; the documented ones by default.

    Raises:
        RunError: a workload has no such name.
    """
    names = list(WORKLOADS) if only is None else list(only)
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        raise RunError(f"benchmark: no workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    bench = Bench(params, sizes or Sizes(), repeats, warmup)
    for name in runtime.progress(names, desc="bench", unit="workload"):
        WORKLOADS[name](bench)
    return Report(
        params=params.name,
        params_hash=config.digest(params),
        machine=runtime.machine(),
        threads=torch.get_num_threads(),
        repeats=repeats,
        warmup=warmup,
        results=tuple(bench.results),
        series=bench.series,
    )


def record(run: Run, report: Report) -> None:
    """Write every number of a report as a record `bench.<id>` of a run."""
    for result in report.results:
        workload = result.id.partition(".")[0]
        write_record(
            run,
            f"bench.{result.id}",
            result.value,
            low=result.low,
            high=result.high,
            limit=result.limit,
            n=result.repeats,
            unit=result.unit,
            modules=("bench",),
            command=f"python -m nmlib bench --params {run.name} --only {workload} --repeats {report.repeats}",
        )


def save(report: Report, path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    runtime.write_json(path, report.model_dump(mode="json"))


def load(path: Path) -> Report:
    """Read what `save` wrote.

    Raises:
        RunError: the file is missing, damaged, or no report.
    """
    try:
        return Report.model_validate(runtime.read_json(path))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise RunError(f"{path}: no report of the benchmark: {key}: {fault['msg']}; measure again") from None


def table(report: Report) -> str:
    """A report as aligned lines: value, interval, limit, what it means; the machine last."""
    lines = []
    for item in report.results:
        spread = "" if item.low is None or item.high is None else f"({item.low:.4g} to {item.high:.4g})"
        limit = "" if item.limit is None else f"limit {item.limit:.4g}"
        value = f"{item.value:.4g} {item.unit}"
        lines.append(f"{item.id:24} {value:>18} {spread:22} {limit:12} {item.meaning}")
    return "\n".join([*lines, f"{report.machine}; {report.threads} threads; {report.weights} weights"])
