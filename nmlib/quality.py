"""How good the parts are before any conversation: encoder, detokenizer, and the measures of identity and compliance.

Everything is measured on held-out subjects, with records.
"""

import random
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from skimage.filters import gaussian
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from nmlib import data, metrics, prompts
from nmlib.compliance import ClipScorer
from nmlib.detokenizer import Detokenizer
from nmlib.identity import FaceEmbedder
from nmlib.records import write_record
from nmlib.runtime import Run
from nmlib.sources import Source
from nmlib.vision import VisionTransformer

MODULES = ("quality",)
PROBE_TRAIN, PROBE_TEST = 4000, 1000
SEED = 70_000
NOISE, BLUR = (0.05, 0.1, 0.2, 0.4), (0.5, 1.0, 2.0, 4.0)  # standard deviations: of a channel, in 48ths of the side


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
        probe = LogisticRegression(C=0.1, max_iter=1000, tol=1e-3).fit(inputs, labels[:, place])
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


def corrupted(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Pictures (B, 3, H, W) under graded corruption, by name: Gaussian noise and Gaussian blur of NOISE and BLUR."""
    noise = torch.randn(images.shape, generator=generator)
    spoiled = {f"noise {level}": (images + level * noise).clamp(0, 1) for level in NOISE}
    return spoiled | {f"blur {level}": _blurred(images, level * images.shape[-1] / 48) for level in BLUR}


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, 3, H, W) with a standard deviation in pixels; what lies outside repeats the border."""
    blurred = gaussian(images.numpy(), (0, 0, sigma, sigma), mode="nearest", preserve_range=True)
    return torch.from_numpy(blurred)


class KnownPairs(NamedTuple):
    """Held-out pictures with texts that are true of them, and with the same in which one attribute is not."""

    subjects: Tensor
    values: Tensor
    named: Tensor
    wrong: Tensor  # (B, A) states of the wrong texts
    images: Tensor
    right_texts: list[str]
    wrong_texts: list[str]


def known_pairs(source: Source, count: int, seed: int = SEED + 4) -> KnownPairs:
    """Draw `count` known pairs of a source."""
    rng = random.Random(seed)
    subjects, values, images = data.sample_pictures(source, count, "heldout", data.step_generator(seed, 0))
    named = prompts.draw_named(rng, source, count)  # (B, A)
    wrong = prompts.change(rng, source, values, prompts.pick_one(rng, named))  # (B, A)
    texts = [prompts.describe(rng, source, states, named, "any") for states in (values, wrong)]
    return KnownPairs(subjects, values, named, wrong, images, *texts)


def clip_card(scorer: ClipScorer, source: Source, count: int = 512) -> pd.DataFrame:
    """What the CLIP score says of known answers, on held-out subjects.

    Args:
        scorer: the CLIP.
        source: draws the pictures; its phrases are the texts.
        count: pictures.

    Returns:
        One row for each case with `case`, the `mean` and `std` of the score, and `below`, the share of pictures that
        score below their own picture with its right text. Cases: the right text; one attribute that it names, or all
        of them, changed; another person who looks as the text says; graded noise and blur.
    """
    pairs, rng = known_pairs(source, count), random.Random(SEED + 5)
    unlike = prompts.change(rng, source, pairs.values, pairs.named)  # (B, A)
    others = source.render(pairs.subjects.roll(1, 0), pairs.values)  # (B, 3, H, W)
    scores = {
        "right text": scorer.score(pairs.images, pairs.right_texts),
        "one attribute wrong": scorer.score(pairs.images, pairs.wrong_texts),
        "all attributes wrong": scorer.score(pairs.images, prompts.describe(rng, source, unlike, pairs.named, "any")),
        "another person": scorer.score(others, pairs.right_texts),
    }
    spoiled = corrupted(pairs.images, data.step_generator(SEED + 6, 0))
    scores |= {case: scorer.score(images, pairs.right_texts) for case, images in spoiled.items()}
    right = scores["right text"]
    rows = [
        {
            "case": case,
            "mean": float(found.mean()),
            "std": float(found.std()),
            "below": float((found < right).float().mean()),
        }
        for case, found in scores.items()
    ]
    return pd.DataFrame(rows)


def clip_attributes(scorer: ClipScorer, source: Source, count: int = 512, seed: int = SEED + 4) -> pd.DataFrame:
    """Which attributes the CLIP reads: right texts against the same with this one attribute changed.

    Args:
        scorer: the CLIP.
        source: draws held-out subjects; its phrases are the texts.
        count: pictures; an attribute is tried on those whose text names it.
        seed: of pictures and texts.

    Returns:
        One row for each attribute that a picture shows, with its `auroc` and the number `n` of pictures.
    """
    pairs, rows = known_pairs(source, count, seed), []
    for place in prompts.visible(source):
        rng, picked = random.Random(seed + 1), pairs.named[:, place]  # (B,)
        values, named = pairs.values[picked], pairs.named[picked]  # (b, A)
        where = torch.zeros_like(named)
        where[:, place] = True
        wrong = prompts.describe(rng, source, prompts.change(rng, source, values, where), named, "any")
        right = [text for text, chosen in zip(pairs.right_texts, picked.tolist(), strict=True) if chosen]
        auroc = scorer.auroc(pairs.images[picked], right, wrong)
        rows.append({"attribute": source.attributes[place].name, "auroc": auroc, "n": len(right)})
    return pd.DataFrame(rows)


def clip_table(run: Run, source: Source, scorer: ClipScorer, count: int = 512) -> pd.DataFrame:
    """`clip_card`; the AUROC of right texts against those with one attribute changed becomes a record.

    So does that of each attribute alone, see `clip_attributes`.
    """
    count = count if run.params.meaningful else count // 16
    pairs = known_pairs(source, count)
    auroc = scorer.auroc(pairs.images, pairs.right_texts, pairs.wrong_texts)
    write_record(run, "metric.clip.auroc", auroc, n=count, unit="share", modules=MODULES)
    for row in clip_attributes(scorer, source, count).to_dict("records"):
        id_ = f"metric.clip.auroc.{row['attribute']}"
        write_record(run, id_, row["auroc"], n=row["n"], unit="share", modules=MODULES)
    return clip_card(scorer, source, count)


@torch.no_grad()
def compliance_card(source: Source, encode: metrics.Encode, count: int = 256) -> pd.DataFrame:
    """What exact attribute compliance says of known answers, on held-out subjects.

    Args:
        source: draws the pictures.
        encode: pictures (B, 3, H, W) -> (B, N, D): the encoder, or `metrics.pixel_rows` for pixel space.
        count: pictures.

    Returns:
        One row for each case with `case`, `compliance`, the share of named attributes that are right, and `all`, the
        share of pictures in which all named ones are. Cases: what was asked; one named attribute changed; the same
        person in another view; another person; graded noise and blur.
    """
    pairs, candidates = known_pairs(source, count), metrics.Candidates(source, encode)
    generator = data.step_generator(SEED + 6, 0)
    cases = {
        "as asked": pairs.images,
        "one attribute wrong": source.render(pairs.subjects, pairs.wrong),
        "another view": source.render(source.other_view(pairs.subjects, generator), pairs.values),
        "another person": source.render(pairs.subjects.roll(1, 0), pairs.values),
        **corrupted(pairs.images, generator),
    }
    rows = []
    for case, images in cases.items():
        right = metrics.attribute_compliance(encode(images), pairs.subjects, pairs.values, pairs.named, candidates)
        complete = right.nan_to_num(1.0).all(1).float()  # (B,)
        rows.append({"case": case, "compliance": float(right.nanmean()), "all": float(complete.mean())})
    return pd.DataFrame(rows)
