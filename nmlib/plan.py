"""What a training of SEED-X needs, worked out before a machine is rented: numbers, memory, tokens, operations.

Parameters are counted on modules that exist on the meta device only. Activations and operations come from closed
formulas of the sizes, each held to small models that were measured. Memory follows the usual mixed precision: frozen
numbers 2 bytes; trained ones 2 and 2 for the gradient, and 12 for the 32-bit copy and both moments of Adam.
"""

from typing import NamedTuple

import torch
from torch import nn

from nmlib import lora
from nmlib.batches import set_settings
from nmlib.config import ModelConfig, Params, SeedXConfig
from nmlib.resampler import Resampler
from nmlib.seedx import SeedX, count_parameters
from nmlib.seedx_adapter import AdapterResampler, SDXLAdapter
from nmlib.seedx_vision import QwenViT, pool_tokens

WEIGHT, GRADIENT, OPTIMISER = 2, 2, 12  # bytes of a number
PEAK_TFLOPS, UTILISATION = 989.0, 0.4  # an H100's dense bfloat16, and the share of it that is assumed
TOKEN_BYTES = 2  # of a cached number


class Part(NamedTuple):
    """Numbers of a part, and how many of them are trained."""

    name: str
    parameters: int
    trained: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return WEIGHT * self.parameters

    @property
    def training_bytes(self) -> int:
        """Bytes of gradients and optimiser."""
        return (GRADIENT + OPTIMISER) * self.trained


def count_parts(settings: SeedXConfig) -> list[Part]:
    """Parts of SEED-X as it is tuned: LoRA, norms, embeddings, head and resamplers train, the rest is frozen."""
    with torch.device("meta"):
        agent, vit = SeedX(settings), QwenViT(settings.vision)
    agent.add_lora()
    lora = count_parameters(agent.llm, ["lora_"])
    copies = count_parameters(agent.llm, [".original_module."])  # norms that peft keeps beside the trained ones
    llm = count_parameters(agent.llm) - lora - copies
    return [
        Part("image encoder", count_parameters(vit), 0),
        Part("language model", llm, _trained(agent.llm) - lora),
        Part("LoRA", lora, lora),
        *(Part(name.replace("_", " "), count_parameters(module), _trained(module))
          for name, module in agent.named_children() if name.endswith("_resampler")),
        Part("patch positions", agent.patch_pos_embed.numel(), agent.patch_pos_embed.numel()),
    ]  # fmt: skip


def count_adapter() -> Part:
    """SEED-X's released detokenizer, which a training of the agent does not need."""
    with torch.device("meta"):
        return Part("SDXL adapter", count_parameters(SDXLAdapter()), 0)


