"""The stages of a params file, trained in order.

A stage is data (`StageConfig`): where it starts, what it reads, what it may change. The trainer knows nothing of
its meaning. Each result is one file in the run folder whose metadata rebuilds it. A result that the same settings
and the same code have made is left as it is, so that a notebook can run again without training again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from nmlib import batches, checkpoint, data, layout, train
from nmlib.config import ModelConfig, Params, Settings, StageConfig
from nmlib.data import ConversationFeatures
from nmlib.layout import Template
from nmlib.mllm import HistoryMLLM, Whole
from nmlib.runtime import Run
from nmlib.train import History, Part


def new_model(
    settings: ModelConfig, tokenizer: PreTrainedTokenizerFast, tokens: int, feature_dim: int
) -> tuple[HistoryMLLM, Template]:
    """A fresh model and the template it reads."""
    template = Template(tokenizer, tokens, settings.response)
    markers = [template.marker_id(index) for index in range(settings.max_rounds)] if settings.markers else []
    model = HistoryMLLM(
        settings,
        vocab_size=len(tokenizer),
        tokens_per_image=tokens,
        feature_dim=feature_dim,
        marker_ids=markers,
        slot_ids=template.image_ids if settings.markers else [],
        pad_token_id=int(tokenizer.pad_token_id),
    )
    return model, template


def _earlier(params: Params, stage: StageConfig) -> list[Settings]:
    """Settings of the stages that a stage continues, with their data."""
    if stage.start is None:
        return []
    before = params.stage(stage.start)
    return [*_earlier(params, before), *batches.settings_of(params, before), params.stage_model(before)]


def _has_seen_pictures(params: Params, name: str | None) -> bool:
    """Whether a stage, or one that it continues, reads pictures."""
    if name is None:
        return False
    stage = params.stage(name)
    return bool(stage.data) or _has_seen_pictures(params, stage.start)


def _start(
    run: Run, stage: StageConfig, features: Mapping[str, ConversationFeatures], seed: int
) -> tuple[HistoryMLLM, Template]:
    """The model that a stage begins with, and its template."""
    settings = run.params.stage_model(stage)
    tokens = run.params.tokens_per_image
    speaker = data.speaker(run.params)
    tokenizer = layout.build_tokenizer(speaker.attributes, tokens, settings.max_rounds, speaker.names)
    model, template = new_model(settings, tokenizer, tokens, run.params.vision.feature_dim)
    if stage.start is not None:
        start = run.path(f"{model_name(stage.start, seed)}.safetensors")
        checkpoint.load_into(model, checkpoint.load(start)[0], str(start))
    if stage.data and not _has_seen_pictures(run.params, stage.start):
        pictures = torch.cat([part for name in stage.data for part in features[name].features])  # (C, N, D_feature)
        model.feature_scale.copy_(pictures.std(0).clamp_min(0.05))  # (N, D_feature)
    return model, template


def split(batch: Mapping[str, Any], parts: int) -> list[Part]:
    """Cut a batch of conversations into parts whose losses add up to its own.

    What the losses are divided by is counted over the whole batch, so that every supervised word and every token of a
    picture weighs the same in whichever part it stands.

    Args:
        batch: as `batches.stage_batches` gives it.
        parts: how many; every one gets at least one row of the layout, and one of the words where there are words.
    """
    layouts = {name: batch[name] for name in ("layout", "words") if batch.get(name) is not None}
    whole = Whole.of(layouts.get("layout"), layouts.get("words"))
    runs = {name: train.cut_rows(len(part.input_ids), parts) for name, part in layouts.items()}
    return [
        Part({**batch, "whole": whole} | {name: layouts[name].rows(*runs[name][part]) for name in layouts}, 1.0)
        for part in range(parts)
    ]


def train_stage(run: Run, name: str, features: Mapping[str, ConversationFeatures], seed: int = 0) -> History:
    """Train one stage; writes `models/<name>.safetensors`, LoRA merged.

    Args:
        run: holds params and earlier stages.
        name: of the stage.
        features: at least the data sets that the stage reads, by name.
        seed: added to the run's seed, for intervals over seeds.
    """
    params, stage, result = run.params, run.params.stage(name), model_name(name, seed)
    settings = params.stage_model(stage)
    parts = [*batches.settings_of(params, stage), settings]
    parts_before = [params.source, params.vision, *_earlier(params, stage)]
    key = train.training_key(run, "curriculum", seed, *parts_before, *parts)
    if (made := train.made(run.path(f"{result}.safetensors"), key)) is not None:
        return made
    torch.manual_seed(params.seed + seed)
    model, template = _start(run, stage, features, seed)
    if stage.trainable == "lora":
        model.add_lora()

    batch_at = batches.stage_batches(params, stage, features, template, params.seed + seed)
    history = train.run_training(run, result, model, batch_at, stage.optim, params.seed + seed, key, split)
    if stage.trainable == "lora":
        model.merge_lora()
    metadata = {
        "settings": settings.model_dump(mode="json"),
        "tokenizer": template.tokenizer.backend_tokenizer.to_str(),
        "tokens": params.tokens_per_image,
        "feature_dim": params.vision.feature_dim,
        "stage": stage.model_dump(mode="json"),
        "history": history,
        "key": key,
    }
    train.finish(run, result, model.state_dict(), metadata)
    return history


def model_name(stage: str, seed: int = 0) -> str:
    """Name of a stage's result in the run folder; repeats with other seeds carry theirs."""
    return f"models/{stage}" if seed == 0 else f"models/{stage}-seed{seed}"


def load_model(path: Path) -> tuple[HistoryMLLM, Template]:
    """Rebuild a model and its template from one checkpoint file."""
    tensors, metadata = checkpoint.load(path)
    settings = ModelConfig.model_validate_json(checkpoint.as_json(metadata["settings"]))
    tokenizer = layout.wrap_tokenizer(Tokenizer.from_str(metadata["tokenizer"]), metadata["tokens"])
    model, template = new_model(settings, tokenizer, metadata["tokens"], metadata["feature_dim"])
    return checkpoint.freeze(model, tensors, path), template


def load_history(path: Path) -> History:
    """Loss history of a trained file."""
    return checkpoint.load(path)[1]["history"]
