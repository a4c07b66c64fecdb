"""What the curriculum is worth: identity, prompt compliance, and whose face a name brings back (paper, experiment 3).

Tables with one row for every request, like those of `experiments`. All people, names, looks and phrasings are held out.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from nmlib import chat, data, metrics, name_controls, personalization, prompts
from nmlib.chat import System
from nmlib.compliance import ClipScorer
from nmlib.config import PeopleConfig
from nmlib.conversation import Conversation, Round
from nmlib.data import ConversationFeatures
from nmlib.experiments import load_system, record_column
from nmlib.identity import FaceEmbedder, copy_paste_score
from nmlib.metrics import Candidates
from nmlib.names import names
from nmlib.people import PeopleSource
from nmlib.runtime import Run, progress

# what stands for SEED-X, the base of the curriculum, and the model after each of its stages
STAGES = ("base", "portrait", "stage1", "stage12", "stage123")
ABLATIONS = ("skip1", "skip2", "skip3", "reversed", "joint", "paired")  # as many steps in another order, or mixed
DELAY, BATCH = 3, 64
LOOK_ALIKE = 0.9  # distance of the identity numbers; two people drawn by chance are about 2.8 apart


def probe_settings(run: Run, **changes: object) -> PeopleConfig:
    """Settings of test conversations: as many as the run evaluates, introductions and requests in different views."""
    return run.params.people["paired"].model_copy(
        update={"conversations": run.params.experiments.conversations, "full_body_share": 0.0, **changes}
    )


def _encode(system: System, source: PeopleSource, told: Sequence[Conversation]) -> ConversationFeatures:
    return data.encode_conversations(personalization.with_images(source, told, "paired"), system.encode)


def probes(run: Run, count: int | None = None) -> list[Conversation]:
    """The test conversations of `personal_table`, or the first of them with their pictures."""
    source = data.open_people(run.params.source)
    told = personalization.probe_conversations(source, probe_settings(run), people=1, delay=DELAY)
    return told if count is None else personalization.with_images(source, told[:count], "paired")


def answer(system: System, features: ConversationFeatures) -> tuple[Tensor, list[int | None]]:
    """What a model shows in the last round of conversations of one length, reading its own pictures before.

    Returns:
        Tokens (B, N, D_feature), and the base that each reply names.
    """
    last = len(features.conversations[0]) - 1
    shown, bases = [], []
    for start in range(0, len(features.conversations), BATCH):
        rows = range(start, min(start + BATCH, len(features.conversations)))
        told, true = features.take(rows)
        result = chat.rollout(system.model, system.template, told, true)
        shown.append(result.predictions[:, last])
        bases += result.bases(last)
    return torch.cat(shown), bases  # (B, N, D)


def pictures_after(run: Run, stages: Sequence[str], told: Sequence[Conversation]) -> dict[str, list[Tensor]]:
    """What each stage shows for the last requests of the same conversations, (3, H, W) each."""
    source, shown = data.open_people(run.params.source), {}
    for stage in stages:
        system = load_system(run, stage)
        shown[stage] = list(system.decode(answer(system, _encode(system, source, told))[0]))
    return shown


def _state(item: Round) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Subject and values of a round of the world, which knows both."""
    assert item.subject is not None and item.values is not None
    return item.subject, item.values


def _tensors(items: Sequence[Round]) -> tuple[Tensor, Tensor]:
    """Subjects (B, S) and values (B, A) of rounds."""
    states = [_state(item) for item in items]
    return torch.tensor([subject for subject, _ in states]), torch.tensor([values for _, values in states])


def other_pictures(source: PeopleSource, items: Sequence[Round], seed: int = 0) -> Tensor:
    """Another true picture of the person of each round: other view, other looks, (B, 3, H, W)."""
    generator = data.step_generator(seed + 61, 0)
    subjects = source.other_view(_tensors(items)[0], generator)  # (B, S)
    values = data.sample_values(source, len(subjects), generator)  # (B, A)
    values[:, -2:] = 0  # own framing and pose
    return source.render(subjects, values)


