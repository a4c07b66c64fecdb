"""One training with all that it starts from: what `python -m nmlib train` does, in one process or in many.

Files and keys are those of the notebooks, which find what was made here and do not make it again.
"""

from collections.abc import Iterable
from pathlib import Path

from nmlib import codec, curriculum, data, experiments, latent_training, seedx_training
from nmlib.config import StageConfig
from nmlib.runtime import Run, RunError
from nmlib.train import History

ENCODER, DETOKENIZER = "encoder", "detokenizer"


def train_one(run: Run, name: str, seed: int = 0, weights: Path | None = None, vae: Path | None = None) -> History:
    """Train encoder, detokenizer or a stage, before it whatever it needs; what is made already is left as it is.

    A params file with a `seedx:` block trains SEED-X's own class, which begins with released weights, and the
    detokenizer on latents (`latent_training`).

    Args:
        run: takes the files.
        name: `encoder`, `detokenizer` or the name of a stage; with `seedx:` also `detokenizer-faces` and
            `detokenizer-predicted`, but no encoder, which is SEED-X's own.
        seed: added to the run's seed; of stages only.
        weights: folder of SEED-X's weights, with the encoder in it or beside it; of `seedx:` only, by default
            `weights` in the run's folder.
        vae: folder of the VAE whose latents the detokenizer draws; of `seedx:` only, by default `vae` in the run's
            folder.

    Returns:
        Loss history.

    Raises:
        RunError: there is no such stage, or a data set was not drawn or imported yet.
        CheckpointError: SEED-X's weights are missing.
    """
    if run.params.seedx is not None:
        return _train_seedx(run, name, seed, weights, vae)
    for option, given in (("weights", weights), ("vae", vae)):
        if given is not None:
            raise RunError(
                f"--{option} {given}: {run.params.name} has no `seedx:` block, its models begin with nothing"
            )
    stages = _with_earlier(run, name) if name not in (ENCODER, DETOKENIZER) else []
    _require_drawn(run, {part for stage in stages for part in stage.data})
    source = data.open_source(run.params.source)
    history = codec.train_encoder(run, source)
    if name == DETOKENIZER:
        history = codec.train_detokenizer(run, source, codec.load_encoder(run))
    for stage in stages:
        history = curriculum.train_stage(run, stage.name, experiments.read_sets(run, stage.data), seed)
    return history


def _train_seedx(run: Run, name: str, seed: int, weights: Path | None, vae: Path | None) -> History:
    if name == ENCODER:
        raise RunError(f"{run.params.name}: SEED-X's encoder comes with its weights; name a stage or a detokenizer")
    folder = seedx_training.weights_folder(run, weights)
    if name in latent_training.BEFORE:
        return latent_training.train_detokenizer(run, name, folder, vae)
    stages = _with_earlier(run, name)
    _require_drawn(run, {part for stage in stages for part in stage.data})
    return [seedx_training.train_stage(run, stage.name, folder, seed) for stage in stages][-1]


def _with_earlier(run: Run, name: str) -> list[StageConfig]:
    """A stage behind those that it continues, in the order in which they are trained."""
    try:
        chain = [run.params.stage(name)]
    except KeyError as error:
        others = list(latent_training.BEFORE) if run.params.seedx is not None else [ENCODER, DETOKENIZER]
        raise RunError(f"{error.args[0]}; {', '.join(others)} can be trained as well") from None
    while chain[0].start is not None:
        chain.insert(0, run.params.stage(chain[0].start))
    return chain


def _require_drawn(run: Run, names: Iterable[str]) -> None:
    for name in sorted(names):
        folder = run.path("data", name)
        if not (folder / "rounds.parquet").is_file():
            drawn = (
                f"was not drawn yet; run the notebooks that draw them first: "
                f"`python -m nmlib run --params {run.name} --only 01`, likewise 02, and 07 for people"
            )
            brought = f"was not imported yet: `python -m nmlib data import FOLDER --params {run.name} --name {name}`"
            raise RunError(f"{folder}: data set {name!r} {drawn if run.params.seedx is None else brought}")
