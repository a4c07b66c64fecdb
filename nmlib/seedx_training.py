"""Training SEED-X's own class on data sets that were brought: the stages of a params file with a `seedx:` block.

What differs from `curriculum`: a stage starts from released weights, pictures are encoded as they are read, because the
tokens of all would fill a disk, and the result is a folder in the Hugging Face way.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmlib import batches, curriculum, data, runtime, train
from nmlib.checkpoint import CheckpointError
from nmlib.config import Params, PeopleConfig, SeedXConfig, StageConfig
from nmlib.conversation import Conversation
from nmlib.layout import Layout
from nmlib.mllm import Losses
from nmlib.personalization import found_face_weights
from nmlib.runtime import Run, read_json, write_json
from nmlib.seedx import SeedX
from nmlib.seedx_checkpoint import System, find_part, from_pretrained, load_vit, require_part, save_pretrained
from nmlib.seedx_files import weight_files
from nmlib.seedx_layout import SeedXTemplate
from nmlib.seedx_vision import CLIP_MEAN, CLIP_STD, QwenViT, pool_tokens
from nmlib.stored_sets import StoredSet
from nmlib.train import History

ENCODED_AT_ONCE = 16
NOTES = "training.json"  # beside a stage's weights: how they came to be
WEIGHTS = "weights"  # in a run's folder: SEED-X's own, or a link to it


class PictureReader(nn.Module):
    """SEED-X that is given pictures: its frozen encoder reads those that a part of a batch needs.

    Args:
        agent: is trained.
        vit: is no part of this module, so that it is neither trained, saved nor sharded with it.
    """

    def __init__(self, agent: SeedX, vit: QwenViT) -> None:
        super().__init__()
        self.agent = agent
        self._eyes = [vit]

    def forward(self, layout: Layout, images: Tensor, **others: Any) -> Losses:
        """Losses of a batch or of a part of one; see `HistoryMLLM.forward`.

        Args:
            layout: token sequences of B conversations, or some rows of them.
            images: uint8 (B, R, 3, H, W), of the encoder's size.
            others: passed on.
        """
        return self.agent(layout, self.encode(layout, images), **others)

    @torch.no_grad()
    def encode(self, layout: Layout, images: Tensor) -> Tensor:
        """Encoder tokens (B, R, M, D_feature) of the pictures that a layout reads or makes; zeros elsewhere."""
        self._eyes[0] = vit = self._eyes[0].to(images.device)
        wanted = torch.cat([layout.history, layout.queries]).unique(dim=0)  # (P, 2)
        pixels = to_clip(images[wanted[:, 0], wanted[:, 1]]).to(vit.proj.dtype)  # (P, 3, H, W)
        tokens = torch.cat([vit(part) for part in pixels.split(ENCODED_AT_ONCE)]).float()  # (P, M, D_feature)
        features = tokens.new_zeros(*images.shape[:2], *tokens.shape[1:])  # (B, R, M, D_feature)
        features[wanted[:, 0], wanted[:, 1]] = tokens
        return features


def to_clip(images: Tensor) -> Tensor:
    """uint8 pictures (B, 3, H, W) of the encoder's size as it reads them."""
    mean, std = (images.new_tensor(values, dtype=torch.float32)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images.float() / 255 - mean) / std  # (B, 3, H, W)