def compliance(shown: Tensor, items: Sequence[Round], candidates: Candidates) -> Tensor:
    """Share of the attributes named in each request that the picture shows, (B,)."""
    subjects, values = _tensors(items)
    named = torch.tensor([[a.name in item.named for a in candidates.source.attributes] for item in items])  # (B, A)
    right = metrics.attribute_compliance(shown, subjects, values, named, candidates)  # (B, A)
    return right.nanmean(1)


def personal_table(
    run: Run, stages: Sequence[str], embedder: FaceEmbedder, scorer: ClipScorer | None, seeds: int = 1
) -> pd.DataFrame:
    """Identity and compliance of requests by name, three rounds after one person was introduced.

    Columns: `identity`, the similarity to another true picture of the person; `reference`, to the picture of the
    introduction; `copy_paste`, see `identity.copy_paste_score`; `compliance`, the share of the named attributes that
    are right; `clip`, the score of picture and request; `named`, whether the reply names the introduction; `ceiling`
    and `floor`, the identity of the true picture of the request and of a stranger's.

    Args:
        run: holds the trained stages.
        stages: to compare.
        embedder: tells faces apart.
        scorer: judges pictures by the words of a request; none leaves `clip` empty.
        seeds: trainings of each stage.

    Returns:
        One row for every (stage, seed, conversation).
    """
    source, told = data.open_people(run.params.source), probes(run)
    items = [conversation.rounds[-1] for conversation in told]
    intros = [conversation.rounds[item.base or 0] for conversation, item in zip(told, items, strict=True)]
    others = embedder(other_pictures(source, items))  # (B, E)
    references, truth = (embedder(source.render(*_tensors(rounds))) for rounds in (intros, items))
    rows: list[dict[str, object]] = []
    features: ConversationFeatures | None = None
    candidates: Candidates | None = None
    for stage, seed in progress([(stage, seed) for seed in range(seeds) for stage in stages], desc="people"):
        system = load_system(run, stage, seed)
        features = features or _encode(system, source, told)
        candidates = candidates or Candidates(source, system.encode)
        shown, bases = answer(system, features)
        pictures = system.decode(shown)  # (B, 3, H, W)
        faces = embedder(pictures)  # (B, E)
        columns = {
            "identity": (faces * others).sum(1),
            "reference": (faces * references).sum(1),
            "copy_paste": copy_paste_score(faces, references, others),
            "compliance": compliance(shown, items, candidates),
            "psnr": metrics.psnr(pictures, source.render(*_tensors(items))),
            "clip": _clip(scorer, run, pictures, items),
            "named": torch.tensor([float(base == item.base) for base, item in zip(bases, items, strict=True)]),
            "ceiling": (truth * others).sum(1),
            "floor": (truth * others.roll(1, 0)).sum(1),
        }
        rows += [
            {"stage": stage, "seed": seed, "conversation": conversation.id}
            | {name: float(column[row]) for name, column in columns.items()}
            for row, conversation in enumerate(told)
        ]
    return pd.DataFrame(rows)


def _clip(scorer: ClipScorer | None, run: Run, pictures: Tensor, items: Sequence[Round]) -> Tensor:
    """Score of each picture and a description of all that its request names and a picture can show, (B,)."""
    if scorer is None:
        return torch.full((len(items),), float("nan"))
    world = data.open_source(run.params.source)
    named = torch.tensor([[a.name in item.named for a in world.attributes] for item in items])  # (B, A)
    values = _tensors(items)[1][:, : len(world.attributes)]  # (B, A)
    return scorer.score(pictures, prompts.describe(random.Random(0), world, values, named, "any"))


def record_personal(run: Run, table: pd.DataFrame, minutes: float) -> None:
    """Write the records of `personal_table`: every stage, the ceiling and the floor."""
    units = {"identity": "cosine", "reference": "cosine", "copy_paste": "", "compliance": "share", "clip": "cosine",
             "named": "share", "psnr": "dB"}  # fmt: skip
    for stage, part in table.groupby("stage"):
        for column, unit in units.items():
            if part[column].notna().any():
                cut = part[part[column].notna()]
                record_column(run, f"people.{column}.{stage}", cut, column, minutes, unit, "people_experiments")
    one = table[(table["stage"] == table["stage"].iloc[0]) & (table["seed"] == 0)]
    for column in ("ceiling", "floor"):
        record_column(run, f"people.identity.{column}", one, column, minutes, "cosine", "people_experiments")


