"""Where the paper's two ideas stop being worth it: token caching by detokenizer, rollback supervision by model.

Three tables, each with a row for every conversation, so that the benefit is a difference of pairs:

- caching: kept tokens against decoding and encoding again, with detokenizers of one training stopped early;
- capacity: whether replies name the right base, for models of several sizes trained on chains or with rollback;
- history: trained stages asked for an earlier picture in ever longer conversations.
"""

import pandas as pd
import torch
from torch import Tensor

from nmlib import batches, chat, checkpoint, codec, curriculum, data, experiments, layout, metrics, rollback, train
from nmlib.chat import System
from nmlib.config import BreaksConfig, ModelConfig, ModelSize, Params, StageConfig
from nmlib.conversation import Conversation
from nmlib.experiments import BATCH, load_system, probe_conversations, record_column
from nmlib.identity import SubjectEmbedder
from nmlib.layout import Template
from nmlib.metrics import Candidates
from nmlib.mllm import HistoryMLLM
from nmlib.runtime import Run, compute_dtype, progress
from nmlib.sources import Source

SUPERVISION = ("markov", "rollback")  # stages, by what they were trained on
TRAINED = "trained"  # the run's own detokenizer, beside those of a training stopped early
FOLDER = "breaks"
MEASURED = {"psnr": "dB", "identity": "cosine", "accuracy": "share"}


def breaks_settings(run: Run) -> BreaksConfig:
    """The params' `breaks:` block.

    Raises:
        ValueError: the params have none.
    """
    if run.params.breaks is None:
        raise ValueError(f"params {run.params.name!r}: no `breaks:` block; add one, as params/cpu.yaml has")
    return run.params.breaks


# ---------------------------------------------------------------------------------------------------------
# caching, by the quality of the detokenizer


def train_snapshots(run: Run, source: Source) -> dict[str, str]:
    """Train a detokenizer as the run's own was and keep it as it is after each of `breaks.detokenizer_steps`.

    The weights are those of the step: the running average still is half its start there.

    Returns:
        Names for `codec.load_detokenizer`, from worst to best, by `step50` and so on; `trained` is the run's own.
    """
    params, wanted = run.params, sorted(breaks_settings(run).detokenizer_steps)
    names = {step: f"{FOLDER}/detokenizer-{step}" for step in wanted}
    _, metadata = checkpoint.load(run.path("detokenizer.safetensors"))
    key = train.training_key(run, "break_conditions", 0, params.source, params.vision, params.detokenizer)
    if any(train.made(run.path(f"{name}.safetensors"), key) is None for name in names.values()):
        module, batch_at = codec.detokenizer_training(run, source, codec.load_encoder(run))
        training = train.Training(module, params.detokenizer.optim, run.path(names[wanted[-1]]), params.seed)
        module.train()
        for step in progress(range(wanted[-1]), desc="detokenizers"):
            losses = training.update(batch_at(step), compute_dtype(params.precision))
            if training.step in names:
                history = [{"step": step, "total": float(losses.total.detach())}]
                path = run.path(f"{names[training.step]}.safetensors")
                checkpoint.save(path, module.state_dict(), metadata | {"history": history, "key": key})
    return {f"step{step}": name for step, name in names.items()} | {TRAINED: "detokenizer"}


def caching_table(run: Run, source: Source, embedder: SubjectEmbedder, stage: str = "rollback") -> pd.DataFrame:
    """Long Markov conversations with tokens kept against pictures encoded again, for every detokenizer.

    Returns:
        One row for every (detokenizer, policy, conversation) with `quality`, the PSNR of that detokenizer on held-out
        pictures, and of the last round `psnr`, `identity` and `accuracy` (full state, read from the tokens).
    """
    settings, own = breaks_settings(run), load_system(run, stage)
    probes = probe_conversations(source, settings.conversations, settings.drift_rounds, 0)
    told, true = data.encode_conversations(rollback.with_images(source, probes), own.encode).take(range(len(probes)))
    candidates = Candidates(source, own.encode)
    kept = chat.rollout(own.model, own.template, told, true).predictions[:, -1]  # (B, N, D_feature)
    rows: list[dict[str, object]] = []
    for label, name in progress(train_snapshots(run, source).items(), desc="caching"):
        system = System(own.encoder, codec.load_detokenizer(run, name), own.model, own.template, own.image_size)
        again = chat.rollout(own.model, own.template, told, true, chat.history_policy(system, "reencode"))
        shared: dict[str, object] = {"detokenizer": label, "quality": reconstruction_psnr(system, source)}
        for policy, shown in (("tokens", kept), ("reencode", again.predictions[:, -1])):
            measured = _last_round(system, candidates, embedder, told, shown)
            rows += [shared | {"policy": policy} | row for row in measured]
    return pd.DataFrame(rows)


