"""Break conditions: benefits by hand, snapshots of one training, and a tiny run from tables to records."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from toy import SOURCE, Trained, make_model, open_run, raised

from nmlib import break_conditions, checkpoint, codec, curriculum, data, judges, rollback, train
from nmlib.config import ParamsError
from nmlib.experiments import probe_conversations
from nmlib.identity import FaceEmbedder
from nmlib.records import read_records
from nmlib.runtime import Run

OPTIM = {"steps": 2, "batch_size": 9, "learning_rate": 1e-3}
BREAKS = {
    "detokenizer_steps": [3, 1],
    "drift_rounds": 3,
    "sizes": [
        {"hidden_size": 16, "intermediate_size": 20, "layers": 1, "heads": 2},
        {"hidden_size": 24, "intermediate_size": 44, "layers": 2, "heads": 3},
    ],
    "word_steps": 2,
    "word_rounds": 12,
    "rounds": [3, 5],
    "conversations": 4,
}
STAGES = [
    {"name": "base", "data": "base", "trainable": "all", "optim": OPTIM},
    {"name": "markov", "start": "base", "data": "base", "trainable": "lora", "word_rounds": 6, "optim": OPTIM},
    {"name": "rollback", "start": "base", "data": "rollback", "trainable": "lora", "optim": OPTIM},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the world in which everything was trained for a few steps."""
    made = open_run(tmp_path_factory.mktemp("breaks"), stages=STAGES, breaks=BREAKS)
    source = data.open_source(made.params.source)
    codec.train_encoder(made, source)
    codec.train_detokenizer(made, source, codec.load_encoder(made))
    judges.train_identity(made, source)
    features = {}
    encoder = codec.load_encoder(made)
    for name in ("base", "rollback"):
        told = rollback.build_conversations(source, made.params.data[name], seed=3, split="train")
        features[name] = data.encode_conversations(
            rollback.with_images(source, told), lambda images: encoder(images.float() / 255).detach()
        )
    for stage in made.params.stages:
        curriculum.train_stage(made, stage.name, features)
    return made


def test_the_gain_of_caching_by_hand() -> None:
    """Two conversations, one detokenizer: (0.9 - 0.5, 1 - 1) and (0.7 - 0.8, 1 - 0)."""
    rows = [
        {"detokenizer": "step5", "quality": 20.0, "policy": policy, "conversation": name, "psnr": 1.0}
        | {"identity": identity, "accuracy": accuracy}
        for policy, name, identity, accuracy in (
            ("tokens", "a", 0.9, 1.0), ("reencode", "b", 0.8, 0.0),
            ("reencode", "a", 0.5, 1.0), ("tokens", "b", 0.7, 1.0),
        )
    ]  # fmt: skip
    gain = break_conditions.caching_benefit(pd.DataFrame(rows)).set_index("conversation")
    assert gain["identity"].to_dict() == pytest.approx({"a": 0.4, "b": -0.1})
    assert gain["accuracy"].to_dict() == {"a": 0.0, "b": 1.0} and gain["quality"].tolist() == [20.0, 20.0]


def test_the_gain_of_rollback_by_hand() -> None:
    rows = [
        {"rounds": rounds, "trained": trained, "conversation": name, "named": right}
        for rounds, trained, name, right in (
            (4, "markov", "a", 0.0), (4, "rollback", "a", 1.0), (4, "rollback", "b", 1.0), (4, "markov", "b", 1.0),
            (6, "markov", "a", 1.0), (6, "rollback", "a", 0.0),
        )
    ]  # fmt: skip
    gain = break_conditions.supervision_benefit(pd.DataFrame(rows), "rounds", "named")
    assert gain.groupby("rounds")["benefit"].apply(list).to_dict() == {4: [1.0, 0.0], 6: [-1.0]}


def test_snapshots_are_those_of_one_training(run: Run) -> None:
    """The last snapshot is what the run's own training would be if it stopped there; a second call trains nothing."""
    source = data.open_source(run.params.source)
    names = break_conditions.train_snapshots(run, source)
    assert list(names) == ["step1", "step3", "trained"] and names["trained"] == "detokenizer"
    first, third = (checkpoint.load(run.path(f"{names[step]}.safetensors"))[0] for step in ("step1", "step3"))
    assert any(not torch.equal(first[name], third[name]) for name in first)
    module, batch_at = codec.detokenizer_training(run, source, codec.load_encoder(run))
    training = train.Training(module, run.params.detokenizer.optim, run.path("none"), run.params.seed)
    for step in range(3):
        training.update(batch_at(step), torch.float32)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(third[name], tensor, rtol=1e-4, atol=1e-6)
    path = run.path(f"{names['step3']}.safetensors")
    written = path.stat().st_mtime_ns
    break_conditions.train_snapshots(run, source)
    assert path.stat().st_mtime_ns == written


