"""The history-conditioned multimodal language model and its losses.

What differs from a textbook language model:
- image features enter through `input_resampler` at the N slots of each history block;
- the N query tokens of a block are ordinary vocabulary rows; the hidden states at their slots leave through
  `output_resampler` and are regressed on the frozen encoder's features;
- with markers, every word and every history token also carries the number of its round, and history tokens their
  slot, so that "#2" in a text finds round 2, and the n-th query its n-th token, by content; and the queries start
  from the history tokens of the picture that the reply names, so that what an edit leaves alone need not be looked up;
- with a copy gate, each predicted token is mixed with that picture's token, as much as a learned number in 0..1 says:
  what an edit leaves alone is carried on and not drawn again, so that it wears out less over many rounds;
- in training, history images can be replaced by the model's own predictions.
Module names are SEED-X's (`llm`, `input_resampler`, `output_resampler`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nmlib import attention, lora
from nmlib.config import ModelConfig
from nmlib.layout import IGNORE, Layout
from nmlib.resampler import Resampler

WORD_STD = 0.05
MATCH_GAIN = 1.7


class Losses(NamedTuple):
    """Losses of a batch; `total` is the weighted sum, `words` the text loss of conversations without pictures."""

    total: Tensor
    text: Tensor
    image: Tensor
    words: Tensor


class Whole(NamedTuple):
    """How much a whole batch supervises: words of replies, tokens of pictures, words beside pictures.

    The losses of a part of the batch are divided by these numbers and not by its own, so that the losses of all parts
    add up to those of the batch, however it is cut.
    """

    text: int
    image: int
    words: int

    @classmethod
    def of(cls, layout: Layout | None, words: Layout | None) -> "Whole":
        """Count what a batch supervises."""
        told, spoken = (0 if part is None else int((part.labels != IGNORE).sum()) for part in (layout, words))
        return cls(told, 0 if layout is None else int(layout.query_slots.sum()), spoken)


class Output(NamedTuple):
    """What a forward pass gives, in the order of `layout.queries`.

    Args:
        images: (Q, N, D_feature) predicted pictures.
        logits: (L, V) at the supervised words.
        drawn: (Q, N, D_feature) the same pictures before anything is kept of those they start from.
        attentions: of every layer, where asked for.
    """

    images: Tensor
    logits: Tensor
    drawn: Tensor
    attentions: Sequence[Tensor] | None = None


class HistoryMLLM(nn.Module):
    """LLaMA that reads the whole history of a conversation and predicts image features.

    Args:
        settings: sizes and loss weights.
        vocab_size: words of the tokenizer.
        tokens_per_image: N.
        feature_dim: width of an image feature.
        marker_ids: vocabulary id of the marker of round 0, 1, ...; empty without markers.
        slot_ids: vocabulary ids of the N query tokens; empty without markers.
        pad_token_id: id of padding.
    """

    def __init__(
        self,
        settings: ModelConfig,
        *,
        vocab_size: int,
        tokens_per_image: int,
        feature_dim: int,
        marker_ids: Sequence[int],
        slot_ids: Sequence[int],
        pad_token_id: int = 0,
    ) -> None:
        super().__init__()
        self.settings, self.tokens_per_image, self.feature_dim = settings, tokens_per_image, feature_dim
        self.llm: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=settings.hidden_size,
                intermediate_size=settings.intermediate_size,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                max_position_embeddings=8192,
                pad_token_id=pad_token_id,
                initializer_range=WORD_STD,
                attn_implementation=attention.LANGUAGE,  # type: ignore[call-arg]
                use_cache=False,
            )
        )
        heads = settings.resampler_heads
        self.input_resampler = Resampler(tokens_per_image, settings.hidden_size, heads, feature_dim)
        self.output_resampler = Resampler(tokens_per_image, feature_dim, heads, settings.hidden_size)
        self.copy_gate = nn.Linear(settings.hidden_size, 1) if settings.copy_gate else None
        if self.copy_gate is not None:
            nn.init.zeros_(self.copy_gate.weight)
            nn.init.zeros_(self.copy_gate.bias)
        self.input_resampler.start_at_own_position()
        self.output_resampler.start_at_own_position()
        # A fresh resampler speaks with unit variance: beside it words would drown, and with them the instruction.
        with torch.no_grad():
            self.input_resampler.attn.out_proj.weight.mul_(WORD_STD)
        self._start_by_matching()
        self.marker_ids: Tensor
        self.slot_ids: Tensor
        self.feature_scale: Tensor
        self.register_buffer("marker_ids", torch.tensor(list(marker_ids), dtype=torch.int64), persistent=False)
        self.register_buffer("slot_ids", torch.tensor(list(slot_ids), dtype=torch.int64), persistent=False)
        self.register_buffer("feature_scale", torch.ones(tokens_per_image, feature_dim))

    @torch.no_grad()
    def _start_by_matching(self) -> None:
        """Initialise queries and keys alike, so that a token looks first for tokens like itself.

        "Before you changed the hat" is answered by finding where the hat was spoken of. A large language model has
        learned to look for what it stands on; a small one would need most of its training to (the initialisation
        of Trockman and Kolter, arXiv 2305.09828).
        """
        for layer in self.base_llm.model.layers:
            key = layer.self_attn.k_proj.weight.mul_(MATCH_GAIN)
            layer.self_attn.q_proj.weight.copy_(key)

    def add_lora(self) -> None:
        """Freeze the language model but for LoRA, norms, embeddings and head; resamplers stay trainable."""
        self.llm = lora.add(self.llm, self.settings)
        self.base_llm.get_input_embeddings().weight.requires_grad_(True)
        self.base_llm.lm_head.weight.requires_grad_(True)

    def merge_lora(self) -> None:
        """Fold LoRA into the weights, so that the model is a plain LLaMA again."""
        self.llm = self.llm.merge_and_unload()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def has_lora(self) -> bool:
        """Whether LoRA is attached."""
        return hasattr(self.llm, "peft_config")

    @property
    def base_llm(self) -> LlamaForCausalLM:
        """The LLaMA itself, with or without LoRA around it."""
        return self.llm.get_base_model() if self.has_lora else self.llm

    def embed_text(self, input_ids: Tensor, rounds: Tensor) -> Tensor:
        """Words (B, T) of rounds (B, T) to embeddings (B, T, D)."""
        words = self.base_llm.get_input_embeddings()
        embeds = words(input_ids)  # (B, T, D)
        return embeds + words(self.marker_ids[rounds]) if len(self.marker_ids) else embeds

    def embed_images(self, features: Tensor, rounds: Tensor) -> Tensor:
        """History features (C, N, D_feature) of rounds (C,) to embeddings (C, N, D)."""
        embeds = self.input_resampler(features)  # (C, N, D)
        if len(self.marker_ids):
            words = self.base_llm.get_input_embeddings()
            embeds = embeds + words(self.marker_ids[rounds])[:, None] + words(self.slot_ids)
        return embeds

    def embed_queries(self, query_ids: Tensor, images: Tensor, bases: Tensor) -> Tensor:
        """Embeddings of query blocks.

        Args:
            query_ids: (Q, N) ids of the query tokens.
            images: (C, N, D) embedded history blocks.
            bases: (Q,) the history block that each query block starts from, -1 for none.

        Returns:
            (Q, N, D).
        """
        embeds = self.base_llm.get_input_embeddings()(query_ids)  # (Q, N, D)
        if len(self.marker_ids) and len(images):
            embeds = embeds + images[bases.clamp_min(0)] * (bases >= 0)[:, None, None]
        return embeds

    def kept(self, hidden_states: Tensor) -> Tensor:
        """How much of the picture it starts from each token keeps: (Q, N, D) at the query slots to (Q, N) in 0..1.

        Raises:
            ValueError: the model has no copy gate.
        """
        if self.copy_gate is None:
            raise ValueError("this model draws every token anew: its settings say copy_gate: false")
        return self.copy_gate(hidden_states).squeeze(-1).sigmoid()  # (Q, N)

    def keep(self, drawn: Tensor, hidden_states: Tensor, history: Tensor, bases: Tensor) -> Tensor:
        """Carry on what an edit leaves alone: predicted features mixed with those of the picture that the reply names.

        A gate for each token decides, as pointer-generator networks copy words (See et al., arXiv 1704.04368).

        Args:
            drawn: (Q, N, D_feature) predicted features.
            hidden_states: (Q, N, D) at the query slots.
            history: (C, N, D_feature) features of the history blocks.
            bases: (Q,) the history block that each query block starts from, -1 for none.

        Returns:
            (Q, N, D_feature).
        """
        if self.copy_gate is None or not len(history):
            return drawn
        kept = self.kept(hidden_states) * (bases >= 0)[:, None]  # (Q, N)
        return torch.lerp(drawn, history[bases.clamp_min(0)].to(drawn.dtype), kept[..., None])  # (Q, N, D_feature)

    def draw(self, hidden_states: Tensor, history: Tensor, bases: Tensor) -> Tensor:
        """Features (Q, N, D_feature) of pictures from hidden states at their query slots; arguments as in `keep`."""
        return self.keep(self.output_resampler(hidden_states), hidden_states, history, bases)

    def embed(self, layout: Layout, history: Tensor) -> Tensor:
        """Token embeddings with the slots of images overwritten.

        Args:
            layout: the batch.
            history: (C, N, D_feature) features in the order of `layout.history`.

        Returns:
            (B, T, D).
        """
        embeds = self.embed_text(layout.input_ids, layout.rounds)  # (B, T, D)
        images = self.embed_images(history, layout.history[:, 1])  # (C, N, D)
        query_ids = layout.input_ids[layout.query_slots].unflatten(0, (-1, self.tokens_per_image))  # (Q, N)
        queries = self.embed_queries(query_ids, images, layout.bases)  # (Q, N, D)
        embeds = embeds.masked_scatter(layout.query_slots[..., None], queries.to(embeds.dtype))
        return embeds.masked_scatter(layout.history_slots[..., None], images.to(embeds.dtype))  # (B, T, D)

    def to_target(self, features: Tensor) -> Tensor:
        """What the queries shall predict of an image's features; here the features themselves."""
        return features

    def to_history(self, predicted: Tensor) -> Tensor:
        """A predicted image in the form in which features enter the history; here as it is."""
        return predicted

    def predict(self, layout: Layout, history: Tensor, output_attentions: bool = False) -> Output:
        """Image features at the query slots and logits at the supervised text slots."""
        layout, history = layout.to(self.device), history.to(self.device)
        embeds, mask = self.embed(layout, history), layout.attention_mask()
        implementation = self.base_llm.config._attn_implementation
        if output_attentions:  # only the eager path keeps them, and its mask is added to the scores
            mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, torch.finfo(embeds.dtype).min)
            self.base_llm.set_attn_implementation("eager")
        try:
            result = self.base_llm.model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=layout.position_ids,
                use_cache=False,
                output_attentions=output_attentions,
            )
        finally:
            if output_attentions:
                self.base_llm.set_attn_implementation(implementation)
        hidden_states = result.last_hidden_state  # (B, T, D)
        queries = hidden_states[layout.query_slots].unflatten(0, (-1, self.tokens_per_image))  # (Q, N, D)
        logits = self.base_llm.lm_head(hidden_states[layout.labels != IGNORE])  # (L, V)
        drawn = self.output_resampler(queries)  # (Q, N, D_feature)
        images = self.keep(drawn, queries, history, layout.bases)  # (Q, N, D_feature)
        return Output(images, logits, drawn, result.attentions)

    def read_words(self, layout: Layout) -> Tensor:
        """Hidden states (B, T, D) of a batch laid out without pictures."""
        layout = layout.to(self.device)
        return self.base_llm.model(
            inputs_embeds=self.embed_text(layout.input_ids, layout.rounds),
            attention_mask=layout.attention_mask(),
            position_ids=layout.position_ids,
            use_cache=False,
        ).last_hidden_state

    def text_loss(self, layout: Layout, count: int | None = None) -> Tensor:
        """Cross-entropy of the replies of a batch without pictures, over `count` or its own supervised words."""
        supervised = layout.labels != IGNORE  # (B, T)
        logits = self.base_llm.lm_head(self.read_words(layout)[supervised])  # (L, V)
        return _cross_entropy(logits, layout.labels[supervised], len(logits) if count is None else count)

    def image_losses(
        self,
        layout: Layout,
        features: Tensor,
        replaced: Tensor | None = None,
        history_noise: float = 0.0,
        weights: Tensor | None = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text loss and feature loss of conversations with pictures; arguments as in `forward`."""
        history = features[layout.history[:, 0], layout.history[:, 1]]  # (C, N, D_feature)
        if replaced is not None and bool(replaced.any()):
            history = self._own_history(layout, features, history, replaced)
        if history_noise:
            history = history + history_noise * torch.randn_like(history)
        output = self.predict(layout, history)
        targets = self.to_target(features[layout.queries[:, 0], layout.queries[:, 1]])  # (Q, N, D_feature)
        errors = self._errors(output.drawn, targets)  # (Q, N)
        if self.copy_gate is not None:  # half of each: what the gate keeps would never be learned to draw
            errors = (errors + self._errors(output.images, targets)) / 2  # (Q, N)
        if weights is not None:
            errors = errors * weights[layout.queries[:, 0], layout.queries[:, 1]]  # (Q, N)
        whole = whole or Whole.of(layout, None)
        labels = layout.labels[layout.labels != IGNORE]  # (L,)
        return _cross_entropy(output.logits, labels, whole.text), errors.sum() / max(1, whole.image)

    def _errors(self, images: Tensor, targets: Tensor) -> Tensor:
        """Mean squared errors (Q, N) of tokens (Q, N, D_feature), in units of the features' spread."""
        return ((images.float() - targets) / self.feature_scale).square().mean(-1)  # (Q, N)

    def forward(
        self,
        layout: Layout | None = None,
        features: Tensor | None = None,
        replaced: Tensor | None = None,
        history_noise: float = 0.0,
        words: Layout | None = None,
        weights: Tensor | None = None,
        whole: Whole | None = None,
    ) -> Losses:
        """Losses of a batch, or of a part of one: of conversations with pictures, of words alone, or of both.

        Args:
            layout: token sequences of B conversations.
            features: (B, R, N, D_feature) true features of every round; goes with `layout`.
            replaced: (B, R) bool, history images to replace by the model's own predictions (packed only).
            history_noise: standard deviation of noise added to history features.
            words: more conversations, laid out without pictures, of which the replies are learned.
            weights: (B, R, N) how much each token counts, of mean 1 in each picture; all alike by default.
            whole: what the batch supervises of which this is a part; by default this is all of it.
        """
        text = image = spoken = self.feature_scale.new_zeros(())
        if layout is not None and features is not None:
            text, image = self.image_losses(layout, features, replaced, history_noise, weights, whole)
        if words is not None:
            spoken = self.text_loss(words, None if whole is None else whole.words)
        total = self.settings.text_loss_weight * (text + spoken) + self.settings.feature_loss_weight * image
        return Losses(total, text, image, spoken)

    @torch.no_grad()
    def _own_history(self, layout: Layout, features: Tensor, history: Tensor, replaced: Tensor) -> Tensor:
        """True history with the chosen pictures replaced by predictions made from true history."""
        own = features.clone()
        predicted = self.to_history(self.predict(layout, history).images)
        own[layout.queries[:, 0], layout.queries[:, 1]] = predicted.to(features.dtype)
        mixed = torch.where(replaced[..., None, None], own, features)  # (B, R, N, D_feature)
        return mixed[layout.history[:, 0], layout.history[:, 1]]  # (C, N, D_feature)


def _cross_entropy(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Cross-entropy of logits (L, V) summed over labels (L,) and divided by a count; zero, with a gradient, of none."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, count)
