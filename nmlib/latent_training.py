"""Training the full-size detokenizer on data sets that were brought: general pictures, people, predicted tokens.

The three steps are those of the small size (`codec`, `detokenizer_tuning`). The frozen encoder reads the pictures, and
the average of each four of its tokens, which is what SEED-X predicts, is what the transformer learns to draw.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmlib import checkpoint, data, runtime, train
from nmlib.batches import set_settings
from nmlib.checkpoint import CheckpointError
from nmlib.config import OptimConfig, SeedXConfig, Settings
from nmlib.curriculum import model_name
from nmlib.detokenizer import DetokenizerLosses
from nmlib.latent_detokenizer import (
    LatentDetokenizer,
    latent_detokenizer,
    load_latent_detokenizer,
    vae_fingerprint,
)
from nmlib.layout import Layout
from nmlib.runtime import Run
from nmlib.seedx_checkpoint import load_vit, require_part
from nmlib.seedx_files import weight_files
from nmlib.seedx_training import NOTES, PictureReader, fingerprint, fits, open_stage, to_clip
from nmlib.seedx_vision import QwenViT, pool_tokens
from nmlib.stored_sets import StoredSet
from nmlib.train import History, Part

GENERAL, FACES, PREDICTED = "detokenizer", "detokenizer-faces", "detokenizer-predicted"
BEFORE = {GENERAL: None, FACES: GENERAL, PREDICTED: FACES}  # what each step goes on from
VAE = "vae"  # in a run's folder, or a link to it


class PictureDrawer(nn.Module):
    """A detokenizer that is given pictures: what it reads of them comes from a frozen encoder, or a frozen model.

    Args:
        detokenizer: is trained.
        reader: is no part of this module: the encoder, or a model with its encoder, whose predictions are drawn.
        queries: N, tokens that the model predicts of a picture.
    """

    def __init__(self, detokenizer: LatentDetokenizer, reader: QwenViT | PictureReader, queries: int) -> None:
        super().__init__()
        self.detokenizer, self.queries = detokenizer, queries
        self._reader: list[Any] = [reader]

    def forward(self, images: Tensor, layout: Layout | None = None) -> DetokenizerLosses:
        """Losses of a batch; see `Detokenizer.forward`.

        Args:
            images: uint8 (P, 3, H, W), or with a layout (B, R, 3, H, W).
            layout: conversations, of which the pictures that are asked for are drawn from what is predicted of them.
        """
        self._reader[0] = reader = self._reader[0].to(images.device)
        if layout is not None:
            return self.detokenizer(*predicted_pairs(reader, layout, images))
        with torch.no_grad():
            encoded = reader(to_clip(images).to(reader.proj.dtype)).float()  # (P, M, D_feature)
        tokens = pool_tokens(encoded, self.queries)  # (P, N, D_feature)
        return self.detokenizer(tokens, images.float() / 255)


@torch.no_grad()
def predicted_pairs(reader: PictureReader, layout: Layout, images: Tensor) -> tuple[Tensor, Tensor]:
    """What SEED-X predicts for every picture that it is asked for, beside the picture.

    The history that it reads is what it predicted itself from the true one, as in training.

    Args:
        reader: model and encoder.
        layout: `packed`, of B conversations of R rounds or some rows of it.
        images: uint8 (B, R, 3, H, W).

    Returns:
        Tokens (Q, N, D_feature) and pictures (Q, 3, H, W) in [0, 1].
    """
    agent, read = reader.agent, reader.encode(layout, images)  # (B, R, M, D_feature)
    asked, made = (layout.queries[:, 0], layout.queries[:, 1]), torch.zeros(0)
    for _ in range(2):
        made = agent.predict(layout, read[layout.history[:, 0], layout.history[:, 1]]).images.float()
        read[asked] = agent.to_history(made).to(read)  # (Q, M, D_feature)
    return made, images[asked].float() / 255


def split(batch: Mapping[str, Any], parts: int) -> list[Part]:
    """Cut a batch into parts, each weighted by the pictures that it draws."""
    if "layout" not in batch:
        return train.split_rows(batch, parts)
    runs = train.cut_rows(len(batch["layout"].input_ids), parts)
    pieces = [batch["layout"].rows(*rows) for rows in runs]
    count = len(batch["layout"].queries)
    return [Part({**batch, "layout": piece}, len(piece.queries) / count) for piece in pieces]


def picture_batches(sets: Mapping[str, StoredSet], optim: OptimConfig, seed: int) -> Callable[[int], dict[str, Any]]:
    """Pictures of data sets, each as often as it has conversations; a pure function of the step."""
    names, sizes = list(sets), torch.tensor([float(len(part)) for part in sets.values()])

    def batch_at(step: int) -> dict[str, Any]:
        name = names[int(torch.multinomial(sizes, 1, generator=data.step_generator(seed, step)))]
        told = sets[name].batch(step, optim.batch_size, seed + 1)
        return {"images": torch.cat([c.images for c in told if c.images is not None])}  # (P, 3, H, W)

    return batch_at


def train_detokenizer(run: Run, name: str, weights: Path, vae: Path | None = None) -> History:
    """Train one step of the full-size detokenizer; writes `<name>.safetensors`. What is made already is left.

    Args:
        run: holds params, imported data sets and, for PREDICTED, the trained stage.
        name: GENERAL, FACES or PREDICTED. A step goes on from the file of the one before it, which is trained first if
            there is none.
        weights: folder that SEED-X released, with the encoder.
        vae: folder of the VAE; by default `vae` in the run's folder.

    Raises:
        CheckpointError: weights, VAE or stage are missing or do not fit.
        ValueError: the params file does not say what the step needs, or a data set was not imported.
    """
    folder, before = vae_folder(run, vae), BEFORE[name]
    sets, optim, settings = _plan(run, name)
    if before is not None and not run.path(f"{before}.safetensors").exists():
        train_detokenizer(run, before, weights, vae)
    key, path = _key(run, name, sets, weights, folder, settings), run.path(f"{name}.safetensors")
    if (made := train.made(path, key)) is not None:
        return made
    vision = _seedx(run).vision
    torch.manual_seed(run.params.seed)
    sizes = (vision.image_size, vision.tokens, vision.feature_dim)
    module, metadata = latent_detokenizer(run.params.detokenizer, *sizes, folder)
    if before is not None:
        start = run.path(f"{before}.safetensors")
        checkpoint.load_into(module, checkpoint.load(start)[0], str(start))
    drawer, batch_at = _begin(run, name, module, weights, sets, optim)
    history = train.run_training(run, name, drawer, batch_at, optim, run.params.seed, key, split)
    metadata |= {"history": history, "key": key, "before": _stored_key(run, before)}
    train.finish(run, name, module.state_dict(), metadata)
    return history


def vae_folder(run: Run, given: Path | None = None) -> Path:
    """Folder of the VAE: the given one, or `vae` in the run's folder.

    Raises:
        CheckpointError: there is none.
    """
    folder = given or run.path(VAE)
    if not folder.is_dir():
        hint = "" if given else f"; link it there: `ln -s FOLDER {folder}`"
        raise CheckpointError(f"{folder}: no such folder; expected the VAE of a diffusers pipeline{hint}")
    return folder.resolve()


def _stored_key(run: Run, name: str | None) -> str | None:
    """The key of a step's file; None where there is none."""
    path = run.path(f"{name}.safetensors")
    return str(checkpoint.load(path)[1]["key"]) if name is not None and path.exists() else None


