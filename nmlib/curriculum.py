"""Everything that is trained, in order: encoder, detokenizer, and the stages of a params file.

A stage is data (`StageConfig`): where it starts, what it reads, what it may change. The trainer knows nothing of
its meaning. Each result is one file in the run folder whose metadata rebuilds it. A result that the same settings
and the same code have made is left as it is, so that a notebook can run again without training again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from nmlib import checkpoint, data, layout, rollback, train
from nmlib.config import (
    DataConfig,
    DetokenizerConfig,
    ModelConfig,
    Params,
    Settings,
    StageConfig,
    VisionConfig,
)
from nmlib.conversation import Conversation
from nmlib.detokenizer import Detokenizer
from nmlib.layout import Template
from nmlib.mllm import HistoryMLLM
from nmlib.runtime import Run
from nmlib.sources import Source, attribute_sizes
from nmlib.train import History
from nmlib.vision import EncoderTrainer, VisionTransformer

M = TypeVar("M", bound=nn.Module)
CONTENT_FIRST = 12.0  # times as often as another reference, while content comes first


def _finish(run: Run, name: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Store a result, then drop the training's own checkpoint."""
    checkpoint.save(run.path(f"{name}.safetensors"), tensors, metadata)
    run.path("training", name, "progress.safetensors").unlink(missing_ok=True)


def _key(run: Run, seed: int, *settings: Settings) -> str:
    """Identifies what a training gives that reads the encoder, or is it."""
    return train.training_key(run, "curriculum", seed, run.params.source, run.params.vision, *settings)


def _made(path: Path, key: str) -> History | None:
    """Loss history of a result that a training of this key has made already."""
    metadata = checkpoint.load(path)[1] if path.exists() else {}
    return metadata["history"] if metadata.get("key") == key else None


def train_encoder(run: Run, source: Source) -> History:
    """Train the image encoder on pictures of the training split; writes `encoder.safetensors`."""
    params, optim, key = run.params, run.params.vision.optim, _key(run, 0)
    if (made := _made(run.path("encoder.safetensors"), key)) is not None:
        return made
    subject_dim = source.sample_subjects(1, "train", data.step_generator(0, 0)).shape[1]
    torch.manual_seed(params.seed)
    module = EncoderTrainer(params.vision, params.source.image_size, attribute_sizes(source), subject_dim)

    def batch_at(step: int) -> dict[str, Tensor]:
        generator = data.step_generator(params.seed + 1, step)
        subjects, values, images = data.sample_pictures(source, optim.batch_size, "train", generator)
        return {"images": images, "values": values, "subjects": subjects}

    history = train.run_training(run, "encoder", module, batch_at, optim, params.seed, (params.source, params.vision))
    metadata = {
        "settings": params.vision.model_dump(mode="json"),
        "image_size": params.source.image_size,
        "history": history,
        "key": key,
    }
    _finish(run, "encoder", module.encoder.state_dict(), metadata)
    return history


def load_encoder(run: Run) -> VisionTransformer:
    """The frozen encoder of a run."""
    path = run.path("encoder.safetensors")
    tensors, metadata = checkpoint.load(path)
    encoder = VisionTransformer(VisionConfig.model_validate_json(_json(metadata["settings"])), metadata["image_size"])
    return _frozen(encoder, tensors, path)


def train_detokenizer(run: Run, source: Source, encoder: VisionTransformer) -> History:
    """Train the DiT to reconstruct pictures from their tokens; writes `detokenizer.safetensors`."""
    params, optim, key = run.params, run.params.detokenizer.optim, _key(run, 0, run.params.detokenizer)
    if (made := _made(run.path("detokenizer.safetensors"), key)) is not None:
        return made
    torch.manual_seed(params.seed)
    module = Detokenizer(
        params.detokenizer, params.source.image_size, params.tokens_per_image, params.vision.feature_dim
    )

    def batch_at(step: int) -> dict[str, Tensor]:
        generator = data.step_generator(params.seed + 2, step)
        _, _, images = data.sample_pictures(source, optim.batch_size, "train", generator)
        with torch.no_grad():
            return {"tokens": encoder(images), "images": images}

    settings = (params.source, params.vision, params.detokenizer)
    history = train.run_training(run, "detokenizer", module, batch_at, optim, params.seed, settings)
    metadata = {
        "settings": params.detokenizer.model_dump(mode="json"),
        "image_size": params.source.image_size,
        "tokens": params.tokens_per_image,
        "feature_dim": params.vision.feature_dim,
        "history": history,
        "key": key,
    }
    _finish(run, "detokenizer", module.state_dict(), metadata)
    return history


def load_detokenizer(run: Run) -> Detokenizer:
    """The trained detokenizer of a run."""
    path = run.path("detokenizer.safetensors")
    tensors, metadata = checkpoint.load(path)
    settings = DetokenizerConfig.model_validate_json(_json(metadata["settings"]))
    module = Detokenizer(settings, metadata["image_size"], metadata["tokens"], metadata["feature_dim"])
    return _frozen(module, tensors, path)


def stage_model_settings(params: Params, stage: StageConfig) -> ModelConfig:
    """Model settings of a stage: the params file's, with what the stage overrides."""
    changes = {name: getattr(stage, name) for name in ("response", "markers") if getattr(stage, name) is not None}
    return ModelConfig.model_validate(params.model.model_dump() | changes)


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


