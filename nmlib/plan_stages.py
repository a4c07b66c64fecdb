"""What the training of a stage in a world needs, worked out before it runs: numbers, memory, tokens, operations.

`plan` does it for SEED-X. Here the modules are small enough to be built, and the tokens of a step are counted on
conversations as the stage reads them. Weights are kept in 32 bits: 4 bytes, and for a trained one 4 for the gradient
and 8 for both moments of Adam; products and kept activations are taken in 16 bits, as on a card.
"""

from typing import NamedTuple

import torch
from torch import nn

from nmlib import batches, curriculum, data, layout
from nmlib.config import ModelConfig, Params, StageConfig
from nmlib.conversation import Conversation
from nmlib.detokenizer import Detokenizer
from nmlib.layout import IGNORE, Layout, Template
from nmlib.mllm import HistoryMLLM
from nmlib.plan import PEAK_TFLOPS, UTILISATION, layer_activation_bytes, llm_flops, resampler_flops
from nmlib.vision import VisionTransformer

FROZEN_BYTES, TRAINED_BYTES = 4, 16


class Work(NamedTuple):
    """What the largest step of a stage does: rows and tokens of its layout with padding, pictures, operations."""

    rows: int
    length: int
    pictures: int
    flops: int

    @property
    def tokens(self) -> int:
        """Tokens with padding."""
        return self.rows * self.length


def build(params: Params, stage: StageConfig) -> tuple[HistoryMLLM, Template]:
    """The model of a stage with fresh weights, and LoRA where the stage trains it."""
    settings, speaker = params.stage_model(stage), data.speaker(params)
    tokens = params.tokens_per_image
    words = layout.build_tokenizer(speaker.attributes, tokens, settings.max_rounds, speaker.names)
    model, template = curriculum.new_model(settings, words, tokens, params.vision.feature_dim)
    if stage.trainable == "lora":
        model.add_lora()
    return model, template


def count_modules(params: Params, model: HistoryMLLM) -> dict[str, nn.Module]:
    """The modules of a params file by name; encoder and detokenizer with fresh weights."""
    size, tokens, width = params.source.image_size, params.tokens_per_image, params.vision.feature_dim
    gate = {} if model.copy_gate is None else {"copy gate": model.copy_gate}
    return {
        "image encoder": VisionTransformer(params.vision, size),
        "language model": model.llm,
        "input resampler": model.input_resampler,
        "output resampler": model.output_resampler,
        **gate,
        "detokenizer": Detokenizer(params.detokenizer, size, tokens, width),
    }


def numbers(module: nn.Module) -> tuple[int, int]:
    """Parameters of a module, and those that are trained."""
    counts = [(p.numel(), p.numel() * p.requires_grad) for p in module.parameters()]
    return sum(count for count, _ in counts), sum(trained for _, trained in counts)


def pass_flops(settings: ModelConfig, layout: Layout, vocabulary: int, trainable: str) -> tuple[int, int]:
    """Operations of the language model and its head on a batch: forward, and backward."""
    rows, length = layout.input_ids.shape
    head = 2 * int((layout.labels != IGNORE).sum()) * settings.hidden_size * vocabulary
    if trainable == "all":
        forward = llm_flops(settings.model_copy(update={"lora_rank": 0}), length, rows=rows)
        return forward + head, 2 * (forward + head)
    there, back = (llm_flops(settings, length, backward, rows) for backward in (False, True))
    return there + head, back + 2 * head


