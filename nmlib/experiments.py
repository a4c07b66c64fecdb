"""The experiments of the paper, each a function that returns a table and writes records.

A table has one row for every conversation (and round) measured, so that any average, interval or cut can be made
from it later. Records hold the averages with their 95% bootstrap intervals over conversations.
"""

import hashlib
import random
import time
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nmlib import batches, chat, codec, curriculum, data, metrics, rollback, train
from nmlib.chat import POLICIES, Policy, System
from nmlib.config import DataConfig
from nmlib.conversation import Conversation, Edit
from nmlib.identity import FaceEmbedder
from nmlib.metrics import Candidates
from nmlib.personalization import OWN
from nmlib.records import write_record
from nmlib.rollback import ConversationBuilder, ExactEditor
from nmlib.runtime import Run, progress
from nmlib.sources import Source, attribute_index

BATCH = 64
PROBE_SEED = 90_000
BESIDE_THE_FACE = ("background", "shirt")


def load_system(run: Run, stage: str, seed: int = 0) -> System:
    """Encoder, detokenizer and the model of a stage, ready to talk."""
    model, template = curriculum.load_model(run.path(f"{curriculum.model_name(stage, seed)}.safetensors"))
    return System(codec.load_encoder(run), codec.load_detokenizer(run), model, template, run.params.source.image_size)


def read_sets(run: Run, names: Iterable[str]) -> dict[str, data.ConversationFeatures]:
    """Data sets of a run by name, with the features of its encoder; computed on the first call and kept.

    Of several processes the main one computes them, and the others read its files.
    """
    encoder = codec.load_encoder(run)
    key = hashlib.sha256(run.path("encoder.safetensors").read_bytes()).hexdigest()

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        return encoder(images.float() / 255)  # (B, N, D)

    with train.processes().main_process_first():
        return {name: batches.load(run.params, name, run.path("data", name), encode, key) for name in names}


class AnswerableEditor(ExactEditor):
    """Edits of any state that somebody who saw the conversation can make.

    "Remove the hair dye" has no right answer while every picture shows dyed hair: nobody knows the colour. The Markov
    ceiling, which takes every edit to be as likely as any other, counts these few in. Training keeps them: people do
    ask such things, and then a plausible colour is the best that a model can draw.
    """

    def propose(self, conversation: Conversation, base: int, rng: random.Random) -> tuple[Edit | None, str] | None:
        """As `ExactEditor.propose`, until an edit needs no look that no picture has shown."""
        for _ in range(100):
            proposal = super().propose(conversation, base, rng)
            if proposal is None or self._was_shown(conversation, proposal[0]):
                return proposal
        return None

    def _was_shown(self, conversation: Conversation, edit: Edit | None) -> bool:
        if edit is None or edit.value != OWN:
            return True
        place = attribute_index(self.source, edit.attribute)
        own = self.source.attributes[place].values.index(OWN)
        return any(item.values is not None and item.values[place] == own for item in conversation.rounds)


def probe_conversations(
    source: Source, count: int, rounds: int, depth: int, *, phrasing: str = "heldout", seed: int = PROBE_SEED
) -> list[Conversation]:
    """Test conversations: a Markov chain of held-out subjects, then one rollback of exactly `depth`.

    Half of them also make a new edit there. Identities and phrasings are held out; states are drawn freely, so
    that one in eight ends in a combination of values that training never shows. Every request has a right answer.

    Args:
        source: an exact source.
        count: conversations.
        rounds: length, with the rollback as the last round; 0 depth makes the last round an ordinary edit.
        depth: how many rounds before the last picture the base lies.
        phrasing: `heldout` or `train`.
        seed: of subjects, states and words.
    """
    generator = torch.Generator().manual_seed(seed + depth)
    subjects = source.sample_subjects(count, "heldout", generator)  # (B, S)
    settings = DataConfig(conversations=count, rounds=(rounds,))
    editor = AnswerableEditor(source, "any")
    builder = ConversationBuilder(source.attributes, editor, settings, phrasing)
    conversations = []
    for index, subject in enumerate(subjects):
        rng = random.Random(f"{seed}.{depth}.{index}")
        conversation = rollback.open_conversation(source, f"probe-{depth}-{index:04d}", subject, rng, split="any")
        while len(conversation) < rounds - (depth > 0):
            conversation = builder.edit(conversation, len(conversation) - 1, rng)
        if depth:
            conversation = builder.roll_back(conversation, depth, rng, branch=index % 2 == 1)
        conversations.append(conversation)
    return conversations


