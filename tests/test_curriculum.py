"""What is trained, in order: every file rebuilds what it holds, and every stage does what its settings say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import FEATURES, SETTINGS, SOURCE, TOKENS, Trained, features_of, open_run, raised

from nmlib import batches, checkpoint, codec, config, curriculum, data, train
from nmlib.checkpoint import CheckpointError
from nmlib.config import StageConfig
from nmlib.conversation import Conversation, Round
from nmlib.data import ConversationFeatures
from nmlib.runtime import Run

IMAGES = data.sample_pictures(SOURCE, 5, "heldout", data.step_generator(0, 0))[2]


def model_path(run: Run, stage: str, seed: int = 0) -> Path:
    return run.path(f"{curriculum.model_name(stage, seed)}.safetensors")


def tensors(run: Run, stage: str) -> dict[str, Tensor]:
    return checkpoint.load(model_path(run, stage))[0]


def frozen(module: nn.Module) -> bool:
    return not module.training and not any(p.requires_grad for p in module.parameters())


def with_stages(*stages: dict[str, Any]) -> dict[str, Any]:
    """The toy settings' base stage with others after it."""
    return {"stages": [SETTINGS["stages"][0], *stages]}


@pytest.fixture
def started(trained: Trained, tmp_path: Path) -> Run:
    """A fresh run with the encoder and the base stage of the trained one."""
    run = open_run(tmp_path)
    for name in ("encoder.safetensors", "models/base.safetensors"):
        run.path(*name.split("/")).write_bytes(trained.run.path(*name.split("/")).read_bytes())
    return run


# ---------------------------------------------------------------------------------------------------------
# files


def test_the_encoder_file_rebuilds_the_encoder(trained: Trained) -> None:
    encoder = codec.load_encoder(trained.run)
    assert frozen(encoder)
    assert torch.equal(encoder(IMAGES), trained.modules["encoder"].encoder(IMAGES))


def test_the_detokenizer_file_rebuilds_the_detokenizer(trained: Trained) -> None:
    detokenizer = codec.load_detokenizer(trained.run)
    tokens = torch.randn(5, TOKENS, FEATURES)
    assert frozen(detokenizer)
    assert torch.equal(detokenizer.decode(tokens, seed=2), trained.modules["detokenizer"].decode(tokens, seed=2))


@pytest.mark.parametrize("stage", ["base", "rollback", "plain"])
def test_a_model_file_rebuilds_model_and_template(trained: Trained, stage: str) -> None:
    model, template = curriculum.load_model(model_path(trained.run, stage))
    own = trained.modules[f"models/{stage}"]
    assert frozen(model) and not model.has_lora
    told, features = trained.features["rollback"].take(trained.features["rollback"].groups()[4][:2])
    batch = template.packed(told)
    history = features[batch.history[:, 0], batch.history[:, 1]]
    with torch.no_grad():
        ours, theirs = model.predict(batch, history), own.predict(batch, history)
    assert torch.equal(ours.images, theirs.images) and torch.equal(ours.logits, theirs.logits)
    assert template.encode("make the square red") == template.encode("Make the SQUARE red") != []


def test_histories_are_stored_and_logged(trained: Trained) -> None:
    run = trained.run
    for name, final in (("encoder", 7), ("detokenizer", 5), ("models/base", 7)):
        history = curriculum.load_history(run.path(f"{name}.safetensors"))
        assert history[0]["step"] == 0 and history[-1]["step"] == final and history[-1]["total"] > 0
    lines = [json.loads(line) for line in run.path("log.jsonl").read_text().splitlines()]
    logged = {line["name"]: line for line in lines if line["event"] == "trained"}
    assert set(logged) == {"encoder", "detokenizer", "identity", "models/base", "models/rollback", "models/plain"}
    assert logged["models/base"]["final_total"] == curriculum.load_history(model_path(run, "base"))[-1]["total"]


def test_a_training_that_ended_leaves_its_result_and_its_curves_only(trained: Trained) -> None:
    assert list(trained.run.folder.rglob("progress.safetensors")) == []
    assert len(list(trained.run.folder.rglob("events.out.tfevents*"))) == 6


# ---------------------------------------------------------------------------------------------------------
# stages