def picture_shapes(settings: SeedXConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Shapes on the way of one picture into SEED-X and out of it, from modules that exist on the meta device only."""
    model, vision, queries = settings.model, settings.vision, settings.queries
    with torch.device("meta"), torch.no_grad():
        picture = torch.empty(1, 3, vision.image_size, vision.image_size)
        encoded = QwenViT(vision)(picture)  # (1, M, D_feature)
        slots = Resampler(queries, model.hidden_size, model.resampler_heads, vision.feature_dim)(encoded)  # (1, N, D)
        predicted = Resampler(queries, vision.feature_dim, model.resampler_heads, model.hidden_size)(slots)
        context, pooled = AdapterResampler(vision.feature_dim)(predicted)
    found = {
        "picture": picture,
        "tokens of the image encoder": encoded,
        "history slots of the language model": slots,
        "predicted tokens, out of the query slots": predicted,
        "their target, four tokens averaged": pool_tokens(encoded, queries),
        "SDXL adapter: context": context,
        "SDXL adapter: pooled vector": pooled,
    }
    return [(name, tuple(tensor.shape)) for name, tensor in found.items()]


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------------
# memory of activations


def layer_activation_bytes(model: ModelConfig, length: int, itemsize: int = 2, mask_itemsize: int = 1) -> int:
    """Bytes that one layer of LLaMA with LoRA keeps of one token for its backward pass, under an explicit mask.

    Args:
        model: sizes.
        length: tokens of the sequence; every token has a row of the mask.
        itemsize: bytes of a number, 2 in bfloat16.
        mask_itemsize: bytes of an entry of a dropout mask: 1 on a GPU, a whole number on the CPU.
    """
    width, inner = model.hidden_size, model.intermediate_size
    narrow = sum(model.lora_rank for shape in lora_shapes(model) if not folded(model, *shape))
    kept = itemsize * (8 * width + 4 * inner + narrow)
    if model.lora_dropout:  # each of the seven drops others, so that they share no input
        kept += (itemsize + mask_itemsize) * (6 * width + inner) - itemsize * (2 * width + inner)
    norms = 2 * (4 * width + 4)  # in 32 bit, with one root each
    return kept + norms + 4 * model.heads + itemsize * length


def activation_bytes(model: ModelConfig, length: int, batch: int = 1, checkpointing: bool = True) -> int:
    """Bytes of the language model's activations: every layer's, or each layer's input and one layer's at a time."""
    layer = batch * length * layer_activation_bytes(model, length)
    inputs = batch * length * 2 * model.hidden_size
    return model.layers * inputs + layer if checkpointing else model.layers * layer


def cache_bytes(settings: SeedXConfig) -> tuple[int, int]:
    """Bytes that a picture of the history takes: as predicted tokens, and as keys and values of its block."""
    model = settings.model
    block = settings.queries + 2
    tokens = TOKEN_BYTES * settings.queries * settings.vision.feature_dim
    return tokens, TOKEN_BYTES * 2 * model.layers * model.hidden_size * block


# ---------------------------------------------------------------------------------------------------------
# operations: a product of an (m, k) and a (k, n) matrix counts 2*m*k*n


def lora_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers of one layer of LLaMA, all of which LoRA tunes."""
    width, inner = model.hidden_size, model.intermediate_size
    return [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]


def folded(model: ModelConfig, inputs: int, outputs: int) -> bool:
    """Whether a linear layer adds LoRA to its weight first (`lora.FoldedLinear`)."""
    return not model.lora_dropout and lora.folds(model.lora_rank, inputs, outputs)


def linear_flops(model: ModelConfig, inputs: int, outputs: int, tokens: int, backward: bool) -> int:
    """Operations of a linear layer with LoRA in one pass; backward through frozen weights costs half."""
    weight, pair = 2 * tokens * inputs * outputs, 2 * tokens * model.lora_rank * (inputs + outputs)
    if not folded(model, inputs, outputs):
        return weight + (2 if backward else 1) * pair
    return (2 if backward else 1) * (weight + 2 * model.lora_rank * inputs * outputs)


def llm_flops(model: ModelConfig, length: int, backward: bool = False, rows: int = 1) -> int:
    """Operations of LLaMA with LoRA, without the head, in a pass over sequences of one length.

    Args:
        model: sizes.
        length: tokens of a sequence.
        backward: of the backward pass, else of the forward pass.
        rows: sequences.
    """
    attention = (2 if backward else 1) * 4 * rows * length**2 * model.hidden_size
    linears = sum(linear_flops(model, *shape, rows * length, backward) for shape in lora_shapes(model))
    return model.layers * (linears + attention)


def vit_flops(settings: SeedXConfig) -> int:
    """Operations of encoding one picture."""
    vision = settings.vision
    patches, width, dim = (vision.image_size // vision.patch_size) ** 2, vision.width, vision.feature_dim
    stem = 2 * patches * 3 * vision.patch_size**2 * width
    layer = 2 * patches * (4 * width**2 + 2 * width * vision.mlp_size) + 4 * patches**2 * width
    pool = resampler_flops(vision.tokens, dim, patches, width)
    return stem + vision.layers * layer + pool + 2 * vision.tokens * dim**2


def resampler_flops(queries: int, width: int, inputs: int, input_width: int) -> int:
    """Operations of a resampler on one picture."""
    projections = 2 * inputs * (input_width * width + 2 * width**2) + 4 * queries * width**2
    return projections + 4 * queries * inputs * width


def step_flops(settings: SeedXConfig, length: int, history: int, supervised: int, checkpointing: bool = True) -> int:
    """Operations of training on one sample.

    Args:
        settings: sizes.
        length: tokens.
        history: pictures that are read; one more is made.
        supervised: tokens with a label.
        checkpointing: forward passes of the language model are repeated.
    """
    model, vision = settings.model, settings.vision
    forward, backward = llm_flops(model, length), llm_flops(model, length, backward=True)
    head = 3 * 2 * supervised * model.hidden_size * settings.vocabulary
    read = resampler_flops(settings.queries, model.hidden_size, vision.tokens, vision.feature_dim)
    made = resampler_flops(settings.queries, vision.feature_dim, settings.queries, model.hidden_size)
    agent = forward * (1 + checkpointing) + backward + head + 3 * (history * read + made)
    return agent + (history + 1) * vit_flops(settings)


# ---------------------------------------------------------------------------------------------------------
# the report


def report(params: Params, settings: SeedXConfig, gpus: int, card_gb: float) -> str:
    """The plan in words and tables.

    Args:
        params: batch and rounds of its last stage are taken.
        settings: sizes.
        gpus: cards that share weights and batch.
        card_gb: memory of a card.
    """
    stage = params.stages[-1]
    pictures = max(length for name in stage.data for length in set_settings(params, name).rounds)
    samples, length = stage.optim.batch_size, min(settings.max_length, settings.max_positions)
    own = -(-samples // gpus)
    lines = [f"{params.name}: {gpus} cards of {card_gb:g} GB, stage {stage.name!r}", "", *_weight_lines(settings, gpus)]
    parts = count_parts(settings)
    whole = sum(part.weight_bytes + part.training_bytes for part in parts)
    activations, logits = _activation_lines(settings, length, own)
    lines += ["", *activations, "", *_work_lines(settings, samples, length, pictures, gpus)]
    tokens, states = cache_bytes(settings)
    lines += [
        "",
        f"a picture in the cache: {tokens / 2**20:.1f} MiB as tokens, {states / 2**20:.1f} MiB as keys and values",
    ]
    needed = whole / gpus + activation_bytes(settings.model, length) + logits
    verdict = "fits" if needed < card_gb * 1e9 else "does not fit; take more cards or shorter samples"
    lines.append(f"a card needs {needed / 1e9:.1f} GB with one sample at a time, sharded over {gpus}: {verdict}")
    return "\n".join(lines)


def _weight_lines(settings: SeedXConfig, gpus: int) -> list[str]:
    parts = count_parts(settings)
    rows = [*parts, Part("in all", sum(p.parameters for p in parts), sum(p.trained for p in parts))]
    lines = [f"{'part':18}{'parameters':>16}{'trained':>14}{'weights':>11}{'training':>11}{f'a card of {gpus}':>14}"]
    for row in rows:
        share = (row.weight_bytes + row.training_bytes) / gpus
        lines.append(
            f"{row.name:18}{row.parameters:>16,}{row.trained:>14,}{row.weight_bytes / 1e9:>8.2f} GB"
            f"{row.training_bytes / 1e9:>8.2f} GB{share / 1e9:>11.2f} GB"
        )
    adapter = count_adapter()
    released = rows[-1].parameters + adapter.parameters - next(p.parameters for p in parts if p.name == "LoRA")
    lines.append(f"{adapter.name:18}{adapter.parameters:>16,}   makes pixels; {released:,} with it, LoRA merged")
    return lines


def _activation_lines(settings: SeedXConfig, length: int, own: int) -> tuple[list[str], int]:
    logits = length * settings.vocabulary * (2 + 4 + 4)  # at most: as if every token were supervised
    one = activation_bytes(settings.model, length)
    full = activation_bytes(settings.model, length, checkpointing=False)
    return [
        f"activations of a sample of {length:,} tokens: {one / 1e9:.2f} GB with checkpointing, "
        f"{full / 1e9:.1f} GB without",
        f"activations of {own} samples at once: {own * one / 1e9:.1f} GB with checkpointing",
        f"logits of a sample: at most {logits / 1e9:.2f} GB",
    ], logits


def _work_lines(settings: SeedXConfig, samples: int, length: int, pictures: int, gpus: int) -> list[str]:
    flops = samples * step_flops(settings, length, pictures - 1, length // 8)
    seconds = flops / (gpus * PEAK_TFLOPS * 1e12 * UTILISATION)
    return [
        f"a step: {samples} samples, at most {samples * length:,} tokens, {samples * pictures:,} pictures encoded",
        f"operations: {flops:.2e} a step with checkpointing, one token in eight supervised",
        f"time: {seconds:.1f} s a step if {UTILISATION:.0%} of {PEAK_TFLOPS:g} TFLOP/s a card are reached (assumed)",
    ]
