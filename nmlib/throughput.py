"""How fast a step of training is: tokens a second, and the share of the machine's arithmetic that the model gets."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nmlib import batches, curriculum, plan_stages, runtime
from nmlib.bench_setup import Bench
from nmlib.config import StageConfig
from nmlib.layout import Template
from nmlib.timing import Result, Task, summary
from nmlib.train import Training

PEAK_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices whose product is taken for the machine's best


def throughput(bench: Bench) -> None:
    """A step of the first stage that reads pictures, packed, in its own batch size; beside one large matrix product.

    Operations are those that the model needs (`plan_stages.step_work`), not those that are done. The conversations are
    the stage's longest, their features noise: what a step costs does not depend on them.
    """
    stage = next(stage for stage in bench.params.stages if stage.data)
    dtype = runtime.compute_dtype(bench.params.precision)
    model, template = plan_stages.build(bench.params, stage)
    work = plan_stages.step_work(bench.params, stage, template, own_history=False)
    batch = noise_batch(bench, stage, template)
    training = Training(model.train(), stage.optim, Path("unused"), bench.params.seed, split=curriculum.split)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found = bench.measure(step=Task(lambda: training.update(batch, dtype)), product=Task(product(dtype)))
    spoken = 0 if batch["words"] is None else batch["words"].input_ids.numel()
    rate, best = work.flops / found["step"], product_flops() / found["product"]
    _note(bench, "tokens", (work.tokens + spoken) / found["step"], "tokens/s", "read and learned from, padding counted")
    _note(bench, "pictures", work.pictures / found["step"], "images/s", "supervised")
    _note(bench, "flops", rate / 1e12, "TFLOP/s", "that the model needs")
    _note(bench, "product", best / 1e12, "TFLOP/s", f"one product of square matrices of {PEAK_SIDE[_device()]} rows")
    meaning = "what the model needs over what one large matrix product reaches in the same run; limit: all of it"
    bench.results.append(Result(id="throughput.mfu", unit="share", limit=1.0, meaning=meaning, **summary(rate / best)))
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**30
        bench.number("throughput.memory", memory, "GiB", "peak of the training, on the card")


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


def _note(bench: Bench, name: str, samples: np.ndarray, unit: str, meaning: str) -> None:
    what = f"training in packed sequences: {meaning}"
    bench.results.append(Result(id=f"throughput.{name}", unit=unit, meaning=what, **summary(samples)))
