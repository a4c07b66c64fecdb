"""Judges: networks that are trained only to measure, and see nothing that the model makes.

Who is shown (`identity`) and whether it is what was asked for (`compliance`). Their code and settings are apart from
those of the encoder and the stages, so that a better judge trains nothing else again.
"""

import random
from pathlib import Path
from typing import Any

import torch

from nmlib import data, runtime, train
from nmlib.compliance import ClipTrainer
from nmlib.identity import ArcFaceTrainer, export_onnx
from nmlib.runtime import Run
from nmlib.sources import Source
from nmlib.train import History


def _made(run: Run, name: str, product: Path, key: str) -> History | None:
    """Loss history of a judge that a training of this key has made already."""
    result = run.path("training", name, "result.json")
    made = runtime.read_json(result) if result.exists() and product.exists() else {}
    return made["history"] if made.get("key") == key else None


def _finish(run: Run, name: str, history: History, key: str) -> None:
    """Note what made a judge, then drop the training's own checkpoint."""
    runtime.write_json(run.path("training", name, "result.json"), {"key": key, "history": history})
    run.path("training", name, "progress.safetensors").unlink(missing_ok=True)


def train_identity(run: Run, source: Source) -> History:
    """Train the subject embedder on its own subjects; writes `identity.onnx`, which insightface loads."""
    params, settings, product = run.params, run.params.identity, run.path("identity.onnx")
    key = train.training_key(run, "judges", 0, params.source, settings)
    if (made := _made(run, "identity", product, key)) is not None:
        return made
    generator = data.step_generator(params.seed + 5, 0)
    people = source.sample_subjects(settings.identities, "train", generator)  # (K, S)
    torch.manual_seed(params.seed)
    module = ArcFaceTrainer(settings, params.source.image_size)

    def batch_at(step: int) -> dict[str, Any]:
        chance = data.step_generator(params.seed + 6, step)
        labels = torch.randint(len(people), (settings.optim.batch_size,), generator=chance)  # (B,)
        subjects = source.other_view(people[labels], chance)  # (B, S)
        images = source.render(subjects, data.sample_values(source, len(labels), chance))  # (B, 3, H, W)
        return {"images": images, "labels": labels, "step": step}

    history = train.run_training(run, "identity", module, batch_at, settings.optim, params.seed, key)
    export_onnx(module.embedder, product)
    _finish(run, "identity", history, key)
    return history


def train_clip(run: Run, source: Source) -> History:
    """Train the small CLIP on pictures and texts of the training split; writes `clip/`, which `ClipScorer` loads.

    Raises:
        ValueError: the params have no `clip:` block.
    """
    params, settings, product = run.params, run.params.clip, run.path("clip")
    if settings is None:
        raise ValueError(f"params {params.name!r}: no `clip:` block; add one, or score with the folder of another CLIP")
    key = train.training_key(run, "judges", 0, params.source, settings)
    if (made := _made(run, "clip", product, key)) is not None:
        return made
    torch.manual_seed(params.seed)
    module = ClipTrainer(settings, source)

    def batch_at(step: int) -> dict[str, Any]:
        chance = data.step_generator(params.seed + 8, step)
        rng = random.Random(train.step_seed(params.seed + 8, step))
        return module.batch(source, settings.optim.batch_size, chance, rng)

    history = train.run_training(run, "clip", module, batch_at, settings.optim, params.seed, key)
    module.save(product)
    _finish(run, "clip", history, key)
    return history