def reconstruction_psnr(system: System, source: Source, count: int = BATCH) -> float:
    """Mean PSNR in dB of held-out pictures, encoded and decoded."""
    images = data.sample_pictures(source, count, "heldout", data.step_generator(experiments.PROBE_SEED, 1))[2]
    return float(metrics.psnr(system.decode(system.encode(images)), images).mean())


def _last_round(
    system: System, candidates: Candidates, embedder: SubjectEmbedder, told: list[Conversation], shown: Tensor
) -> list[dict[str, object]]:
    """How the tokens (B, N, D_feature) of the last round compare with the exact picture."""
    exact = torch.stack([c.images[-1] for c in told if c.images is not None]).float() / 255  # (B, 3, H, W)
    pictures = system.decode(shown)  # (B, 3, H, W)
    columns = {
        "psnr": metrics.psnr(pictures, exact),
        "identity": (embedder(pictures) * embedder(exact)).sum(1),
        "accuracy": metrics.read_attributes(shown, told, len(told[0]) - 1, candidates).all(1),
    }
    return [{"conversation": c.id, **{n: float(v[row]) for n, v in columns.items()}} for row, c in enumerate(told)]


def caching_benefit(table: pd.DataFrame) -> pd.DataFrame:
    """Kept tokens minus encoding again, for every (detokenizer, conversation) of `caching_table`."""
    index, values = ["detokenizer", "quality", "conversation"], list(MEASURED)
    kept, again = (
        table[table["policy"] == policy].set_index(index)[values].astype(float) for policy in ("tokens", "reencode")
    )
    return (kept - again).reset_index()


def record_caching(run: Run, table: pd.DataFrame, minutes: float) -> None:
    """Write the quality of every detokenizer, and the benefit of caching with it."""
    for name, part in caching_benefit(table).groupby("detokenizer"):
        record_column(run, f"breaks.quality.{name}", part.head(1), "quality", minutes, "dB", "break_conditions")
        for column, unit in MEASURED.items():
            id_ = f"breaks.caching.{column}.{name}"
            record_column(run, id_, part, column, minutes, unit, "break_conditions")


# ---------------------------------------------------------------------------------------------------------
# rollback supervision, by the size of the model


def size_name(size: ModelSize) -> str:
    """A size in short, for example `192x4`: width and layers."""
    return f"{size.hidden_size}x{size.layers}"


def sized_settings(params: Params, size: ModelSize) -> ModelConfig:
    """The params' model in another size."""
    return ModelConfig.model_validate(params.model.model_dump() | size.model_dump())


def word_stage(run: Run, name: str) -> StageConfig:
    """A stage of the run, with the words alone and the steps of `breaks:`."""
    settings, stage = breaks_settings(run), run.params.stage(name)
    optim = stage.optim.model_copy(update={"steps": settings.word_steps})
    return stage.model_copy(update={"word_rounds": settings.word_rounds, "optim": optim})


def train_words(run: Run, size: ModelSize, name: str) -> tuple[HistoryMLLM, Template]:
    """A fresh model of a size that learned the words of a stage; trained on the first call and kept."""
    params, stage, settings = run.params, word_stage(run, name), sized_settings(run.params, size)
    speaker, result = data.speaker(params), f"{FOLDER}/words-{size_name(size)}-{name}"
    tokenizer = layout.build_tokenizer(speaker.attributes, params.tokens_per_image, settings.max_rounds, speaker.names)
    torch.manual_seed(params.seed)
    model, template = curriculum.new_model(settings, tokenizer, params.tokens_per_image, params.vision.feature_dim)
    used = (*batches.settings_of(params, stage), settings)
    key, path = train.training_key(run, "break_conditions", 0, *used), run.path(f"{result}.safetensors")
    if train.made(path, key) is None:

        def batch_at(step: int) -> dict[str, layout.Layout]:
            return {"words": batches.word_batch(params, stage, template, step, params.seed + 7)}

        history = train.run_training(run, result, model, batch_at, stage.optim, params.seed, key)
        train.finish(run, result, model.state_dict(), {"history": history, "key": key})
    return checkpoint.freeze(model, checkpoint.load(path)[0], path), template