def test_predicted_history_is_a_ramp() -> None:
    """Nothing for the first 30 percent, all of it from 70 percent on, half of it half way."""
    stage = StageConfig.model_validate(
        SETTINGS["stages"][1] | {"optim": SETTINGS["stages"][1]["optim"] | {"steps": 100}}
    )
    shares = [batches.predicted_share(stage, step) for step in range(100)]
    assert shares[:31] == [0.0] * 31 and shares[70:] == pytest.approx([0.8] * 30)
    assert shares[50] == pytest.approx(0.4) and shares[40] == pytest.approx(0.2)
    assert batches.predicted_share(stage.model_copy(update={"predicted_history": 0.0}), 99) == 0.0


def test_the_ramp_decides_how_much_of_the_history_is_predicted(
    started: Run, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    real = curriculum.HistoryMLLM.forward

    def noted(self: Any, layout: Any, features: Tensor, replaced: Tensor | None, **more: Any) -> Any:
        shares.append(0.0 if replaced is None else float(replaced.float().mean()))
        assert more["history_noise"] == 0.0
        return real(self, layout, features, replaced, **more)

    monkeypatch.setattr(curriculum.HistoryMLLM, "forward", noted)
    curriculum.train_stage(started, "rollback", trained.features)
    assert shares[:3] == [0.0] * 3 and min(shares[6:]) > 0.4 and len(shares) == 8


def test_words_come_from_fresh_conversations_by_content_first() -> None:
    """Every step has its own conversations of one length; at first nearly every reference is by content."""
    told = SETTINGS["data"]["rollback"] | {"rounds": [5, 7], "max_depth": 2}
    settings = SETTINGS | {
        "data": SETTINGS["data"] | {"rollback": told},
        "model": SETTINGS["model"] | {"max_rounds": 7},
    }
    params = config.parse(settings, "toy")
    stage = StageConfig.model_validate(SETTINGS["stages"][1] | {"word_rounds": 400, "content_first": 0.5})
    early, late = (batches.fresh_conversations(params, stage, step, seed=3) for step in (0, stage.optim.steps - 1))
    assert early == batches.fresh_conversations(params, stage, 0, seed=3) != late
    for batch in (early, late):
        assert len({len(c) for c in batch}) == 1 and len(batch) == 400 // len(batch[0])

    def share(batch: list[Conversation]) -> float:
        kinds = [item.reference for c in batch for item in c.rounds if item.kind == "rollback"]
        return kinds.count("content") / len(kinds)

    assert share(early) > share(late) + 0.05


def test_weights_grow_where_a_picture_changes() -> None:
    """By hand, three tokens of one number: the change is (0, 1, 0) and then none; an upload and an undo weigh alike."""
    edit = Round("make it red", "edit", 0, values=(0,))
    told = Conversation("a", "toy", (Round("x", "upload"), edit, Round("undo", "rollback", 0), edit))
    features = torch.tensor(
        [[[2.0], [3.0], [5.0]], [[2.0], [4.0], [5.0]], [[2.0], [3.0], [5.0]], [[2.0], [3.0], [7.0]]]
    )
    weights = batches.change_weights([told], features[None], 2.0)[0]
    torch.testing.assert_close(
        weights, torch.tensor([[1, 1, 1], [1 / 3, 7 / 3, 1 / 3], [1, 1, 1], [1 / 3, 1 / 3, 7 / 3]])
    )
    assert torch.allclose(weights.mean(-1), torch.ones(4))


def test_overrides_of_a_stage_take_effect(trained: Trained) -> None:
    base, plain = (curriculum.load_model(model_path(trained.run, stage)) for stage in ("base", "plain"))
    assert base[1].response == "grounded" and len(base[0].marker_ids) == len(base[0].slot_ids) + 3 == 7
    assert plain[1].response == "polite" and len(plain[0].marker_ids) == len(plain[0].slot_ids) == 0
    settings = checkpoint.load(model_path(trained.run, "plain"))[1]["settings"]
    assert settings["response"] == "polite" and settings["markers"] is False


def test_a_stage_goes_on_from_its_start(trained: Trained) -> None:
    """The plain stage learns at a rate of 1e-12: it is the base still, whatever else was drawn."""
    base, plain, other = (tensors(trained.run, stage) for stage in ("base", "plain", "rollback"))
    assert base.keys() == plain.keys() == other.keys()
    for name in base:
        torch.testing.assert_close(plain[name], base[name], rtol=0, atol=1e-6)
    changed = {name for name in base if not torch.equal(other[name], base[name])}
    assert "llm.lm_head.weight" in changed and "output_resampler.query" in changed
    assert "llm.model.layers.1.self_attn.q_proj.weight" in changed, "LoRA was merged into it"
    assert "output_resampler.pos_embed" not in changed and "feature_scale" not in changed


def test_the_first_stage_measures_the_scale_of_the_features(trained: Trained) -> None:
    pictures = torch.cat(trained.features["base"].features)
    scale = tensors(trained.run, "base")["feature_scale"]
    torch.testing.assert_close(scale, pictures.std(0).clamp_min(0.05))
    assert scale.min() >= 0.05


def test_a_stage_without_pictures_learns_words_and_leaves_pictures_alone(trained: Trained, tmp_path: Path) -> None:
    """It reads as many dialogues as the batch says; the stage that goes on from it measures the features."""
    optim = SETTINGS["stages"][0]["optim"]
    words = {"name": "language", "data": {}, "words": "lookup", "trainable": "all", "optim": optim | {"batch_size": 5}}
    base = SETTINGS["stages"][0] | {"start": "language"}
    longest = SETTINGS["model"] | {"max_rounds": max(batches.WORD_LENGTHS)}
    run = open_run(tmp_path, stages=[words, base], model=longest)
    run.path("encoder.safetensors").write_bytes(trained.run.path("encoder.safetensors").read_bytes())
    history = curriculum.train_stage(run, "language", {})
    assert history[-1]["image"] == history[-1]["text"] == 0 and history[-1]["words"] < history[0]["words"]
    language, template = curriculum.load_model(model_path(run, "language"))
    assert float(language.feature_scale.min()) == float(language.feature_scale.max()) == 1.0
    stage = run.params.stage("language")
    batch = batches.stage_batches(run.params, stage, {}, template, 0)(3)
    assert set(batch) == {"words"} and len(batch["words"].input_ids) == 5 and not len(batch["words"].queries)
    curriculum.train_stage(run, "base", trained.features)
    assert not torch.equal(tensors(run, "base")["feature_scale"], language.feature_scale)


def test_a_stage_without_its_start_says_what_to_run(trained: Trained, tmp_path: Path) -> None:
    run = open_run(tmp_path)
    text = raised(lambda: curriculum.train_stage(run, "rollback", trained.features), CheckpointError)
    assert text.startswith(f"{model_path(run, 'base')}: no such checkpoint; run the notebook that writes it")
    with pytest.raises(KeyError, match="params 'toy' has no stage 'roll'; it has"):
        curriculum.train_stage(run, "roll", trained.features)


def test_a_start_that_does_not_fit_is_named(trained: Trained, tmp_path: Path) -> None:
    run = open_run(tmp_path, model=SETTINGS["model"] | {"intermediate_size": 52})
    model_path(run, "base").write_bytes(model_path(trained.run, "base").read_bytes())
    text = raised(lambda: curriculum.train_stage(run, "rollback", trained.features), CheckpointError)
    assert text.startswith(f"{model_path(run, 'base')}: does not fit HistoryMLLM: ") and "expected (52, 24)" in text


# ---------------------------------------------------------------------------------------------------------
# again, and on


def test_two_runs_of_a_seed_agree_and_another_seed_differs(trained: Trained, started: Run) -> None:
    for stage in ("base", "rollback"):
        curriculum.train_stage(started, stage, trained.features)
        ours, theirs = tensors(started, stage), tensors(trained.run, stage)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    curriculum.train_stage(started, "base", trained.features, seed=1)
    assert model_path(started, "base", 1).name == "base-seed1.safetensors"
    other = checkpoint.load(model_path(started, "base", 1))[0]
    assert not torch.equal(other["llm.lm_head.weight"], tensors(started, "base")["llm.lm_head.weight"])


class Killed(Exception):
    """Stands in for the end of a process."""


def interrupted(features: dict[str, ConversationFeatures], last: int) -> dict[str, ConversationFeatures]:
    """The same features, with which a training dies before the step `last`."""

    class Dying(ConversationFeatures):
        def batch_indices(self, step: int, pictures: int, seed: int) -> list[int]:
            if step == last:
                raise Killed
            return super().batch_indices(step, pictures, seed)

    return {name: Dying(part.conversations, part.features) for name, part in features.items()}


@pytest.mark.parametrize("stage", ["base", "rollback"])
def test_an_interrupted_stage_gives_the_same_file(trained: Trained, started: Run, stage: str) -> None:
    features = trained.features
    model_path(started, stage).unlink(missing_ok=True)
    with pytest.raises(Killed):
        curriculum.train_stage(started, stage, interrupted(features, 7))
    progress = started.path("training", "models", stage, "progress.safetensors")
    assert checkpoint.load(progress)[1]["step"] == 6
    curriculum.train_stage(started, stage, features)
    ours, theirs = tensors(started, stage), tensors(trained.run, stage)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not progress.exists()


def test_what_is_trained_is_not_trained_again(
    trained: Trained, started: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result stands until its settings, those of the stage it starts from, or the code of training change."""
    features = trained.features
    history = curriculum.load_history(model_path(started, "base"))
    doomed = interrupted(features, 0)
    assert curriculum.train_stage(started, "base", doomed) == history
    later = open_run(tmp_path, experiments=SETTINGS["experiments"] | {"conversations": 99})
    assert curriculum.train_stage(later, "base", doomed) == history
    other = open_run(tmp_path, stages=[SETTINGS["stages"][0] | {"history_noise": 0.2}])
    with pytest.raises(Killed):
        curriculum.train_stage(other, "base", doomed)
    with monkeypatch.context() as patched:
        patched.setattr(train.runtime, "library_digest", lambda *modules: f"{modules} changed")
        with pytest.raises(Killed):
            curriculum.train_stage(started, "base", doomed)
    curriculum.train_stage(started, "rollback", features)
    curriculum.train_stage(started, "rollback", interrupted(features, 0))
    noisy = SETTINGS["stages"][0] | {"history_noise": 0.2}
    upstream = open_run(tmp_path, stages=[noisy, *SETTINGS["stages"][1:]])
    with pytest.raises(Killed):
        curriculum.train_stage(upstream, "rollback", interrupted(features, 0))


def test_an_interrupted_stage_is_not_mixed_with_other_settings(trained: Trained, started: Run, tmp_path: Path) -> None:
    features = trained.features
    with pytest.raises(Killed):
        curriculum.train_stage(started, "rollback", interrupted(features, 5))
    other = open_run(tmp_path, **with_stages(SETTINGS["stages"][1] | {"predicted_history": 0.1}))
    text = raised(lambda: curriculum.train_stage(other, "rollback", features), CheckpointError)
    assert text.endswith(
        "models/rollback/progress.safetensors: belongs to other settings, data or library code; delete it to train anew"
    )
    other = open_run(tmp_path, stages=[SETTINGS["stages"][0] | {"history_noise": 0.2}, *SETTINGS["stages"][1:]])
    assert "belongs to other" in raised(lambda: curriculum.train_stage(other, "rollback", features), CheckpointError)
    later = open_run(tmp_path, experiments=SETTINGS["experiments"] | {"conversations": 99})
    curriculum.train_stage(later, "rollback", features)  # what is measured later changes nothing here


def test_prefix_supervision_of_a_stage_equals_packed(trained: Trained, tmp_path: Path) -> None:
    """Two stages that differ in nothing but how they supervise have the same losses from the first to the last."""
    stage = SETTINGS["stages"][0] | {"history_noise": 0.0}
    packed, prefix = (
        curriculum.train_stage(
            open_run(tmp_path / supervision, stages=[stage | {"supervision": supervision}]),
            "base",
            trained.features,
        )
        for supervision in ("packed", "prefix")
    )
    assert packed[0] == pytest.approx(prefix[0], abs=1e-5)
    assert packed[-1] == pytest.approx(prefix[-1], rel=1e-3) and packed[-1] != packed[0]


def test_features_belong_to_the_runs_encoder(trained: Trained) -> None:
    again = features_of(trained.run, "base")
    assert all(torch.equal(a, b) for a, b in zip(again.features, trained.features["base"].features, strict=True))