def _batches(features: data.ConversationFeatures) -> Iterable[tuple[list[Conversation], Tensor]]:
    count = len(features.conversations)
    for start in range(0, count, BATCH):
        yield features.take(range(start, min(start + BATCH, count)))


def rollback_table(run: Run, source: Source, stages: Sequence[str], seeds: int = 1) -> pd.DataFrame:
    """Rollback accuracy by depth: full state and base retrieval, on the model's own and on true history.

    Args:
        run: holds the trained stages.
        source: an exact source.
        stages: names of the stages to compare.
        seeds: trainings of each.

    Returns:
        One row for every (stage, seed, history, depth, conversation).
    """
    rounds = max(run.params.experiments.depths) + 2
    count = run.params.experiments.conversations
    candidates: Candidates | None = None
    rows: list[dict[str, object]] = []
    cases = [(stage, seed) for seed in range(seeds) for stage in stages]
    for stage, seed in progress(cases, desc="rollback"):
        system = load_system(run, stage, seed)
        candidates = candidates or Candidates(source, system.encode)
        for depth in run.params.experiments.depths:
            probes = rollback.with_images(source, probe_conversations(source, count, rounds, depth))
            for batch in _batches(data.encode_conversations(probes, system.encode)):
                for history in ("own", "clean"):
                    rows += [
                        {"stage": stage, "seed": seed, "history": history, "depth": depth, **row}
                        for row in _rollback_rows(system, candidates, batch, history)
                    ]
    return pd.DataFrame(rows)


def _rollback_rows(
    system: System, candidates: Candidates, batch: tuple[list[Conversation], Tensor], history: str
) -> list[dict[str, object]]:
    conversations, features = batch
    last = len(conversations[0]) - 1
    policy = chat.history_policy(system, "oracle" if history == "clean" else "tokens")
    result = chat.rollout(system.model, system.template, conversations, features, policy)
    shown = result.predictions[:, last]  # (B, N, D)
    right = metrics.read_attributes(shown, conversations, last, candidates)  # (B, A)
    retrieved = metrics.base_retrieved(shown, conversations, last, candidates)  # (B,)
    rows = []
    for index, conversation in enumerate(conversations):
        item = conversation.rounds[last]
        named = result.bases(last)[index]
        rows.append(
            {
                "conversation": conversation.id,
                "accuracy": float(right[index].all()),
                "retrieval": float(retrieved[index]),
                "named": float("nan") if named is None else float(named == item.base),
                "chance": metrics.retrieval_chance(candidates.source, conversation, last),
                "ceiling": metrics.markov_ceiling(candidates.source, conversation, last),
                "reference": item.reference,
                "branch": item.edit is not None,
                "heldout_state": rollback.is_heldout_state(item.values or ()),
                **{a.name: float(right[index, p]) for p, a in enumerate(candidates.source.attributes)},
            }
        )
    return rows


def record_rollback(run: Run, table: pd.DataFrame, minutes: float) -> None:
    """Write the records of `rollback_table`."""
    for (stage, history, depth), part in table.groupby(["stage", "history", "depth"]):
        suffix = "" if history == "own" else "_clean"
        for column, name in (("accuracy", f"accuracy{suffix}"), ("retrieval", f"retrieval{suffix}")):
            record_column(run, f"rollback.{name}.depth{depth}.{stage}_trained", part, column, minutes)
        if history == "own":
            for reference, cut in part.groupby("reference"):
                record_column(
                    run, f"rollback.accuracy.depth{depth}.{stage}_trained.{reference}", cut, "accuracy", minutes
                )
            cut = part[part["heldout_state"]]
            if len(cut):
                name = f"rollback.accuracy_heldout_states.depth{depth}.{stage}_trained"
                record_column(run, name, cut, "accuracy", minutes)
    one = table[(table["stage"] == table["stage"].iloc[0]) & (table["history"] == "own") & (table["seed"] == 0)]
    for depth, part in one.groupby("depth"):
        record_column(run, f"rollback.accuracy.depth{depth}.ceiling", part, "ceiling", minutes)
        record_column(run, f"rollback.retrieval.depth{depth}.chance", part, "chance", minutes)