@torch.no_grad()
def named_bases(model: HistoryMLLM, template: Template, told: list[Conversation]) -> Tensor:
    """Whether the words of the last reply name the right base, each word foreseen from the right ones before it.

    Args:
        model: reads the conversations without pictures.
        template: of the model.
        told: conversations that end in a rollback.

    Returns:
        (B,) bool.
    """
    words = template.packed(told, pictures=False)
    hidden_states = model.read_words(words)  # (B, T, D)
    markers = [template.marker_id(index) for index in range(model.settings.max_rounds)]
    right = []
    for row, conversation in enumerate(told):
        last = words.rounds[row] == len(conversation) - 1  # (T,)
        base = template.marker_id(conversation.rounds[-1].base or 0)
        place = (last & (words.labels[row] == base)).nonzero()[0]  # where the base is to be said
        said = model.base_llm.lm_head(hidden_states[row, place])[0, markers]  # (max_rounds,)
        right.append(markers[int(said.argmax())] == base)
    return torch.tensor(right)  # (B,)


def capacity_table(run: Run, source: Source) -> pd.DataFrame:
    """Models of several sizes, trained on chains or with rollback for the same steps: do they name the right base?

    Returns:
        One row for every (size, trained, conversation) with `named` and the number of `weights`.
    """
    settings, rows = breaks_settings(run), []
    length = max(run.params.data["rollback"].rounds)
    told = probe_conversations(source, settings.conversations, length, settings.depth)
    for size in settings.sizes:
        for name in SUPERVISION:
            model, template = train_words(run, size, name)
            weights = sum(p.numel() for p in model.base_llm.model.layers.parameters())
            right = torch.cat([named_bases(model, template, told[i : i + BATCH]) for i in range(0, len(told), BATCH)])
            rows += [
                {"size": size_name(size), "weights": weights, "trained": name, "conversation": c.id, "named": float(r)}
                for c, r in zip(told, right, strict=True)
            ]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------------------
# rollback supervision, by the length of the history


def history_table(run: Run, source: Source) -> pd.DataFrame:
    """The trained stages, asked for a picture `depth` rounds before the last one in ever longer conversations.

    Returns:
        One row for every (rounds, trained, conversation) with `named`, `retrieval` and `accuracy`.
    """
    settings, rows = breaks_settings(run), list[dict[str, object]]()
    systems = {name: load_system(run, name) for name in SUPERVISION}
    candidates = Candidates(source, systems[SUPERVISION[0]].encode)
    for rounds in progress(settings.rounds, desc="history"):
        probes = probe_conversations(source, settings.conversations, rounds, settings.depth)
        encoded = data.encode_conversations(rollback.with_images(source, probes), systems[SUPERVISION[0]].encode)
        for name, system in systems.items():
            shared = {"rounds": rounds, "trained": name}
            rows += [shared | row for row in _asked_back(system, candidates, *encoded.take(range(len(probes))))]
    return pd.DataFrame(rows)


def _asked_back(
    system: System, candidates: Candidates, told: list[Conversation], true: Tensor
) -> list[dict[str, object]]:
    """What a model makes of conversations that end in a rollback, reading its own pictures."""
    result, last = chat.rollout(system.model, system.template, told, true), len(told[0]) - 1
    shown = result.predictions[:, last]  # (B, N, D_feature)
    named = [said == c.rounds[last].base for said, c in zip(result.bases(last), told, strict=True)]
    columns = {
        "named": torch.tensor(named),
        "retrieval": metrics.base_retrieved(shown, told, last, candidates),
        "accuracy": metrics.read_attributes(shown, told, last, candidates).all(1),
    }
    return [{"conversation": c.id, **{n: float(v[row]) for n, v in columns.items()}} for row, c in enumerate(told)]


def supervision_benefit(table: pd.DataFrame, by: str, column: str) -> pd.DataFrame:
    """Trained with rollback minus trained on chains, for every (group, conversation) of a table.

    Args:
        table: of `capacity_table` or `history_table`.
        by: column of the groups: `size` or `rounds`.
        column: of the numbers that are compared.
    """
    chains, with_rollback = (
        table[table["trained"] == name].set_index([by, "conversation"])[column].astype(float) for name in SUPERVISION
    )
    return (with_rollback - chains).rename("benefit").reset_index()


def record_supervision(run: Run, table: pd.DataFrame, by: str, column: str, minutes: float) -> None:
    """Write `breaks.<by>.<column>.<group>.<trained>` and the benefit of training with rollback for every group."""
    for (group, name), part in table.groupby([by, "trained"]):
        id_ = f"breaks.{by}.{column}.{by}{group}.{name}_trained"
        record_column(run, id_, part, column, minutes, "share", "break_conditions")
    for group, part in supervision_benefit(table, by, column).groupby(by):
        id_ = f"breaks.{by}.{column}.{by}{group}.benefit"
        record_column(run, id_, part, "benefit", minutes, "share", "break_conditions")