def predicted_share(stage: StageConfig, step: int) -> float:
    """Share of history images replaced by predictions: zero, then a ramp, then constant."""
    ramp = (step / stage.optim.steps - 0.3) / 0.4
    return stage.predicted_history * min(1.0, max(0.0, ramp))


def word_batch(source: Source, settings: DataConfig, stage: StageConfig, step: int, seed: int) -> list[Conversation]:
    """Fresh conversations of one length whose words alone are learned at a step; a pure function of step and seed.

    Finding a picture by what was said of it is learned slowly, and hardly at all while guessing its distance is
    right as often as not; so it comes first (`content_first`).
    """
    generator = data.step_generator(seed, step)
    length = settings.rounds[int(torch.randint(len(settings.rounds), (1,), generator=generator))]
    first = step < stage.content_first * stage.optim.steps
    changes = {"conversations": max(1, stage.word_rounds // length), "rounds": (length,)}
    changes |= {"content_weight": CONTENT_FIRST} if first else {}
    return rollback.build_conversations(
        source, settings.model_copy(update=changes), seed=seed * 1_000_003 + step, split="train"
    )


def stage_batches(
    params: Params,
    stage: StageConfig,
    source: Source,
    features: data.ConversationFeatures,
    template: Template,
    seed: int,
) -> Callable[[int], dict[str, Any]]:
    """Batches of a stage as a function of the step: conversations with their pictures, and words alone beside them."""

    def batch_at(step: int) -> dict[str, Any]:
        conversations, true = features.batch(step, stage.optim.batch_size, seed + 3)
        generator = data.step_generator(seed + 4, step)
        chance = predicted_share(stage, step)
        replaced = torch.rand(true.shape[:2], generator=generator) < chance if chance else None
        batch = template.packed(conversations) if stage.supervision == "packed" else template.prefix(conversations)
        words = None
        if stage.word_rounds:
            spoken = word_batch(source, params.data[stage.data], stage, step, seed + 7)
            words = template.packed(spoken, pictures=False)
        noise = stage.history_noise
        return {"layout": batch, "features": true, "replaced": replaced, "history_noise": noise, "words": words}

    return batch_at


def _earlier(params: Params, stage: StageConfig) -> list[Settings]:
    """Settings of the stages that a stage continues, with their data."""
    if stage.start is None:
        return []
    before = params.stage(stage.start)
    return [*_earlier(params, before), before, params.data[before.data], stage_model_settings(params, before)]


def _start(
    run: Run, stage: StageConfig, source: Source, features: data.ConversationFeatures, seed: int
) -> tuple[HistoryMLLM, Template]:
    """The model that a stage begins with, and its template."""
    settings = stage_model_settings(run.params, stage)
    tokens = run.params.tokens_per_image
    tokenizer = layout.build_tokenizer(source.attributes, tokens, settings.max_rounds, source.names)
    model, template = new_model(settings, tokenizer, tokens, run.params.vision.feature_dim)
    if stage.start is None:
        model.feature_scale.copy_(torch.cat(features.features).std(0).clamp_min(0.05))  # (N, D_feature)
    else:
        start = run.path(f"{model_name(stage.start, seed)}.safetensors")
        checkpoint.load_into(model, checkpoint.load(start)[0], str(start))
    return model, template


def train_stage(run: Run, name: str, source: Source, features: data.ConversationFeatures, seed: int = 0) -> History:
    """Train one stage; writes `models/<name>.safetensors`, LoRA merged.

    Args:
        run: holds params and earlier stages.
        name: of the stage.
        source: gives the vocabulary.
        features: the stage's data set.
        seed: added to the run's seed, for intervals over seeds.
    """
    params, stage, result = run.params, run.params.stage(name), model_name(name, seed)
    settings = stage_model_settings(params, stage)
    parts = [stage, params.data[stage.data], settings]
    key = _key(run, seed, *_earlier(params, stage), *parts)
    if (made := _made(run.path(f"{result}.safetensors"), key)) is not None:
        return made
    torch.manual_seed(params.seed + seed)
    model, template = _start(run, stage, source, features, seed)
    if stage.trainable == "lora":
        model.add_lora()

    batch_at = stage_batches(params, stage, source, features, template, params.seed + seed)
    history = train.run_training(
        run, result, model, batch_at, stage.optim, params.seed + seed, [params.source, params.vision, *parts]
    )
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
    _finish(run, result, model.state_dict(), metadata)
    return history


def model_name(stage: str, seed: int = 0) -> str:
    """Name of a stage's result in the run folder; repeats with other seeds carry theirs."""
    return f"models/{stage}" if seed == 0 else f"models/{stage}-seed{seed}"


def load_model(path: Path) -> tuple[HistoryMLLM, Template]:
    """Rebuild a model and its template from one checkpoint file."""
    tensors, metadata = checkpoint.load(path)
    settings = ModelConfig.model_validate_json(_json(metadata["settings"]))
    tokenizer = layout.wrap_tokenizer(Tokenizer.from_str(metadata["tokenizer"]), metadata["tokens"])
    model, template = new_model(settings, tokenizer, metadata["tokens"], metadata["feature_dim"])
    return _frozen(model, tensors, path), template


def load_history(path: Path) -> History:
    """Loss history of a trained file."""
    return checkpoint.load(path)[1]["history"]


def _frozen(module: M, tensors: dict[str, Tensor], path: Path) -> M:
    checkpoint.load_into(module, tensors, str(path))
    module.eval().requires_grad_(False)
    return module


def _json(value: Any) -> str:
    import json

    return json.dumps(value)
