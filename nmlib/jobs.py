"""One training with all that it starts from: what `python -m nmlib train` does, in one process or in many.

Files and keys are those of the notebooks, which find what was made here and do not make it again.
"""

from collections.abc import Iterable

from nmlib import codec, curriculum, data, experiments
from nmlib.config import StageConfig
from nmlib.runtime import Run, RunError
from nmlib.train import History

ENCODER, DETOKENIZER = "encoder", "detokenizer"


def train_one(run: Run, name: str, seed: int = 0) -> History:
    """Train encoder, detokenizer or a stage, before it whatever it needs; what is made already is left as it is.

    Args:
        run: takes the files.
        name: `encoder`, `detokenizer` or the name of a stage.
        seed: added to the run's seed; of stages only.

    Returns:
        Loss history.

    Raises:
        RunError: there is no such stage, or a data set was not drawn yet.
    """
    stages = _with_earlier(run, name) if name not in (ENCODER, DETOKENIZER) else []
    _require_drawn(run, {part for stage in stages for part in stage.data})
    source = data.open_source(run.params.source)
    history = codec.train_encoder(run, source)
    if name == DETOKENIZER:
        history = codec.train_detokenizer(run, source, codec.load_encoder(run))
    for stage in stages:
        history = curriculum.train_stage(run, stage.name, experiments.read_sets(run, stage.data), seed)
    return history


def _with_earlier(run: Run, name: str) -> list[StageConfig]:
    """A stage behind those that it continues, in the order in which they are trained."""
    try:
        chain = [run.params.stage(name)]
    except KeyError as error:
        raise RunError(f"{error.args[0]}; `encoder` and `detokenizer` can be trained as well") from None
    while chain[0].start is not None:
        chain.insert(0, run.params.stage(chain[0].start))
    return chain


def _require_drawn(run: Run, names: Iterable[str]) -> None:
    for name in sorted(names):
        folder = run.path("data", name)
        if not (folder / "rounds.parquet").is_file():
            raise RunError(
                f"{folder}: data set {name!r} was not drawn yet; run the notebooks that draw them first: "
                f"`python -m nmlib run --params {run.name} --only 01`, likewise 02, and 07 for people"
            )
