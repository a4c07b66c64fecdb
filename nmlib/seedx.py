"""SEED-X at any size: the history-conditioned model with SEED-X's own modules, sizes and interface.

`SeedX` is a `HistoryMLLM` whose parts are laid out like the released agent (`llm`, `input_resampler`,
`output_resampler`, `patch_pos_embed`), so that layouts, caches, losses and LoRA are those of the small model. What
differs: pictures enter as the encoder's 256 tokens and leave as 64, the average of four each; a picture's place
among its tiles is added after the input resampler; the vocabulary has 330 words for images, places and boxes.
Source: SEED-X `src/models/mllm/seed_x.py`, `peft_models.py` (restated in our own words).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from nmlib.config import SeedXConfig
from nmlib.layout import BOI, EOI, Layout, image_token
from nmlib.mllm import HistoryMLLM
from nmlib.resampler import Resampler
from nmlib.seedx_vision import WHOLE, pool_tokens, repeat_tokens

PATCH, END_PATCH, BOX, END_BOX = "<patch>", "</patch>", "<box_start>", "<box_end>"
HEAD_GAIN = 3.0


def added_words(settings: SeedXConfig) -> list[str]:
    """The words SEED-X adds to LLaMA's vocabulary, 330 at full size; their ids are those of the tokenizer's file."""
    images = [image_token(index) for index in range(settings.image_words)]
    places = [f"<loc-{index}>" for index in range(settings.location_words)]
    return [BOI, EOI, PATCH, END_PATCH, *images, *places, BOX, END_BOX]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, settings: SeedXConfig, where: str) -> None:
    """Hold a tokenizer to the vocabulary of the model.

    Raises:
        ValueError: the number of words differs, or added words are missing; names them.
    """
    known = tokenizer.get_vocab()
    missing = [word for word in added_words(settings) if word not in known]
    if missing or len(tokenizer) != settings.vocabulary:
        lacks = f"; it lacks {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}" if missing else ""
        raise ValueError(
            f"{where}: tokenizer has {len(tokenizer)} words, the model has {settings.vocabulary}{lacks}; "
            "take the tokenizer folder that belongs to the weights"
        )


@dataclass
class SeedXLayout(Layout):
    """A batch of SEED-X sequences whose pictures may be tiles.

    Args:
        patch_positions: (C, 2) centre of each history block in its picture, in the order of `history`.
    """

    patch_positions: Tensor
    OF_HISTORY: ClassVar[tuple[str, ...]] = ("history", "patch_positions")


class SeedX(HistoryMLLM):
    """SEED-X's agent.

    Args:
        settings: sizes; the defaults of `SeedXConfig` are the released ones.
    """

    def __init__(self, settings: SeedXConfig) -> None:
        # The parent would build and initialise a small model; this one takes its methods and brings its own parts.
        nn.Module.__init__(self)
        model, feature_dim = settings.model, settings.vision.feature_dim
        self.config, self.settings = settings, model
        self.tokens_per_image, self.feature_dim = settings.queries, feature_dim
        self.llm = LlamaForCausalLM(llama_config(settings))
        self.input_resampler = Resampler(settings.queries, model.hidden_size, model.resampler_heads, feature_dim)
        self.output_resampler = Resampler(settings.queries, feature_dim, model.resampler_heads, model.hidden_size)
        self.copy_gate = None
        self.patch_pos_embed = nn.Parameter(model.hidden_size**-0.5 * torch.randn(4, model.hidden_size))
        nothing = torch.zeros(0, dtype=torch.int64)
        self.register_buffer("marker_ids", nothing, persistent=False)
        self.register_buffer("slot_ids", nothing.clone(), persistent=False)
        self.register_buffer("feature_scale", torch.ones(()), persistent=False)

    def embed_images(self, features: Tensor, rounds: Tensor, positions: Tensor | None = None) -> Tensor:
        """Encoder tokens, or predicted ones as the settings' `history` has it, to history blocks.

        Args:
            features: (C, M, D_feature); predicted tokens (C, N, D_feature) are read as the settings say.
            rounds: (C,), not used: SEED-X does not number its pictures.
            positions: (C, 2) centre of each in its picture; by default the whole picture.

        Returns:
            (C, N, D).
        """
        if features.shape[1] == self.config.queries:
            features = self.to_history(features)
        embeds = self.input_resampler(features.to(self.patch_pos_embed.dtype))  # (C, N, D)
        if positions is None:
            positions = torch.tensor(WHOLE, device=embeds.device).expand(len(features), -1)  # (C, 2)
        corners = torch.cat([positions, 1 - positions], dim=1).to(embeds.dtype) / 2  # (C, 4)
        return embeds + (corners @ self.patch_pos_embed)[:, None]  # (C, N, D)

    def embed(self, layout: Layout, history: Tensor) -> Tensor:
        """Token embeddings (B, T, D) with the slots of history images overwritten by (C, M, D_feature)."""
        positions = layout.patch_positions if isinstance(layout, SeedXLayout) else None
        embeds = self.embed_text(layout.input_ids, layout.rounds)  # (B, T, D)
        images = self.embed_images(history, layout.history[:, 1], positions)  # (C, N, D)
        return embeds.masked_scatter(layout.history_slots[..., None], images.to(embeds.dtype))  # (B, T, D)

    def to_target(self, features: Tensor) -> Tensor:
        """Encoder tokens (Q, M, D_feature) to the average of each four (Q, N, D_feature)."""
        return pool_tokens(features, self.config.queries)  # (Q, N, D_feature)

    def to_history(self, predicted: Tensor) -> Tensor:
        """Predicted tokens (C, N, D_feature) as the input resampler reads them."""
        return repeat_tokens(predicted, self.config.vision.tokens) if self.config.history == "repeat" else predicted

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the weights."""
        return self.patch_pos_embed.dtype

    def restore_buffers(self, device: torch.device | str) -> None:
        """Make anew what no file holds, after the model was built on the meta device."""
        model = self.base_llm.model
        with torch.device(device):
            model.rotary_emb = type(model.rotary_emb)(config=model.config)
        for name in ("marker_ids", "slot_ids"):
            setattr(self, name, torch.zeros(0, dtype=torch.int64, device=device))
        self.feature_scale = torch.ones((), device=device)


def llama_config(settings: SeedXConfig) -> LlamaConfig:
    """LLaMA-2 as SEED-X configures it."""
    model = settings.model
    return LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        max_position_embeddings=settings.max_positions,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]
        use_cache=False,
    )


@torch.no_grad()
def grow_vocabulary(llm: Any, count: int) -> None:
    """Give a plain LLaMA SEED-X's words: fresh input rows are the mean row, fresh output rows three times it.

    Args:
        llm: a causal language model with fewer than `count` words.
        count: words it shall have, 32,330 at full size.
    """
    old = llm.get_input_embeddings().weight.shape[0]
    inputs, outputs = llm.get_input_embeddings().weight.mean(0), llm.lm_head.weight.mean(0)
    llm.resize_token_embeddings(count, mean_resizing=False)
    llm.get_input_embeddings().weight[old:] = inputs
    llm.lm_head.weight[old:] = HEAD_GAIN * outputs


def count_parameters(module: nn.Module, words: Sequence[str] = ("",)) -> int:
    """Numbers in a module's parameters whose name holds one of the words."""
    return sum(p.numel() for name, p in module.named_parameters() if any(word in name for word in words))