def test_every_table_runs_to_its_records(run: Run) -> None:
    source, count = data.open_source(run.params.source), 4
    caching = break_conditions.caching_table(run, source, FaceEmbedder(run.path("identity.onnx")))
    break_conditions.record_caching(run, caching, 0.1)
    capacity = break_conditions.capacity_table(run, source)
    break_conditions.record_supervision(run, capacity, "size", "named", 0.1)
    history = break_conditions.history_table(run, source)
    break_conditions.record_supervision(run, history, "rounds", "retrieval", 0.1)
    assert len(caching) == 3 * 2 * count and caching["detokenizer"].tolist()[-1] == "trained"
    assert caching.groupby("detokenizer")["quality"].nunique().tolist() == [1, 1, 1]
    kept = caching[caching["policy"] == "tokens"].groupby("conversation")["accuracy"].nunique()
    assert kept.tolist() == [1] * count, "kept tokens do not depend on the detokenizer"
    assert capacity.groupby(["size", "trained"]).size().tolist() == [count] * 4
    assert capacity["weights"].nunique() == 2 and history["rounds"].unique().tolist() == [3, 5]
    found = read_records(run)
    assert {"breaks.quality.step1", "breaks.caching.identity.trained", "breaks.caching.accuracy.step3"} <= set(found)
    assert {"breaks.size.named.size16x1.benefit", "breaks.size.named.size24x2.markov_trained"} <= set(found)
    assert {"breaks.rounds.retrieval.rounds5.benefit", "breaks.rounds.retrieval.rounds3.rollback_trained"} <= set(found)


def test_words_are_trained_once_for_each_size_and_stage(run: Run) -> None:
    assert run.params.breaks is not None
    size = run.params.breaks.sizes[0]
    first, _ = break_conditions.train_words(run, size, "rollback")
    path = run.path("breaks", "words-16x1-rollback.safetensors")
    written = path.stat().st_mtime_ns
    again, _ = break_conditions.train_words(run, size, "rollback")
    chains, _ = break_conditions.train_words(run, size, "markov")
    assert path.stat().st_mtime_ns == written and first.settings.hidden_size == 16 and first.settings.layers == 1
    one, two, other = (m.base_llm.lm_head.weight for m in (first, again, chains))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_a_model_that_always_says_one_number_names_that_base_alone() -> None:
    """The head is set so that the marker of round 1 wins: right where that is the base, and only there."""
    model, template = make_model()
    told = probe_conversations(SOURCE, 3, 5, 1) + probe_conversations(SOURCE, 3, 5, 2)
    with torch.no_grad():
        model.base_llm.lm_head.weight.zero_()
        model.base_llm.model.norm.weight.zero_()
    bases = torch.tensor([conversation.rounds[-1].base for conversation in told])
    assert bases.tolist() == [2, 2, 2, 1, 1, 1]
    found = break_conditions.named_bases(model, template, told)
    assert not found.any(), "all numbers alike: the first one is said, and nobody asks for it"
    with torch.no_grad():  # a hidden state that is one everywhere
        model.base_llm.model.norm.weight.fill_(1.0)
        model.base_llm.lm_head.weight[template.marker_id(1)] = 0.0
    direction = torch.ones(model.settings.hidden_size)
    model.base_llm.model.norm.forward = lambda hidden: direction.expand_as(hidden)  # type: ignore[method-assign]
    with torch.no_grad():
        model.base_llm.lm_head.weight[template.marker_id(1)] = 1.0
    assert torch.equal(break_conditions.named_bases(model, template, told), bases == 1)


def test_params_that_cannot_be_measured_say_so(trained: Trained, tmp_path: Path) -> None:
    text = raised(lambda: break_conditions.breaks_settings(trained.run), ValueError)
    assert text == "params 'toy': no `breaks:` block; add one, as params/cpu.yaml has"
    stages = [*STAGES[:1], STAGES[2]]
    with pytest.raises(ParamsError, match=r"breaks: compares the stages 'markov' and 'rollback'; `stages:` are"):
        open_run(tmp_path, stages=stages, breaks=BREAKS)
    with pytest.raises(ParamsError, match="rounds 3: going back 2 needs 4 or more"):
        open_run(tmp_path, stages=STAGES, breaks=BREAKS | {"depth": 2})
    with pytest.raises(ParamsError, match=r"model\.max_rounds is 7, but conversations have up to 9 rounds"):
        open_run(tmp_path, stages=STAGES, breaks=BREAKS | {"rounds": [3, 9]})
