"""The experiments: probes that test what they say, tables with a row for everything measured, and records of them."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from toy import SETTINGS, SOURCE, Trained, open_run, trained_anew

from nmlib import chat, data, experiments, metrics, phrases, rollback
from nmlib.checkpoint import CheckpointError
from nmlib.conversation import Conversation
from nmlib.experiments import Stopwatch, probe_conversations
from nmlib.identity import FaceEmbedder
from nmlib.records import read_records
from nmlib.runtime import Run
from nmlib.sources import attribute_index
from nmlib.world import WorldSource, is_heldout

ATTRIBUTES = [attribute.name for attribute in SOURCE.attributes]
WORLD = WorldSource(16)
HAIR = attribute_index(WORLD, "hair")


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Run:
    """The trained run with a folder of its own, so that records do not mix."""
    run = open_run(tmp_path)
    for path in [*trained.run.folder.glob("*.safetensors"), *trained.run.folder.glob("models/*.safetensors")]:
        run.path(*path.relative_to(trained.run.folder).parts).write_bytes(path.read_bytes())
    return run


def values(run: Run) -> dict[str, float]:
    return {id_: record.value for id_, record in read_records(run).items()}


# ---------------------------------------------------------------------------------------------------------
# probes


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_probes_end_in_a_rollback_of_exactly_this_depth(depth: int) -> None:
    world = WorldSource(16)
    probes = probe_conversations(world, 12, 6, depth)
    for number, probe in enumerate(probes):
        probe.validate()
        assert len(probe) == 6 and probe.rounds[0].kind == "upload"
        assert [probe.depth(index) for index in range(6)] == [0] * 5 + [depth]
        last = probe.rounds[-1]
        assert (last.kind == "rollback") == (depth > 0)
        assert (last.edit is not None) == (depth == 0 or number % 2 == 1), "half of the rollbacks make a new edit"
        assert all(phrases.is_heldout(item.instruction) for item in probe.rounds[1:])
        assert is_heldout(torch.tensor([item.subject for item in probe.rounds])).all()


def test_probes_repeat_and_differ_by_depth_and_seed() -> None:
    first = probe_conversations(SOURCE, 4, 5, 2)
    assert first == probe_conversations(SOURCE, 4, 5, 2)
    assert first[0].rounds[0].subject != probe_conversations(SOURCE, 4, 5, 1)[0].rounds[0].subject
    assert first != probe_conversations(SOURCE, 4, 5, 2, seed=1)
    heard = probe_conversations(SOURCE, 4, 5, 2, phrasing="train")
    assert not any(phrases.is_heldout(item.instruction) for probe in heard for item in probe.rounds[1:])


def hair_was_shown(probe: Conversation) -> bool:
    """Whether natural hair, if the last request asks for it, is to be seen before."""
    edit = probe.rounds[-1].edit
    shown = [item.values[HAIR] == 0 for item in probe.rounds[:-1] if item.values is not None]
    return (edit is None or (edit.attribute, edit.value) != ("hair", "own")) or any(shown)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_every_request_of_a_probe_has_an_answer(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 2 if depth == 0 else depth + 2
    probes = probe_conversations(WORLD, 300, rounds, depth)
    assert all(hair_was_shown(probe.prefix(length)) for probe in probes for length in range(2, rounds + 1))
    monkeypatch.setattr(experiments, "AnswerableEditor", rollback.ExactEditor)
    before = probe_conversations(WORLD, 300, rounds, depth)
    kept = [all(hair_was_shown(probe.prefix(length)) for length in range(2, rounds + 1)) for probe in before]
    assert not all(kept)
    assert all(now == then for now, then, same in zip(probes, before, kept, strict=True) if same)  # no other is redrawn


def test_probes_visit_the_states_that_training_never_shows() -> None:
    ends = [probe.rounds[-1].values or () for probe in probe_conversations(WorldSource(16), 200, 4, 1)]
    share = sum(map(rollback.is_heldout_state, ends)) / len(ends)
    assert share == pytest.approx(1 / 8, abs=0.07)


# ---------------------------------------------------------------------------------------------------------
# tables and records


def test_rollback_table_and_its_records(run: Run) -> None:
    table = experiments.rollback_table(run, SOURCE, ["rollback", "plain"])
    columns = ["stage", "seed", "history", "depth", "conversation", "accuracy", "retrieval", "named", "chance"]
    assert list(table) == [*columns, "ceiling", "reference", "branch", "heldout_state", *ATTRIBUTES]
    assert len(table) == 2 * 2 * 2 * 5  # stages, histories, depths, conversations
    assert table.groupby(["stage", "history", "depth"]).size().eq(5).all()
    assert set(table["accuracy"]) <= {0.0, 1.0} and set(table["branch"]) == {True, False}
    assert (table["accuracy"] == table[ATTRIBUTES].min(axis=1)).all(), "a state is right when all of it is"
    assert table["chance"].between(0, 1).all() and table["ceiling"].between(0, 1).all()
    probes = probe_conversations(SOURCE, 5, 4, 2)
    deep = table[(table["depth"] == 2) & (table["stage"] == "plain") & (table["history"] == "own")]
    assert deep["ceiling"].tolist() == [metrics.markov_ceiling(SOURCE, probe, 3) for probe in probes]
    assert set(table["named"].dropna()) <= {0.0, 1.0}

    experiments.record_rollback(run, table, minutes=1.5)
    found, records = values(run), read_records(run)
    own = table[table["history"] == "own"].groupby(["stage", "depth"])
    clean = table[table["history"] == "clean"].groupby(["stage", "depth"])
    for stage in ("rollback", "plain"):
        for depth in (1, 2):
            for column in ("accuracy", "retrieval"):
                id_ = f"depth{depth}.{stage}_trained"
                assert found[f"rollback.{column}.{id_}"] == pytest.approx(own[column].mean()[stage, depth])
                assert found[f"rollback.{column}_clean.{id_}"] == pytest.approx(clean[column].mean()[stage, depth])
    assert found["rollback.accuracy.depth2.ceiling"] == pytest.approx(deep["ceiling"].mean())
    assert found["rollback.retrieval.depth2.chance"] == pytest.approx(deep["chance"].mean())
    references = {id_.rsplit(".", 1)[1] for id_ in found if id_.startswith("rollback.accuracy.depth1.plain_trained.")}
    assert references == set(deep_references(table, 1))
    record = records["rollback.accuracy.depth1.plain_trained"]
    assert record.n == 5 and record.seeds == 1 and record.unit == "share" and record.minutes == 1.5
    assert record.low is not None and record.high is not None and record.low <= record.value <= record.high


def deep_references(table: pd.DataFrame, depth: int) -> list[str]:
    return table.loc[(table["depth"] == depth) & (table["stage"] == "plain"), "reference"].unique().tolist()


def test_a_model_that_knows_everything_scores_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the truth in place of predictions every measure is 1, and only then."""

    def oracle(
        model: Any, template: Any, told: list[Conversation], features: torch.Tensor, *args: Any, **more: Any
    ) -> Any:
        replies = [
            [f"#{(c.rounds[index].base or 0) + 1} to #{index + 1}" for c in told] for index in range(len(told[0]))
        ]
        return chat.Rollout(features, replies)

    monkeypatch.setattr(chat, "rollout", oracle)
    table = experiments.rollback_table(run, SOURCE, ["rollback"])
    assert (table[["accuracy", "retrieval", "named", *ATTRIBUTES]] == 1.0).all(axis=None)
    assert (experiments.edit_table(run, SOURCE, ["base"])["accuracy"] == 1.0).all()


