"""The detokenizer on people: what it learns from, what each step starts with, and a tiny run to its records."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_people_experiments import CHANGES
from toy import Trained, open_run, raised, trained_anew

from nmlib import checkpoint, data, detokenizer_tuning, experiments, personalization
from nmlib.config import ParamsError
from nmlib.identity import FaceEmbedder
from nmlib.people import PeopleSource
from nmlib.records import read_records
from nmlib.runtime import Run
from nmlib.sources import attribute_index

OPTIM = {"steps": 2, "batch_size": 9, "learning_rate": 1e-3, "warmup_steps": 1}
TUNING = {"stage": "portrait", "data": "paired", "faces": OPTIM, "predicted": OPTIM | {"batch_size": 11}}
SIZES = CHANGES | {"stages": CHANGES["stages"][:2], "tuning": TUNING}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of people in which everything was trained for a few steps."""
    made = trained_anew(tmp_path_factory.mktemp("tuning"), ("portraits", "base"), **SIZES)
    detokenizer_tuning.train_faces(made)
    detokenizer_tuning.train_predicted(made)
    return made


def test_faces_are_in_every_view_but_far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen = PeopleSource(16), list[torch.Tensor]()
    monkeypatch.setattr(source, "render", lambda subjects, values: seen.append(values) or torch.zeros(len(values)))
    detokenizer_tuning.face_pictures(source, 200, data.step_generator(1, 0))
    framing = source.attributes[attribute_index(source, "framing")].values
    shown = {framing[value] for value in seen[0][:, attribute_index(source, "framing")].tolist()}
    assert shown == {"own", "close-up", "bust"}
    assert seen[0][:, attribute_index(source, "pose")].unique().tolist() == [0, 1, 2, 3]


def test_each_step_goes_on_from_the_one_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without steps to take, the weights of a step are those of the one before; with them they are not."""
    files = [checkpoint.load(run.path(f"{name}.safetensors")) for name in detokenizer_tuning.STEPS.values()]
    for (before, _), (after, _) in pairwise(files):
        assert any(not torch.equal(before[name], after[name]) for name in before)
    assert len({metadata["key"] for _, metadata in files}) == 3
    started = []
    monkeypatch.setattr(detokenizer_tuning.train, "made", lambda *_: None)
    monkeypatch.setattr(detokenizer_tuning.train, "finish", lambda *_: None)
    monkeypatch.setattr(
        detokenizer_tuning.train, "run_training", lambda run, name, module, *_: started.append(module.state_dict())
    )
    detokenizer_tuning.train_faces(run)
    detokenizer_tuning.train_predicted(run)
    for (before, _), start in zip(files, started, strict=False):
        for name, tensor in start.items():
            assert torch.equal(tensor, before[name]), name


def test_a_second_call_trains_nothing(run: Run) -> None:
    written = {name: run.path(f"{name}.safetensors").stat().st_mtime_ns for name in detokenizer_tuning.STEPS.values()}
    detokenizer_tuning.train_faces(run)
    detokenizer_tuning.train_predicted(run)
    for name, stamp in written.items():
        assert run.path(f"{name}.safetensors").stat().st_mtime_ns == stamp


def test_nobody_is_only_described(run: Run) -> None:
    """The exact face of somebody of whom a hat was said cannot be predicted, and so not be decoded either."""
    assert run.params.people[TUNING["data"]].describe_share > 0
    source = data.open_people(run.params.source)
    told = [c for step in range(12) for c in detokenizer_tuning.fresh_conversations(run, source, step)]
    kinds = [item.kind for c in told for item in c.rounds]
    assert kinds.count("introduce") > 20 and "describe" not in kinds


def test_predicted_tokens_stand_beside_the_pictures_they_were_asked_for(run: Run) -> None:
    """By hand: the second reading replaces every generated picture of the history by the first one's prediction."""
    system = experiments.load_system(run, "portrait")
    source = data.open_people(run.params.source)
    told = detokenizer_tuning.fresh_conversations(run, source, 3)
    again = detokenizer_tuning.fresh_conversations(run, source, 3)
    assert [c.rounds for c in told] == [c.rounds for c in again] and len({len(c) for c in told}) == 1
    tokens, images = detokenizer_tuning.predicted_pairs(system, told)
    asked = [(row, index) for row, c in enumerate(told) for index, item in enumerate(c.rounds) if not item.is_brought]
    assert len(tokens) == len(images) == len(asked)
    for number, (row, index) in enumerate(asked):
        pictures = told[row].images
        assert pictures is not None and torch.equal(images[number], pictures[index].float() / 255)
    first = told[0]
    assert first.images is not None
    true, layout = system.encode(first.images), system.template.packed([first])
    with torch.no_grad():
        history = true[layout.history[:, 1]]
        once = system.model.predict(layout, history).images
        for place, index in enumerate(layout.queries[:, 1].tolist()):
            history = torch.where((layout.history[:, 1] == index)[:, None, None], once[place], history)
        twice = system.model.predict(layout, history).images
    torch.testing.assert_close(tokens[: len(twice)], twice, rtol=1e-4, atol=1e-4)


def test_the_table_runs_to_its_records(run: Run) -> None:
    table = detokenizer_tuning.tuning_table(run, FaceEmbedder(run.path("identity.onnx")))
    detokenizer_tuning.record_tuning(run, table, 0.1)
    assert len(table) == 3 * 2 * run.params.experiments.conversations
    assert table["identity"].between(-1.001, 1.001).all()
    found = set(read_records(run))
    assert {
        "detokenizer.psnr_faces.general.true_tokens",
        "detokenizer.identity_faces.predicted.predicted_tokens",
    } <= found
    told = personalization.with_images(
        data.open_people(run.params.source), detokenizer_tuning.people_experiments.probes(run), "paired"
    )
    shown = detokenizer_tuning.shown_after(run, told[:2])
    assert list(shown) == ["exact", "general", "faces", "predicted"] and {len(row) for row in shown.values()} == {2}


def test_params_without_the_block_or_with_unknown_names_say_so(trained: Trained, tmp_path: Path) -> None:
    text = raised(lambda: detokenizer_tuning.train_faces(trained.run), ValueError)
    assert text == "params 'toy': no `tuning:` block; add one, as params/people.yaml has"
    with pytest.raises(ParamsError, match=r"tuning: stage 'last' and data 'paired'; expected one of `stages:`"):
        open_run(tmp_path, **(SIZES | {"tuning": TUNING | {"stage": "last"}}))
