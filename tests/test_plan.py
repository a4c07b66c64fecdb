"""The planner's parts against small models that are measured."""

from pathlib import Path
from typing import Any

import pytest
import seedx_toy
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nmlib import __main__ as cli
from nmlib import batches, config, plan, plan_stages
from nmlib.config import ModelConfig, SeedXConfig
from nmlib.resampler import Resampler
from nmlib.seedx import SeedX

ROOT = Path(__file__).parent.parent
LENGTH, BATCH = 31, 2


FOLDED = 29  # a rank at which every linear layer folds; at 3 none does


def model(layers: int = 2, dropout: float = 0.0, rank: int = 3) -> ModelConfig:
    return ModelConfig(hidden_size=48, intermediate_size=116, layers=layers, heads=4, resampler_heads=4, lora_rank=rank,
                       lora_alpha=3, lora_dropout=dropout, response="polite", markers=False)  # fmt: skip


def tuned(settings: ModelConfig, dtype: torch.dtype = torch.float32) -> SeedX:
    torch.manual_seed(0)
    agent = SeedX(seedx_toy.settings(model=settings))
    agent.add_lora()
    return agent.to(dtype).train()


def read(agent: SeedX) -> torch.Tensor:
    dtype = agent.dtype
    embeds = torch.randn(BATCH, LENGTH, 48, dtype=dtype, requires_grad=True)
    mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    return agent.base_llm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state


def saved_bytes(agent: SeedX) -> int:
    """Bytes that autograd keeps for the backward pass, weights aside, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in agent.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        read(agent)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_a_layer(dtype: torch.dtype, dropout: float) -> None:
    """What one more layer keeps is what the formula says, to the byte."""
    measured = saved_bytes(tuned(model(3, dropout), dtype)) - saved_bytes(tuned(model(2, dropout), dtype))
    planned = BATCH * LENGTH * plan.layer_activation_bytes(model(1, dropout), LENGTH, dtype.itemsize, dtype.itemsize)
    assert measured == planned


def test_activations_of_a_layer_that_folds_lora() -> None:
    """Of LoRA it keeps nothing for a token, and the sums of the weights once."""
    measured = saved_bytes(tuned(model(3, rank=FOLDED))) - saved_bytes(tuned(model(2, rank=FOLDED)))
    sums = 4 * (4 * 48 * 48 + 3 * 48 * 116)
    assert measured - sums == BATCH * LENGTH * plan.layer_activation_bytes(model(1, rank=FOLDED), LENGTH, 4)
    assert plan.layer_activation_bytes(model(1), 5) - plan.layer_activation_bytes(model(1, rank=FOLDED), 5) == 2 * 7 * 3


def test_activations_with_checkpointing() -> None:
    settings = model(5)
    layer = plan.layer_activation_bytes(settings, 100)
    assert plan.activation_bytes(settings, 100, 3, checkpointing=False) == 5 * 3 * 100 * layer
    assert plan.activation_bytes(settings, 100, 3) == 5 * 3 * 100 * 2 * 48 + 3 * 100 * layer


def counted(run: Any) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("rank", [3, FOLDED])
def test_operations_of_the_language_model(rank: int) -> None:
    settings = model(3, rank=rank)
    agent = tuned(settings)
    forward = counted(lambda: read(agent))
    both = counted(lambda: read(agent).sum().backward())
    assert forward == plan.llm_flops(settings, LENGTH, rows=BATCH)
    assert both - forward == plan.llm_flops(settings, LENGTH, backward=True, rows=BATCH)


def test_sums_of_weights_are_made_once_a_pass() -> None:
    folded, plain = model(5, rank=FOLDED), model(5)
    sums = 5 * 2 * FOLDED * (4 * 48 * 48 + 3 * 48 * 116)
    assert 7 * plan.llm_flops(folded, 10) - plan.llm_flops(folded, 10, rows=7) == 6 * sums
    assert 7 * plan.llm_flops(plain, 10) == plan.llm_flops(plain, 10, rows=7)


def test_operations_of_resampler_and_encoder() -> None:
    resampler = Resampler(9, 28, 7, 11)
    run = counted(lambda: resampler(torch.randn(1, 25, 11)))
    assert run == plan.resampler_flops(9, 28, 25, 11)
    vit = seedx_toy.vit()
    run = counted(lambda: vit(torch.randn(1, 3, seedx_toy.SIDE, seedx_toy.SIDE)))
    assert run == plan.vit_flops(seedx_toy.settings())


def test_operations_of_a_step() -> None:
    """One pass over a sample forward and back, the encoder's beside it."""
    settings, template = seedx_toy.settings(), seedx_toy.template()
    torch.manual_seed(0)
    agent, vit = SeedX(settings), seedx_toy.vit()
    agent.add_lora()
    sample = template.edit("make the hat red", "here it is")
    batch = template.batch([sample])
    pictures = torch.randn(2, 3, seedx_toy.SIDE, seedx_toy.SIDE)

    def step() -> None:
        with torch.no_grad():
            features = vit(pictures)
        agent(batch, features[None]).total.backward()

    supervised = int((batch.labels != -100).sum())
    planned = plan.step_flops(settings, len(sample.ids), 1, supervised, checkpointing=False)
    assert counted(step) == pytest.approx(planned, rel=0.02)
    again = plan.step_flops(settings, len(sample.ids), 1, supervised) - planned
    assert again == plan.llm_flops(settings.model, len(sample.ids))