def test_histories_are_the_models_own_or_the_truth(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = chat.history_policy
    monkeypatch.setattr(chat, "history_policy", lambda system, policy: asked.append(policy) or real(system, policy))
    experiments.rollback_table(run, SOURCE, ["rollback"])
    assert asked == ["tokens", "oracle"] * 2


def test_edit_table_and_its_records(run: Run) -> None:
    table = experiments.edit_table(run, SOURCE, ["base", "plain"])
    assert list(table) == ["stage", "seed", "conversation", "accuracy"] and len(table) == 2 * 5
    experiments.record_edits(run, table, minutes=0.5)
    means = table.groupby("stage")["accuracy"].mean()
    assert values(run) == {f"edit.accuracy.{stage}_trained": pytest.approx(means[stage]) for stage in ("base", "plain")}


def test_drift_table_and_its_records(run: Run, trained: Trained) -> None:
    embedder = FaceEmbedder(trained.run.path("identity.onnx"))
    table = experiments.drift_table(run, SOURCE, "rollback", embedder)
    assert list(table) == ["seed", "policy", "conversation", "round", "psnr", "ssim", "identity", "accuracy"]
    assert table.groupby(["policy", "round"]).size().to_dict() == {
        (policy, index): 3 for policy in chat.POLICIES for index in (1, 2, 3)
    }
    assert table["identity"].between(-1.001, 1.001).all() and (table["psnr"] > 0).all()
    cut = {policy: part.drop(columns="policy").reset_index(drop=True) for policy, part in table.groupby("policy")}
    pd.testing.assert_frame_equal(cut["tokens"], cut["prefix"], rtol=1e-3, atol=1e-3)
    first = table[table["round"] == 1].groupby("policy")["psnr"].mean()
    assert first.max() - first.min() < 1e-3, "the first picture is the same under every policy"
    assert not cut["reencode"]["psnr"].equals(cut["tokens"]["psnr"])

    experiments.record_drift(run, table, minutes=0.5)
    found = values(run)
    assert len(found) == 4 * 4 * 2 + 2 * 2, "measures, policies, the first and the last round; two gains at both"
    mean = table[table["round"] == 3].groupby("policy")["psnr"].mean()
    assert found["drift.psnr_gain.round3"] == pytest.approx(mean["tokens"] - mean["reencode"])
    last = table[table["round"] == 3].groupby("policy")["identity"].mean()
    assert found["drift.identity.round3.oracle"] == pytest.approx(last["oracle"])
    assert read_records(run)["drift.psnr.round1.tokens"].unit == "dB"


def test_photographs_go_the_same_way(tmp_path: Path) -> None:
    run = trained_anew(tmp_path, ("base", "rollback"), source={"kind": "photos", "image_size": 16})
    source = data.open_source(run.params.source)
    experiments.record_rollback(run, experiments.rollback_table(run, source, ["rollback"]), minutes=0.1)
    embedder = FaceEmbedder(run.path("identity.onnx"))
    experiments.record_drift(run, experiments.drift_table(run, source, "rollback", embedder), minutes=0.1)
    found = values(run)
    ceiling = found["rollback.accuracy.depth1.ceiling"]
    assert 0 < ceiling < 1 and {"rollback.accuracy.depth2.rollback_trained", "drift.psnr_gain.round3"} <= set(found)


def test_repeats_over_seeds_are_counted(run: Run, trained: Trained) -> None:
    for stage in ("base", "rollback"):
        run.path("models", f"{stage}-seed1.safetensors").write_bytes(
            run.path("models", f"{stage}.safetensors").read_bytes()
        )
    table = experiments.edit_table(run, SOURCE, ["base", "rollback"], seeds=2)
    assert table.groupby(["stage", "seed"]).size().tolist() == [5] * 4
    experiments.record_edits(run, table, minutes=0.1)
    record = read_records(run)["edit.accuracy.base_trained"]
    assert record.seeds == 2 and record.n == 5
    embedder = FaceEmbedder(trained.run.path("identity.onnx"))
    drift = experiments.drift_table(run, SOURCE, "rollback", embedder, seeds=2)
    assert drift.groupby("seed").size().tolist() == [4 * 3 * 3] * 2
    experiments.record_drift(run, drift, minutes=0.1)
    found = read_records(run)
    assert {found[f"drift.{id_}"].seeds for id_ in ("psnr_gain.round3", "identity.round3.tokens")} == {2}
    assert found["drift.psnr_gain.round3"].n == 3
    with pytest.raises(CheckpointError, match=r"rollback-seed2\.safetensors: no such checkpoint"):
        experiments.drift_table(run, SOURCE, "rollback", embedder, seeds=3)
    with pytest.raises(CheckpointError, match=r"base-seed2\.safetensors: no such checkpoint"):
        experiments.edit_table(run, SOURCE, ["base"], seeds=3)


def test_a_stopwatch_counts_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 130.0, 400.0])
    monkeypatch.setattr(experiments.time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    assert watch.minutes == 0.5 and watch.minutes == 5.0


def test_the_toy_settings_are_those_of_a_params_file(trained: Trained) -> None:
    assert trained.run.params.experiments.conversations == SETTINGS["experiments"]["conversations"] == 5
    assert trained.run.params.model.max_rounds >= max(trained.run.params.experiments.depths) + 2