def _seedx(run: Run) -> SeedXConfig:
    assert run.params.seedx is not None
    return run.params.seedx


def _plan(run: Run, name: str) -> tuple[list[str], OptimConfig, list[Settings]]:
    """Data sets, schedule and settings of a step; raises before anything is trained if something is not there."""
    params, tuning = run.params, run.params.tuning
    known = [*params.data, *params.people] if name == GENERAL else [tuning.data] if tuning is not None else []
    if not known or (tuning is None and name != GENERAL):
        raise ValueError(f"params {params.name!r}: no `tuning:` block; add one, as params/paper.yaml has")
    sets = [part for part in known if run.path("data", part, "rounds.parquet").is_file()]
    if not sets:
        raise ValueError(
            f"{params.name}: {name} learns from {' or '.join(known)}, of which none was imported; "
            f"`python -m nmlib data import FOLDER --params {params.name} --name {known[0]}`"
        )
    settings: list[Settings] = [params.detokenizer, _seedx(run)]
    if name == GENERAL or tuning is None:
        _require_parts(name, params.detokenizer.optim, max(max(set_settings(params, part).rounds) for part in sets))
        return sets, params.detokenizer.optim, settings
    optim = tuning.faces if name == FACES else tuning.predicted
    if name == PREDICTED:
        _require_stage(run, tuning.stage)
    _require_parts(name, optim, max(set_settings(params, tuning.data).rounds))
    return sets, optim, [*settings, optim]


