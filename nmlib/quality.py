"""How good the parts are before any conversation: encoder, detokenizer and the measure of identity.

Everything is measured on held-out subjects, with records.
"""

import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from nmlib import data, metrics
from nmlib.detokenizer import Detokenizer
from nmlib.identity import FaceEmbedder
from nmlib.records import write_record
from nmlib.runtime import Run
from nmlib.sources import Source
from nmlib.vision import VisionTransformer

MODULES = ("quality",)
PROBE_TRAIN, PROBE_TEST = 4000, 1000
SEED = 70_000


@torch.no_grad()
def probe_table(run: Run, source: Source, encoder: VisionTransformer) -> pd.DataFrame:
    """Read every attribute from the tokens with a linear probe (logistic regression).

    The probe learns on the training split and is tested on held-out subjects.

    Returns:
        One row for each attribute with `accuracy`, `chance` and `relative`; the worst of those that a single
        picture reveals becomes a record.
    """
    sets = []
    for split, count in (("train", PROBE_TRAIN), ("heldout", PROBE_TEST)):
        small = count if run.params.meaningful else count // 10
        _, values, images = data.sample_pictures(source, small, split, data.step_generator(SEED, len(split)))
        tokens = torch.cat([encoder(part) for part in images.split(256)]).flatten(1)  # (n, N*D)
        sets.append((tokens.numpy(), values.numpy()))
    (inputs, labels), (test_inputs, test_labels) = sets
    rows = []
    for place, attribute in enumerate(source.attributes):
        probe = LogisticRegression(C=0.1, max_iter=200, tol=1e-3).fit(inputs, labels[:, place])
        accuracy = float(probe.score(test_inputs, test_labels[:, place]))
        row = {"attribute": attribute.name, "accuracy": accuracy, "chance": 1 / len(attribute.values)}
        rows.append(row | {"relative": attribute.relative})
    table = pd.DataFrame(rows)
    worst = float(table.loc[~table["relative"], "accuracy"].min())
    write_record(run, "encoder.probe_accuracy", worst, n=len(test_labels), unit="share", modules=MODULES)
    return table


@torch.no_grad()
def reconstruction_table(
    run: Run, source: Source, encoder: VisionTransformer, detokenizer: Detokenizer, count: int = 512
) -> pd.DataFrame:
    """Encode and decode held-out pictures under several numbers of sampling steps.

    Returns:
        One row for every (steps, picture) with `psnr`, `ssim` and `seam`; the settings' own steps become records.
    """
    count = count if run.params.meaningful else count // 16
    images = data.sample_pictures(source, count, "heldout", data.step_generator(SEED + 1, 0))[2]
    tokens = torch.cat([encoder(part) for part in images.split(256)])  # (n, N, D)
    rows: list[dict[str, float]] = []
    own = run.params.detokenizer.sampling_steps
    for steps in sorted({1, 2, 4, 8, own}):
        decoded = torch.cat([detokenizer.decode(part, steps=steps) for part in tokens.split(128)])
        quality, structure = metrics.psnr(decoded, images), metrics.ssim(decoded, images)
        seams = seam_ratio(decoded - images, run.params.detokenizer.patch_size)
        rows += [
            {"steps": steps, "psnr": float(q), "ssim": float(s), "seam": seams}
            for q, s in zip(quality, structure, strict=True)
        ]
    table = pd.DataFrame(rows)
    mine = table[table["steps"] == own]
    for column, unit in (("psnr", "dB"), ("ssim", "")):
        interval = metrics.bootstrap(torch.tensor(mine[column].to_numpy()), run.params.experiments.bootstrap)
        write_record(
            run, f"detokenizer.{column}", interval.value, low=interval.low, high=interval.high, n=interval.n,
            unit=unit, modules=MODULES,
        )  # fmt: skip
    write_record(run, "detokenizer.seam", float(mine["seam"].iloc[0]), n=len(mine), unit="ratio", modules=MODULES)
    return table


def seam_ratio(error: Tensor, patch: int) -> float:
    """How visible the patch grid is: jumps of the error across patch borders over jumps elsewhere.

    Args:
        error: decoded minus true pictures (B, 3, H, W).
        patch: pixels a side of a patch.

    Returns:
        1 where borders look like any other place; larger where the grid shows.
    """
    jumps = torch.cat([error.diff(dim=3).abs().mean((0, 1, 2)), error.diff(dim=2).abs().mean((0, 1, 3))])
    size = error.shape[-1]
    border = (torch.arange(1, size) % patch == 0).repeat(2)
    return float(jumps[border].mean() / jumps[~border].mean())


@torch.no_grad()
def drift_of_decoding(
    source: Source, encoder: VisionTransformer, detokenizer: Detokenizer, rounds: int, count: int = 64
) -> pd.DataFrame:
    """Decode and encode the same picture again and again, with no model in between.

    Returns:
        One row for every (round, picture) with `psnr`.
    """
    images = data.sample_pictures(source, count, "heldout", data.step_generator(SEED + 2, 0))[2]
    shown, rows = images, []
    for index in range(1, rounds + 1):
        shown = detokenizer.decode(encoder((shown * 255).round() / 255))
        rows += [{"round": index, "psnr": float(q)} for q in metrics.psnr(shown, images)]
    return pd.DataFrame(rows)


def identity_table(run: Run, source: Source, embedder: FaceEmbedder, count: int = 512) -> pd.DataFrame:
    """Similarity of two views of one held-out subject and of two subjects; the AUROC becomes a record.

    Returns:
        One row for every pair with `pair` ("same" or "other") and `similarity`.
    """
    generator = data.step_generator(SEED + 3, 0)
    subjects = source.sample_subjects(count, "heldout", generator)  # (B, S)
    views = [
        source.render(source.other_view(subjects, generator), data.sample_values(source, count, generator))
        for _ in range(2)
    ]
    auroc = embedder.check(*views)
    write_record(run, "metric.arcface.auroc", auroc, n=count, unit="share", modules=MODULES)
    similarity = F.normalize(embedder(views[0])) @ F.normalize(embedder(views[1])).T  # (B, B)
    rows = [{"pair": "same", "similarity": float(value)} for value in similarity.diag()]
    rows += [{"pair": "other", "similarity": float(value)} for value in similarity.roll(1, 1).diag()]
    return pd.DataFrame(rows)
