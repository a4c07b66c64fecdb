"""How few sampling steps the detokenizer needs: quality, identity and time against their number."""

from functools import partial

import pandas as pd
import torch

from nmlib import data, metrics
from nmlib.detokenizer import Detokenizer
from nmlib.identity import FaceEmbedder
from nmlib.records import write_record
from nmlib.runtime import Run
from nmlib.sources import Source
from nmlib.timing import Task, measure, summary
from nmlib.vision import VisionTransformer

STEPS = (2, 4, 8, 16)
SEED = 71_000
BATCH = 128
MODULES = ("few_steps",)


@torch.no_grad()
def few_steps_table(
    run: Run,
    source: Source,
    encoder: VisionTransformer,
    detokenizer: Detokenizer,
    embedder: FaceEmbedder,
    count: int = 256,
    repeats: int = 5,
) -> pd.DataFrame:
    """Encode and decode held-out pictures with 2, 4, 8 and 16 sampling steps; every mean becomes a record.

    Args:
        run: takes the records.
        source: draws the pictures.
        encoder: of the run.
        detokenizer: of the run.
        embedder: says whether two pictures show one subject.
        count: pictures.
        repeats: how often decoding one picture is timed, the numbers of steps taking turns.

    Returns:
        One row for every (steps, picture) with `psnr` in dB, `identity` (cosine between the decoded and the true
        picture) and `milliseconds`, the median time of decoding one picture alone.
    """
    count = count if run.params.meaningful else count // 16
    images = data.sample_pictures(source, count, "heldout", data.step_generator(SEED, 0))[2]
    tokens = torch.cat([encoder(part) for part in images.split(BATCH)])  # (n, N, D)
    subjects = embedder(images)  # (n, E)
    tasks = {str(steps): Task(partial(detokenizer.decode, tokens[:1], steps=steps)) for steps in STEPS}
    seconds = measure(tasks, repeats, warmup=1)
    parts = []
    for steps in STEPS:
        decoded = torch.cat([detokenizer.decode(part, steps=steps) for part in tokens.split(BATCH)])  # (n, 3, H, W)
        alike = (embedder(decoded) * subjects).sum(1)  # (n,)
        time = summary(1e3 * seconds[str(steps)])
        columns = {"psnr": metrics.psnr(decoded, images).numpy(), "identity": alike.numpy()}
        parts.append(pd.DataFrame({"steps": steps, **columns, "milliseconds": time["value"]}))
        for column, unit in (("psnr", "dB"), ("identity", "cosine")):
            interval = metrics.bootstrap(torch.tensor(columns[column]), run.params.experiments.bootstrap)
            write_record(
                run, f"detokenizer.{column}.steps{steps}", interval.value, low=interval.low, high=interval.high,
                n=interval.n, unit=unit, modules=MODULES,
            )  # fmt: skip
        write_record(
            run, f"detokenizer.milliseconds.steps{steps}", time["value"], low=time["low"], high=time["high"],
            n=time["repeats"], unit="ms", modules=MODULES,
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)