def _require_stage(run: Run, stage: str) -> None:
    """Raise unless a stage was trained whose predictions can stand in the places of encoded pictures."""
    folder, seedx = run.path(model_name(stage)), _seedx(run)
    if seedx.history != "repeat":
        raise ValueError(
            f"{run.params.name}: {PREDICTED} puts predictions in the places of encoded pictures, so seedx.history must "
            f"be 'repeat'; it is {seedx.history!r}"
        )
    if not (folder / NOTES).is_file():
        raise CheckpointError(f"{folder}: not trained; `python -m nmlib train --params {run.name} --stage {stage}`")


def _require_parts(name: str, optim: OptimConfig, longest: int) -> None:
    """Raise ValueError unless each part of every batch has a row: a conversation, where those are cut, or a picture.

    A batch holds as many whole conversations of one length as its pictures make, and at least one.
    """
    for length in range(1, longest + 1):
        count = max(1, optim.batch_size // length)
        rows = count if name == PREDICTED else count * length
        if rows < optim.parts:
            raise ValueError(
                f"{name}: batch_size {optim.batch_size} gives {count} conversations of {length} rounds, which cannot "
                f"be cut into {optim.parts} parts; raise batch_size or lower parts"
            )


def _begin(
    run: Run, name: str, module: LatentDetokenizer, weights: Path, names: list[str], optim: OptimConfig
) -> tuple[PictureDrawer, Callable[[int], dict[str, Any]]]:
    """The module that is trained, and its batches."""
    seed, tuning = run.params.seed + 2, run.params.tuning
    if name != PREDICTED or tuning is None:
        sets = {part: StoredSet(run.path("data", part)) for part in names}
        vit = load_vit(weights, _seedx(run), runtime.compute_dtype(run.params.precision))
        return PictureDrawer(module, vit, _seedx(run).queries), picture_batches(sets, optim, seed)
    system = open_stage(run, tuning.stage, weights)
    assert system.vit is not None
    stored = StoredSet(run.path("data", tuning.data), fits(system.template))

    def batch_at(step: int) -> dict[str, Any]:
        told = stored.batch(step, optim.batch_size, seed)
        images = torch.stack([c.images for c in told if c.images is not None])  # (B, R, 3, H, W)
        return {"layout": system.template.packed(told), "images": images}

    reader = PictureReader(system.agent, system.vit).eval()
    return PictureDrawer(module, reader, _seedx(run).queries), batch_at


def _key(run: Run, name: str, sets: list[str], weights: Path, vae: Path, settings: list[Settings]) -> str:
    """Identifies what a step gives: settings, code, and the files that it reads."""
    files = [run.path("data", part, "rounds.parquet") for part in sets]
    files += weight_files(require_part(weights, "vit"))
    told = [vae_fingerprint(vae)]
    told.append(str(_stored_key(run, BEFORE[name])))
    if name == PREDICTED and run.params.tuning is not None:
        told.append(str(runtime.read_json(run.path(model_name(run.params.tuning.stage)) / NOTES)["key"]))
    return "-".join([train.training_key(run, "latent_training", 0, *settings), fingerprint(files, told)])


def open_latest(run: Run, vae: Path | None = None) -> LatentDetokenizer | None:
    """The detokenizer of a run after the last step that was trained; None if none was.

    Args:
        run: holds it. A step whose earlier step was trained again since is passed over.
        vae: folder of the VAE; by default `vae` in the run's folder.

    Raises:
        CheckpointError: there is no VAE, or another one than that of the training.
    """
    latest = None
    for name in (GENERAL, FACES, PREDICTED):
        path = run.path(f"{name}.safetensors")
        if path.exists() and checkpoint.load(path)[1]["before"] == _stored_key(run, BEFORE[name]):
            latest = path
        else:
            break
    return None if latest is None else load_latent_detokenizer(latest, vae_folder(run, vae))
