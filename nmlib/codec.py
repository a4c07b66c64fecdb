"""Pictures to tokens and back: how the encoder and the detokenizer of a run are trained and loaded.

Their code and settings are apart from those of the stages, so that a change there trains nothing here again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nmlib import checkpoint, data, train
from nmlib.config import DetokenizerConfig, Settings, VisionConfig
from nmlib.detokenizer import Detokenizer
from nmlib.runtime import Run
from nmlib.sources import Source, attribute_sizes
from nmlib.train import History
from nmlib.vision import EncoderTrainer, VisionTransformer


def _key(run: Run, *settings: Settings) -> str:
    """Identifies what a training gives that reads the encoder, or is it."""
    return train.training_key(run, "codec", 0, run.params.source, run.params.vision, *settings)


def train_encoder(run: Run, source: Source) -> History:
    """Train the image encoder on pictures of the training split; writes `encoder.safetensors`."""
    params, optim, key = run.params, run.params.vision.optim, _key(run)
    if (made := train.made(run.path("encoder.safetensors"), key)) is not None:
        return made
    subject_dim = source.sample_subjects(1, "train", data.step_generator(0, 0)).shape[1]
    torch.manual_seed(params.seed)
    module = EncoderTrainer(params.vision, params.source.image_size, attribute_sizes(source), subject_dim)

    def batch_at(step: int) -> dict[str, Tensor]:
        generator = data.step_generator(params.seed + 1, step)
        subjects, values, images = data.training_pictures(params, source, optim.batch_size, generator)
        return {"images": images, "values": values, "subjects": subjects}

    history = train.run_training(run, "encoder", module, batch_at, optim, params.seed, key)
    metadata = {
        "settings": params.vision.model_dump(mode="json"),
        "image_size": params.source.image_size,
        "history": history,
        "key": key,
    }
    train.finish(run, "encoder", module.encoder.state_dict(), metadata)
    return history


def load_encoder(run: Run) -> VisionTransformer:
    """The frozen encoder of a run."""
    path = run.path("encoder.safetensors")
    tensors, metadata = checkpoint.load(path)
    encoder = VisionTransformer(
        VisionConfig.model_validate_json(checkpoint.as_json(metadata["settings"])), metadata["image_size"]
    )
    return checkpoint.freeze(encoder, tensors, path)


def detokenizer_training(
    run: Run, source: Source, encoder: VisionTransformer
) -> tuple[Detokenizer, Callable[[int], dict[str, Tensor]]]:
    """A fresh detokenizer of a run, and what it learns from at each step: pictures with their tokens."""
    params = run.params
    torch.manual_seed(params.seed)
    module = Detokenizer(
        params.detokenizer, params.source.image_size, params.tokens_per_image, params.vision.feature_dim
    )

    def batch_at(step: int) -> dict[str, Tensor]:
        generator = data.step_generator(params.seed + 2, step)
        _, _, images = data.training_pictures(params, source, params.detokenizer.optim.batch_size, generator)
        with torch.no_grad():
            return {"tokens": encoder(images), "images": images}

    return module, batch_at


def train_detokenizer(run: Run, source: Source, encoder: VisionTransformer) -> History:
    """Train the DiT to reconstruct pictures from their tokens; writes `detokenizer.safetensors`."""
    params, optim, key = run.params, run.params.detokenizer.optim, _key(run, run.params.detokenizer)
    if (made := train.made(run.path("detokenizer.safetensors"), key)) is not None:
        return made
    module, batch_at = detokenizer_training(run, source, encoder)
    history = train.run_training(run, "detokenizer", module, batch_at, optim, params.seed, key)
    metadata = {
        "settings": params.detokenizer.model_dump(mode="json"),
        "image_size": params.source.image_size,
        "tokens": params.tokens_per_image,
        "feature_dim": params.vision.feature_dim,
        "history": history,
        "key": key,
    }
    train.finish(run, "detokenizer", module.state_dict(), metadata)
    return history


def load_detokenizer(run: Run, name: str = "detokenizer") -> Detokenizer:
    """The trained detokenizer of a run, or another one that was stored under a name of its own."""
    path = run.path(f"{name}.safetensors")
    tensors, metadata = checkpoint.load(path)
    settings = DetokenizerConfig.model_validate_json(checkpoint.as_json(metadata["settings"]))
    module = Detokenizer(settings, metadata["image_size"], metadata["tokens"], metadata["feature_dim"])
    return checkpoint.freeze(module, tensors, path)