def stage_settings(params: Params, stage: StageConfig) -> SeedXConfig:
    """Sizes of SEED-X with what a stage overrides.

    Raises:
        ValueError: the stage asks for what SEED-X has not, or what real data sets do not tell.
    """
    assert params.seedx is not None
    settings = params.seedx.model_copy(update={"model": params.stage_model(stage)})
    wanted = {
        "data": (bool(stage.data), "a data set; words alone are exercises in the grammar of a world"),
        "word_rounds": (not stage.word_rounds, "0; words beside the pictures are drawn from a world"),
        "change_weight": (not stage.change_weight, "0; it needs the tokens of all pictures beforehand"),
        "response": (settings.model.response == "polite", "polite, as SEED-X replies"),
        "markers": (not settings.model.markers, "false; SEED-X has no markers of rounds"),
    }
    for name, (is_fit, expected) in wanted.items():
        if not is_fit:
            raise ValueError(f"{params.name}, stage {stage.name!r}: {name} does not fit SEED-X; expected {expected}")
    if stage.predicted_history and settings.history != "repeat":
        raise ValueError(
            f"{params.name}, stage {stage.name!r}: predicted_history {stage.predicted_history} puts predictions in the "
            f"places of encoded pictures, so seedx.history must be 'repeat'; it is {settings.history!r}"
        )
    return settings


def fits(template: SeedXTemplate) -> Callable[[Conversation], bool]:
    """Whether the last round of a conversation, with all before it, is short enough to train on."""
    longest = template.settings.max_length
    return lambda conversation: len(template.prefix_row(conversation, len(conversation) - 1).ids) < longest


def stage_batches(
    params: Params, stage: StageConfig, sets: Mapping[str, StoredSet], template: SeedXTemplate, seed: int
) -> Callable[[int], dict[str, Any]]:
    """Batches of a stage as a pure function of the step; see `batches.stage_batches`.

    Where a data set about people says where faces are, they weigh `face_weight` times as much.
    """

    def batch_at(step: int) -> dict[str, Any]:
        name = batches.pick_set(stage, step, seed + 9)
        part, settings = sets[name], batches.set_settings(params, name)
        conversations = part.batch(step, stage.optim.batch_size, seed + 3)
        images = torch.stack([c.images for c in conversations if c.images is not None])  # (B, R, 3, H, W)
        generator, chance = data.step_generator(seed + 4, step), batches.predicted_share(stage, step)
        is_packed, weights = stage.supervision == "packed", None
        if isinstance(settings, PeopleConfig) and settings.face_weight != 1:
            each = [found_face_weights(c, template.settings.vision.tokens, settings.face_weight) for c in conversations]
            weights = torch.stack([pool_tokens(part[..., None], template.settings.queries)[..., 0] for part in each])
        return {
            "layout": template.packed(conversations) if is_packed else template.prefix(conversations),
            "images": images,
            "weights": weights,
            "replaced": torch.rand(images.shape[:2], generator=generator) < chance if chance else None,
            "history_noise": stage.history_noise,
        }

    return batch_at


def weights_folder(run: Run, given: Path | None = None) -> Path:
    """Folder of the released weights that a run begins with: the given one, or `weights` in the run's folder.

    Raises:
        CheckpointError: there is none.
    """
    folder = (given or run.path(WEIGHTS)).resolve()  # the encoder lies beside what a link points at
    if not folder.is_dir():
        hint = "" if given else ", or link it there: `ln -s FOLDER " + str(run.path(WEIGHTS)) + "`"
        raise CheckpointError(
            f"{folder}: no such folder; SEED-X begins with released weights, give theirs with --weights{hint}"
        )
    return folder


def imported_stages(run: Run) -> dict[str, list[str]]:
    """Every stage of a run and the data sets it lacks, its own and those of the stages it continues."""
    lacks: dict[str, list[str]] = {}
    for stage in run.params.stages:
        own = [name for name in stage.data if not run.path("data", name, "rounds.parquet").is_file()]
        lacks[stage.name] = list(dict.fromkeys([*lacks.get(stage.start or "", []), *own]))
    return lacks


def open_stage(run: Run, name: str, weights: Path, seed: int = 0) -> System:
    """A trained stage with the encoder of the weights that it began with, in evaluation mode.

    Raises:
        CheckpointError: the stage was not trained, or a part is missing or damaged.
    """
    folder = run.path(curriculum.model_name(name, seed))
    if not (folder / NOTES).is_file():
        raise CheckpointError(f"{folder}: not trained; `python -m nmlib train --params {run.name} --stage {name}`")
    dtype = runtime.compute_dtype(run.params.precision)
    system = from_pretrained(folder, dtype=dtype, vision=False)
    return system._replace(vit=load_vit(weights, system.agent.config, dtype))