def record_column(
    run: Run,
    id_: str,
    part: pd.DataFrame,
    column: str,
    minutes: float,
    unit: str = "share",
    module: str = "experiments",
) -> None:
    """Record the mean of a column of a table with its interval over conversations and trainings."""
    seeds = int(part["seed"].nunique()) if "seed" in part else 1
    interval = metrics.column_interval(part, column, run.params.experiments.bootstrap)
    write_record(
        run, id_, interval.value, low=interval.low, high=interval.high, n=interval.n, seeds=seeds, unit=unit,
        minutes=minutes, modules=(module,),
    )  # fmt: skip


def edit_table(run: Run, source: Source, stages: Sequence[str], seeds: int = 1) -> pd.DataFrame:
    """Single-round edits: a picture is uploaded and edited once.

    Returns:
        One row for every (stage, seed, conversation).
    """
    probes = probe_conversations(source, run.params.experiments.conversations, 2, 0)
    rows: list[dict[str, object]] = []
    candidates: Candidates | None = None
    for stage, seed in [(stage, seed) for seed in range(seeds) for stage in stages]:
        system = load_system(run, stage, seed)
        candidates = candidates or Candidates(source, system.encode)
        for conversations, features in _batches(
            data.encode_conversations(rollback.with_images(source, probes), system.encode)
        ):
            shown = chat.rollout(system.model, system.template, conversations, features).predictions[:, 1]
            right = metrics.read_attributes(shown, conversations, 1, candidates).all(1)
            rows += [
                {"stage": stage, "seed": seed, "conversation": c.id, "accuracy": float(r)}
                for c, r in zip(conversations, right, strict=True)
            ]
    return pd.DataFrame(rows)


def record_edits(run: Run, table: pd.DataFrame, minutes: float) -> None:
    """Write the records of `edit_table`."""
    for stage, part in table.groupby("stage"):
        record_column(run, f"edit.accuracy.{stage}_trained", part, "accuracy", minutes)


def drift_table(run: Run, source: Source, stage: str, embedder: FaceEmbedder, seeds: int = 1) -> pd.DataFrame:
    """Long Markov conversations under the four history policies.

    Every round is decoded and compared with the exact picture of that round.

    Returns:
        One row for every (seed, policy, conversation, round) with `psnr`, `ssim`, `identity` (similarity of the
        embedder between the decoded and the exact picture) and `accuracy` (full state).
    """
    settings = run.params.experiments
    told = probe_conversations(source, settings.drift_conversations, settings.drift_rounds, 0)
    return _drift(run, source, stage, told, POLICIES, embedder, seeds)


def face_drift(
    run: Run, source: Source, stage: str, embedder: FaceEmbedder, rounds: int = 11, seeds: int = 1
) -> pd.DataFrame:
    """The same over edits of portraits that do not touch the face (wall and shirt), tokens kept against re-encoded."""
    subjects = source.sample_subjects(run.params.experiments.drift_conversations, "heldout", data.step_generator(63, 0))
    settings = DataConfig(conversations=1, rounds=(rounds,))
    builder = ConversationBuilder(source.attributes, ExactEditor(source, "any"), settings, "heldout")
    told = []
    for index, subject in enumerate(subjects):
        rng = random.Random(f"face.{index}")
        conversation = rollback.open_conversation(source, f"face-{index:03d}", subject, rng, split="any")
        while len(conversation) < rounds:
            longer = builder.edit(conversation, len(conversation) - 1, rng)
            edit = longer.rounds[-1].edit
            conversation = longer if edit is not None and edit.attribute in BESIDE_THE_FACE else conversation
        told.append(conversation)
    kept: tuple[Policy, ...] = ("tokens", "reencode")
    return _drift(run, source, stage, told, kept, embedder, seeds)