def longest_conversations(params: Params, stage: StageConfig) -> list[Conversation]:
    """A batch of a stage's longest conversations, without pictures."""
    name, longest = max(
        ((name, max(batches.set_settings(params, name).rounds)) for name in stage.data), key=lambda pair: pair[1]
    )
    count = max(1, stage.optim.batch_size // longest)
    return batches.draw(params, name, 0, "train", {"conversations": count, "rounds": (longest,)})


def step_work(params: Params, stage: StageConfig, template: Template, own_history: bool = True) -> Work:
    """The work of a step with conversations of the longest length.

    Args:
        params: define the data sets.
        stage: names its mix of them.
        template: lays conversations out.
        own_history: count the pass that predicts pictures for the history, which the end of a stage makes.
    """
    settings, words = params.stage_model(stage), len(template.tokenizer)
    repeated = stage.optim.activation_checkpointing
    if not stage.data:
        spoken = batches.word_batch(params, stage, template, 0, 0)
        there, back = pass_flops(settings, spoken, words, stage.trainable)
        return Work(spoken.input_ids.shape[0], spoken.input_ids.shape[1], 0, there * (1 + repeated) + back)
    told = longest_conversations(params, stage)
    layout = template.packed(told) if stage.supervision == "packed" else template.prefix(told)
    forward, backward = pass_flops(settings, layout, words, stage.trainable)
    tokens, width = params.tokens_per_image, params.vision.feature_dim
    read = len(layout.history) * resampler_flops(tokens, settings.hidden_size, tokens, width)
    made = len(layout.queries) * resampler_flops(tokens, width, tokens, settings.hidden_size)
    flops = forward * (1 + repeated) + backward + 3 * (read + made)
    if own_history and stage.predicted_history:
        flops += forward + read + made
    if stage.word_rounds:
        spoken = batches.word_batch(params, stage, template, 0, 0)
        there, back = pass_flops(settings, spoken, words, stage.trainable)
        flops += there * (1 + repeated) + back
    return Work(layout.input_ids.shape[0], layout.input_ids.shape[1], len(told) * len(told[0]), flops)


def activation_bytes(settings: ModelConfig, stage: StageConfig, work: Work) -> int:
    """Bytes of the language model's activations in a step read in `optim.parts`, in 16-bit numbers."""
    kept = settings if stage.trainable == "lora" else settings.model_copy(update={"lora_rank": 0})
    rows = -(-work.rows // stage.optim.parts)
    layer = rows * work.length * layer_activation_bytes(kept, work.length)
    inputs = rows * work.length * 2 * settings.hidden_size
    return settings.layers * inputs + layer if stage.optim.activation_checkpointing else settings.layers * layer


def report(params: Params) -> str:
    """The plan of every stage in words and tables, on one card.

    Args:
        params: of a world; one for SEED-X has `plan.report`.
    """
    torch.manual_seed(0)
    base, _ = build(params, params.stages[0])
    lines = [f"{params.name}: one card", "", f"{'part':18}{'parameters':>14}"]
    lines += [f"{name:18}{numbers(part)[0]:>14,}" for name, part in count_modules(params, base).items()]
    lines += [
        "",
        f"{'stage':9}{'trained':>12}{'weights':>9}{'activations':>13}{'tokens':>8}{'a step':>14}{'the stage':>13}"
        f"{'minutes':>8}",
    ]
    built: dict[tuple[ModelConfig, str], tuple[HistoryMLLM, Template]] = {}
    for stage in params.stages:
        kind = (params.stage_model(stage), stage.trainable)
        model, template = built[kind] = built.get(kind) or build(params, stage)
        work = step_work(params, stage, template)
        parameters, trained = numbers(model)
        weights = FROZEN_BYTES * (parameters - trained) + TRAINED_BYTES * trained
        kept = activation_bytes(params.stage_model(stage), stage, work)
        flops = work.flops * stage.optim.steps
        minutes = flops / (PEAK_TFLOPS * 1e12 * UTILISATION) / 60
        lines.append(
            f"{stage.name:9}{trained:>12,}{weights / 1e9:>6.2f} GB{kept / 1e9:>10.2f} GB{work.tokens:>8,}"
            f"{work.flops / 1e12:>8.1f} TFLOP{flops / 1e15:>7.1f} PFLOP{minutes:>8.1f}"
        )
    lines += [
        "",
        "a step: the longest conversations, with padding and predictions for the history",
        f"minutes: of products, if {UTILISATION:.0%} of {PEAK_TFLOPS:g} TFLOP/s are reached (assumed, not measured);",
        "drawing pictures, encoder, detokenizer and the notebooks come on top",
    ]
    return "\n".join(lines)