def train_stage(run: Run, name: str, weights: Path, seed: int = 0) -> History:
    """Train one stage of SEED-X; writes the folder `models/<name>`, LoRA merged. What is made already is left.

    Args:
        run: holds params, imported data sets and earlier stages.
        name: of the stage.
        weights: folder that SEED-X released, or that `save_pretrained` wrote, with the encoder.
        seed: added to the run's seed, for intervals over seeds.

    Raises:
        CheckpointError: weights are missing, damaged or do not fit.
        ConversationError: a data set is damaged, or none of its conversations is short enough.
        ValueError: the stage asks for what SEED-X has not.
    """
    params, stage, result = run.params, run.params.stage(name), curriculum.model_name(name, seed)
    settings, folder = stage_settings(params, stage), run.path(curriculum.model_name(name, seed))
    before = weights if stage.start is None else run.path(curriculum.model_name(stage.start, seed))
    parts = [settings, *batches.settings_of(params, stage)]
    key = "-".join([train.training_key(run, "seedx_training", seed, *parts), _fingerprint(run, stage, before)])
    notes = read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    if notes.get("key") == key:
        return notes["history"]
    torch.manual_seed(params.seed + seed)
    dtype = runtime.compute_dtype(params.precision)
    agent, _, template = from_pretrained(before, settings, dtype, vision=False)
    _prepare(agent, stage)
    sets = {part: StoredSet(run.path("data", part), fits(template)) for part in stage.data}
    run.log("data", stage=name, **{f"too_long_{part}": found.dropped for part, found in sets.items()})
    module = PictureReader(agent, load_vit(weights, settings, dtype))
    batch_at = stage_batches(params, stage, sets, template, params.seed + seed)
    history = train.run_training(run, result, module, batch_at, stage.optim, params.seed + seed, key, curriculum.split)
    _finish(run, result, System(agent, None, template), dtype, {"key": key, "stage": name, "history": history})
    return history


def _prepare(agent: SeedX, stage: StageConfig) -> None:
    """Attach LoRA where the stage trains it, and keep what is trained in 32 bits, whatever the rest is kept in."""
    if agent.has_lora:
        agent.merge_lora()
    agent.requires_grad_(True)
    if stage.trainable == "lora":
        agent.add_lora()
    for parameter in agent.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _finish(run: Run, result: str, system: System, dtype: torch.dtype, notes: dict[str, Any]) -> None:
    """Store a stage as a folder, then drop the training's own checkpoint; the main process does it."""
    if train.processes().is_main_process:
        agent = system.agent.cpu()
        if agent.has_lora:
            agent.merge_lora()
        save_pretrained(system._replace(agent=agent.to(dtype)), run.path(result))
        write_json(run.path(result) / NOTES, notes)
        run.path("training", result, "progress.safetensors").unlink(missing_ok=True)
    train.processes().wait_for_everyone()


def _fingerprint(run: Run, stage: StageConfig, before: Path) -> str:
    """What identifies the weights and the pictures that a stage reads.

    Of a stage before it the key of its training; else names and sizes of files, whose content is tens of gigabytes.
    """
    files = [run.path("data", name, "rounds.parquet") for name in stage.data]
    told: list[str] = []
    if (before / NOTES).is_file():
        told = [str(read_json(before / NOTES)["key"])]
    else:
        parts = ["tuned"] if find_part(before, "tuned") else ["llm", "agent"]
        files += [file for part in parts for file in weight_files(require_part(before, part))]
    return fingerprint(files, told)


def fingerprint(files: Sequence[Path], told: Sequence[str] = ()) -> str:
    """What identifies files whose content is too large to be read for it: their names and sizes, and what is told."""
    lines = [*told, *(f"{file.name} {file.stat().st_size}" for file in files)]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