def _drift(
    run: Run,
    source: Source,
    stage: str,
    told: Sequence[Conversation],
    policies: Sequence[Policy],
    embedder: FaceEmbedder,
    seeds: int,
) -> pd.DataFrame:
    """Every round of conversations of one length under every policy and every training of a stage."""
    systems = (load_system(run, stage, seed) for seed in range(seeds))
    tables = [_drift_of(system, source, told, policies, embedder) for system in systems]
    return pd.concat(tables, keys=range(seeds), names=["seed"]).reset_index("seed")


def _drift_of(
    system: System,
    source: Source,
    told: Sequence[Conversation],
    policies: Sequence[Policy],
    embedder: FaceEmbedder,
) -> pd.DataFrame:
    """The same of one model, compared with the exact pictures."""
    candidates = Candidates(source, system.encode)
    encoded = data.encode_conversations(rollback.with_images(source, told), system.encode)
    rows: list[dict[str, object]] = []
    for policy in progress(policies, desc="drift"):
        for conversations, features in _batches(encoded):
            history = chat.history_policy(system, policy)
            result = chat.rollout(
                system.model, system.template, conversations, features, history, recompute=policy == "tokens"
            )
            for index in range(1, len(told[0])):
                shown = result.predictions[:, index]  # (B, N, D)
                rows += _drift_rows(system, candidates, embedder, conversations, shown, index, policy)
    return pd.DataFrame(rows)


def _drift_rows(
    system: System,
    candidates: Candidates,
    embedder: FaceEmbedder,
    conversations: list[Conversation],
    shown: Tensor,
    index: int,
    policy: str,
) -> list[dict[str, object]]:
    truth = torch.stack([c.images[index] for c in conversations if c.images is not None]).float() / 255
    pictures = system.decode(shown)  # (B, 3, H, W)
    identity = (embedder(pictures) * embedder(truth)).sum(1)  # (B,)
    quality, structure = metrics.psnr(pictures, truth), metrics.ssim(pictures, truth)
    right = metrics.read_attributes(shown, conversations, index, candidates).all(1)
    return [
        {
            "policy": policy, "conversation": c.id, "round": index, "psnr": float(quality[i]),
            "ssim": float(structure[i]), "identity": float(identity[i]), "accuracy": float(right[i]),
        }
        for i, c in enumerate(conversations)
    ]  # fmt: skip


def record_drift(run: Run, table: pd.DataFrame, minutes: float) -> None:
    """Write the records of `drift_table`: every policy at rounds 1, 5, 10 and the last, and what keeping tokens gains.

    The gain is the difference between `tokens` and `reencode` in each conversation.
    """
    last = int(table["round"].max())
    wide = table.pivot(index=["round", "seed", "conversation"], columns="policy", values=["identity", "psnr"])
    for column, unit in (("psnr", "dB"), ("identity", "cosine")):
        gains = (wide[column]["tokens"] - wide[column]["reencode"]).rename("gain").reset_index()
        for index, part in gains.groupby("round"):
            if index in (1, 5, 10, last):
                record_column(run, f"drift.{column}_gain.round{index}", part, "gain", minutes, unit)
    for (policy, index), part in table.groupby(["policy", "round"]):
        if index in (1, 5, 10, last):
            for column, unit in (("psnr", "dB"), ("ssim", ""), ("identity", "cosine"), ("accuracy", "share")):
                record_column(run, f"drift.{column}.round{index}.{policy}", part, column, minutes, unit)


def record_face_drift(run: Run, table: pd.DataFrame, minutes: float) -> None:
    """Write what identity loses in a round of `face_drift`: the slope of a line through each conversation."""
    for policy, part in table.groupby("policy"):
        slopes = [
            {"seed": seed, "conversation": name, "slope": np.polyfit(cut["round"], cut["identity"], 1)[0]}
            for (seed, name), cut in part.groupby(["seed", "conversation"])
        ]
        record_column(run, f"drift.slope.{policy}", pd.DataFrame(slopes), "slope", minutes, "a round")


class Stopwatch:
    """Minutes since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def minutes(self) -> float:
        """Minutes so far."""
        return (time.perf_counter() - self._start) / 60
