"""What plain products save in a step of training on a CPU: in attention, and in layers with LoRA."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from nmlib import lora, plan, runtime
from nmlib.attention import attend
from nmlib.bench_setup import Bench
from nmlib.timing import Task

ROWS, LENGTH = 12, 240  # about what a step of `params/cpu.yaml` reads


def products(bench: Bench) -> None:
    """Attention of a layer, fused and as products; all seven layers with LoRA, as peft has them and folded.

    Forward and backward, in the number type of training, over rows of the size that a stage reads. On a GPU attention
    stays fused and nothing is measured.
    """
    if torch.cuda.is_available():
        return
    ways = {"fused": attention_pass(bench, _fused), "products": attention_pass(bench, _plain)}
    found = bench.measure(**{name: Task(run) for name, run in ways.items()})
    meaning = f"attention of {ROWS} rows of {LENGTH} tokens, forward and backward, fused over products"
    bench.ratio("products.attention", found["fused"], found["products"], None, meaning)

    model = bench.params.model
    layers = {"apart": lora_pass(bench, Linear), "folded": lora_pass(bench, lora.FoldedLinear)}
    found = bench.measure(**{name: Task(run) for name, run in layers.items()})
    apart = [2 * m * n + 3 * model.lora_rank * (m + n) for m, n in plan.lora_shapes(model)]
    best = [min(cost, 3 * m * n) for cost, (m, n) in zip(apart, plan.lora_shapes(model), strict=True)]
    meaning = "layers with LoRA, forward and backward, A and B apart over folded; limit: ratio of operations"
    bench.ratio("products.lora", found["apart"], found["folded"], sum(apart) / sum(best), meaning)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return attend(SimpleNamespace(), query, key, value, mask, query.shape[-1] ** -0.5)[0]


def attention_pass(bench: Bench, way: Callable[..., Tensor]) -> Callable[[], None]:
    """A call that computes attention of one layer under a causal mask, and its gradients."""
    heads, width = bench.params.model.heads, bench.params.model.hidden_size
    dtype = runtime.compute_dtype(bench.params.precision)
    shape = (ROWS, heads, LENGTH, width // heads)
    states = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    mask = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool).tril()

    def run() -> None:
        mixed = way(*states, mask)
        torch.autograd.grad(mixed, states, torch.ones_like(mixed))

    return run


def lora_pass(bench: Bench, kind: type[Linear]) -> Callable[[], None]:
    """A call that computes all linear layers of one layer of LLaMA with LoRA, and their gradients."""
    settings, dtype = bench.params.model, runtime.compute_dtype(bench.params.precision)
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, init_lora_weights=False)
    pairs = []
    for inputs, outputs in plan.lora_shapes(settings):
        base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        layer = kind(base, "default", config=config, r=settings.lora_rank, lora_alpha=settings.lora_alpha)
        pairs.append((layer, torch.randn(ROWS, LENGTH, inputs, requires_grad=True)))

    def run() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            outputs = [layer(given).sum() for layer, given in pairs]
        torch.stack(outputs).sum().backward()
        for layer, given in pairs:
            layer.zero_grad()
            given.grad = None

    return run