def _people_states(conversation: Conversation) -> dict[int, tuple[tuple[float, ...], tuple[int, ...]]]:
    """The state that the last request would show of every person introduced, by the round of the introduction."""
    asked = conversation.rounds[-1]
    _, wanted = _state(asked)
    found = {}
    for index, item in enumerate(conversation.rounds[:-1]):
        if item.kind != "introduce":
            continue
        subject, values = _state(item)
        changed = [
            w if place in _named_places(asked) else v for place, (w, v) in enumerate(zip(wanted, values, strict=True))
        ]
        found[index] = (subject, tuple(changed))
    return found


def _named_places(item: Round) -> set[int]:
    return {place for place, attribute in enumerate(PeopleSource.attributes) if attribute.name in item.named}


def picked(shown: Tensor, told: Sequence[Conversation], candidates: Candidates) -> Tensor:
    """Whether each picture is nearer to the right person than to the others who were introduced, (B,) bool."""
    right = []
    for row, conversation in enumerate(told):
        states = _people_states(conversation)
        distance = (candidates.features(list(states.values())) - shown[row]).square().mean((1, 2))  # (K,)
        right.append(list(states)[int(distance.argmin())] == conversation.rounds[-1].base)
    return torch.tensor(right)  # (B,)


def controlled(told: Sequence[Conversation], control: str) -> list[Conversation]:
    """Conversations as they are (`none`), with everybody renamed, or with names shuffled among the people."""
    if control == "none":
        return list(told)
    if control == "shuffled":
        generator = data.step_generator(62, 0)
        return [name_controls.shuffle_names(conversation, generator) for conversation in told]
    pool = names("heldout")
    return [name_controls.rename_everybody(c, dict(zip(pool, pool[7:] + pool[:7], strict=True))) for c in told]


def names_table(
    run: Run, stage: str, people: Sequence[int] = (2, 3), delays: Sequence[int] = (1, 2, 4, 8), seeds: int = 1
) -> pd.DataFrame:
    """Name to face: is the person who is shown the one who was asked for, among look-alikes?

    Two controls: with everybody renamed the answer should not change, with names shuffled it should fall to chance.

    Returns:
        One row for every (seed, people, delay, control, conversation) with `accuracy` and `chance`.
    """
    source, rows = data.open_people(run.params.source), []
    settings = probe_settings(
        run, look_alike_distance=LOOK_ALIKE, conversations=run.params.experiments.conversations // 2
    )
    for seed in range(seeds):
        system = load_system(run, stage, seed)
        candidates = Candidates(source, system.encode)
        for count, delay in progress([(count, delay) for count in people for delay in delays], desc="names"):
            told = personalization.probe_conversations(source, settings, people=count, delay=delay)
            for control in ("none", "renamed", "shuffled") if delay == max(delays) else ("none",):
                asked = controlled(told, control)
                shown, _ = answer(system, _encode(system, source, asked))
                for conversation, right in zip(asked, picked(shown, asked, candidates).tolist(), strict=True):
                    rows.append(
                        {"stage": stage, "seed": seed, "people": count, "delay": delay, "control": control,
                         "conversation": conversation.id, "accuracy": float(right), "chance": 1 / count}
                    )  # fmt: skip
    return pd.DataFrame(rows)


def record_names(run: Run, table: pd.DataFrame, minutes: float) -> None:
    """Write the records of `names_table`."""
    for (count, delay, control), part in table.groupby(["people", "delay", "control"]):
        suffix = "" if control == "none" else f".{control}"
        id_ = f"names.accuracy.people{count}.delay{delay}{suffix}"
        record_column(run, id_, part, "accuracy", minutes, "share", "people_experiments")


def open_scorer(run: Run) -> ClipScorer | None:
    """The CLIP of a run, if it has one."""
    folder: Path = run.path("clip")
    return ClipScorer(folder) if folder.is_dir() else None