@pytest.mark.parametrize("name", ["base", "rollback"])
def test_operations_of_a_stage_of_the_world(name: str) -> None:
    """Against counted ones: all weights, and LoRA with own predictions in the history; words beside pictures."""
    params = config.load(ROOT / "params" / "smoke.yaml")
    stage = params.stage(name)
    torch.manual_seed(0)
    model, template = plan_stages.build(params, stage)
    work = plan_stages.step_work(params, stage, template)
    longest = max(params.data[name].rounds)
    told = batches.draw(params, name, 0, "train", {"conversations": 24 // longest, "rounds": (longest,)})
    replaced = torch.ones(len(told), longest, dtype=torch.bool) if stage.predicted_history else None
    batch = template.packed(told)
    features = torch.randn(len(told), longest, 16, 32)
    words = batches.word_batch(params, stage, template, 0, 0)
    counted_flops = counted(lambda: model(batch, features, replaced, words=words).total.backward())
    assert counted_flops == pytest.approx(work.flops, rel=0.05)
    assert work.tokens == batch.input_ids.numel() and work.pictures == 24


def test_activations_of_a_stage() -> None:
    """Parts divide them; repeated forward passes leave one layer and the inputs of all."""
    params = config.load(ROOT / "params" / "smoke.yaml")
    stage, settings = params.stage("rollback"), params.model
    work = plan_stages.Work(6, 100, 24, 0)
    layer = plan.layer_activation_bytes(settings, 100)
    assert plan_stages.activation_bytes(settings, stage, work) == 2 * 6 * 100 * layer
    halves = stage.model_copy(update={"optim": stage.optim.model_copy(update={"parts": 4})})
    assert plan_stages.activation_bytes(settings, halves, work) == 2 * 2 * 100 * layer
    again = stage.model_copy(update={"optim": stage.optim.model_copy(update={"activation_checkpointing": True})})
    assert plan_stages.activation_bytes(settings, again, work) == 2 * 6 * 100 * 2 * 64 + 6 * 100 * layer


def test_gpu_is_about_a_hundred_million() -> None:
    params = config.load(ROOT / "params" / "gpu.yaml")
    assert (params.source.image_size, params.tokens_per_image) == (128, 64)
    model, _ = plan_stages.build(params, params.stages[0])
    assert 90e6 < plan_stages.numbers(model)[0] < 110e6


def test_parameters_and_trained_ones() -> None:
    settings = seedx_toy.settings()
    agent = SeedX(settings)
    plain = {name: sum(p.numel() for p in part.parameters()) for name, part in agent.named_children()}
    agent.add_lora()
    trained = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    parts = {part.name: part for part in plan.count_parts(settings)}
    assert parts["language model"].parameters == plain["llm"]
    assert parts["input resampler"].parameters == plain["input_resampler"]
    assert sum(part.trained for part in parts.values()) == trained
    assert parts["LoRA"].trained == sum(p.numel() for n, p in agent.named_parameters() if "lora_" in n)
    assert parts["image encoder"].parameters == sum(p.numel() for p in seedx_toy.vit().parameters())


def test_shapes_on_the_way_of_a_picture() -> None:
    """SEEDX.md section 0."""
    shapes = [shape for _, shape in plan.picture_shapes(SeedXConfig())]
    assert shapes == [
        (1, 3, 448, 448), (1, 256, 4096), (1, 64, 5120), (1, 64, 4096), (1, 64, 4096), (1, 64, 2048), (1, 1280),
    ]  # fmt: skip


def test_bytes() -> None:
    part = plan.Part("x", 1000, 10)
    assert (part.weight_bytes, part.training_bytes) == (2000, 140)
    tokens, states = plan.cache_bytes(SeedXConfig())
    assert tokens == 512 * 1024 and states == 2 * 2 * 40 * 5120 * 66


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", str(ROOT / "params" / "paper.yaml"), "--gpus", "8"])
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "17,798,746,884 with it, LoRA merged" in out and "125,173,760" in out and "671,241,216" in out
    assert "96 samples, at most 98,304 tokens" in out and ": fits" in out
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", str(ROOT / "params" / "paper.yaml"), "--gpus", "1", "--memory", "24"])
    assert "does not fit" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", str(ROOT / "params" / "smoke.yaml")])
    out = capsys.readouterr().out
    assert not caught.value.code and "smoke: one card" in out and "assumed, not measured" in out
    assert sum(line.startswith(("base", "rollback", "paired")) for line in out.splitlines()) == 3


def test_paper_is_the_released_model() -> None:
    settings = config.load(ROOT / "params" / "paper.yaml").seedx
    assert settings is not None
    released = SeedXConfig()
    assert (settings.vision, settings.model.hidden_size, settings.vocabulary) == (released.vision, 5120, 32330)
    assert settings.model == released.model
