"""How fast a step of training is: tokens a second, and the share of the machine's arithmetic that the model gets."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nmlib import batches, curriculum, plan_stages, runtime
from nmlib.bench_setup import Bench
from nmlib.config import StageConfig
from nmlib.layout import Template
from nmlib.mllm import HistoryMLLM
from nmlib.timing import Result, Task, summary
from nmlib.train import Training

LARGE_BATCH = 768  # pictures a step that keep a card of 80 GB busy
PEAK_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices whose product is taken for the machine's best


def throughput(bench: Bench) -> None:
    """A step of the first stage that reads pictures, packed, in its own batch size; beside one large matrix product.

    Operations are those that the model needs (`plan_stages.step_work`), not those that are done. The conversations are
    the stage's longest, their features noise: what a step costs does not depend on them. On a GPU the same is measured
    with compiled layers and a batch that keeps the card busy.
    """
    stage = next(stage for stage in bench.params.stages if stage.data)
    _steps(bench, stage, "throughput", "training in packed sequences", compiled=False)
    if torch.cuda.is_available():
        _compiled_steps(bench, stage)


def _compiled_steps(bench: Bench, stage: StageConfig) -> None:
    """The same with compiled layers and a large batch, where the card has the memory and torch a compiler for it."""
    optim = stage.optim.model_copy(update={"batch_size": LARGE_BATCH})
    large = stage.model_copy(update={"optim": optim, "word_rounds": 0})
    meaning = f"layers compiled, {LARGE_BATCH} pictures a step, no words beside them"
    try:
        _steps(bench, large, "throughput.compiled", meaning, compiled=True)
    except RuntimeError as error:  # what torch raises of memory and compilers
        print(f"throughput.compiled is left out: {str(error).splitlines()[0]}", file=sys.stderr)


def _steps(bench: Bench, stage: StageConfig, id: str, setting: str, compiled: bool) -> None:
    """Time the steps of a stage, and note what they reach."""
    dtype = runtime.compute_dtype(bench.params.precision)
    model, template = plan_stages.build(bench.params, stage)
    if compiled:
        compile_layers(model)
    work = plan_stages.step_work(bench.params, stage, template, own_history=False)
    batch = noise_batch(bench, stage, template)
    training = Training(model.train(), stage.optim, Path("unused"), bench.params.seed, split=curriculum.split)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found = bench.measure(step=Task(lambda: training.update(batch, dtype)), product=Task(product(dtype)))
    spoken = 0 if batch["words"] is None else batch["words"].input_ids.numel()
    rate, best = work.flops / found["step"], product_flops() / found["product"]

    def note(name: str, samples: np.ndarray, unit: str, what: str, limit: float | None = None) -> None:
        meaning = f"{setting}: {what}"
        bench.results.append(Result(id=f"{id}.{name}", unit=unit, meaning=meaning, limit=limit, **summary(samples)))

    note("tokens", (work.tokens + spoken) / found["step"], "tokens/s", "read and learned from, padding counted")
    note("pictures", work.pictures / found["step"], "images/s", "supervised")
    note("flops", rate / 1e12, "TFLOP/s", "that the model needs")
    note("product", best / 1e12, "TFLOP/s", f"one product of square matrices of {PEAK_SIDE[_device()]} rows")
    note("mfu", rate / best, "share", "what the model needs over one large matrix product; limit: all of it", 1.0)
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**30
        bench.number(f"{id}.memory", memory, "GiB", f"{setting}: peak of the training, on the card")


def compile_layers(model: HistoryMLLM, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let every layer of a model's LLaMA be compiled at its first call.

    Args:
        model: changed in place; what it computes stays the same.
        backend: of `torch.compile`.
    """
    for layer in model.llm.model.layers:
        layer.compile(backend=backend)


def noise_batch(bench: Bench, stage: StageConfig, template: Template) -> dict[str, Any]:
    """A batch of a stage's longest conversations, with noise for features."""
    params, told = bench.params, plan_stages.longest_conversations(bench.params, stage)
    shape = (len(told), len(told[0]), params.tokens_per_image, params.vision.feature_dim)
    return {
        "layout": template.packed(told),
        "features": torch.randn(shape, generator=torch.Generator().manual_seed(params.seed)),  # (B, R, N, D_feature)
        "words": batches.word_batch(params, stage, template, 0, 0) if stage.word_rounds else None,
    }


def product(dtype: torch.dtype) -> Any:
    """A call that multiplies two square matrices."""
    side, place = PEAK_SIDE[_device()], runtime.device()
    first, second = (torch.randn(side, side, device=place).to(dtype) for _ in range(2))
    return lambda: first @ second


def product_flops() -> int:
    """Operations of that call."""
    return 2 * PEAK_SIDE[_device()] ** 3


def _device() -> str:
    return runtime.device().type
