"""Measures on people: exact answers score full marks, strangers none, and a tiny curriculum runs to its records."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import SETTINGS, open_run, trained_anew

from nmlib import batches, data, experiments, people_experiments, personalization
from nmlib.conversation import Conversation
from nmlib.identity import FaceEmbedder
from nmlib.metrics import Candidates, pixel_rows
from nmlib.names import names
from nmlib.people import PeopleSource
from nmlib.records import read_records
from nmlib.runtime import Run

OPTIM = {"steps": 2, "batch_size": 9, "learning_rate": 1e-3}
PEOPLE = {"conversations": 5, "rounds": [4, 5], "people": [1, 2], "recall_share": 0.6}
CHANGES: dict[str, Any] = {
    "source": {"kind": "world", "image_size": 24},
    "data": SETTINGS["data"] | {"portraits": {"conversations": 6, "rounds": [2, 3], "view": True}},
    "people": {
        "same": PEOPLE | {"pairing": "same"},
        "masked": PEOPLE | {"pairing": "masked", "describe_share": 0.0},
        "paired": PEOPLE | {"pairing": "paired", "face_weight": 3.0},
    },
    "model": SETTINGS["model"] | {"max_rounds": 13},
    "stages": [
        {"name": "base", "data": "base", "trainable": "all", "word_rounds": 12, "words": "lookup", "optim": OPTIM},
        {"name": "portrait", "start": "base", "data": {"portraits": 0.5, "base": 0.5}, "trainable": "all",
         "optim": OPTIM},
        {"name": "joint", "start": "portrait", "data": {"same": 1.0, "masked": 2.0, "paired": 1.0}, "trainable": "lora",
         "predicted_history": 0.5, "word_rounds": 12, "optim": OPTIM | {"steps": 6}},
    ],
}  # fmt: skip
NAMES = ("portraits", "same", "masked", "paired", "base")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in which every data set is built and every stage is trained for a few steps."""
    return trained_anew(tmp_path_factory.mktemp("people"), NAMES, **CHANGES)


def test_every_table_runs_to_its_records(run: Run) -> None:
    embedder = FaceEmbedder(run.path("identity.onnx"))
    table = people_experiments.personal_table(run, ["portrait", "joint"], embedder, None)
    people_experiments.record_personal(run, table, 0.1)
    picks = people_experiments.names_table(run, "joint", people=(2,), delays=(1, 3))
    people_experiments.record_names(run, picks, 0.1)
    assert len(table) == 2 * run.params.experiments.conversations and table["compliance"].between(0, 1).all()
    assert sorted(picks["control"].unique()) == ["none", "renamed", "shuffled"]
    found = set(read_records(run))
    assert {"people.identity.joint", "people.identity.ceiling", "people.identity.floor"} <= found
    assert {"names.accuracy.people2.delay3", "names.accuracy.people2.delay3.shuffled"} <= found
    assert "people.clip.joint" not in found, "nothing scored the words"


def test_face_drift_edits_wall_and_shirt_alone_and_records_slopes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Conversation] = []
    drift = experiments._drift_of
    monkeypatch.setattr(experiments, "_drift_of", lambda *rest: told.extend(rest[2]) or drift(*rest))
    embedder = FaceEmbedder(run.path("identity.onnx"))
    table = experiments.face_drift(run, data.open_source(run.params.source), "joint", embedder, rounds=5)
    edited = {item.edit.attribute for talk in told for item in talk.rounds if item.edit is not None}
    assert edited == set(experiments.BESIDE_THE_FACE) and {len(talk) for talk in told} == {5}
    assert len(table) == 2 * 4 * run.params.experiments.drift_conversations
    experiments.record_face_drift(run, table, minutes=0.5)
    one = table[table["policy"] == "tokens"]
    by_round = one.groupby("round")["identity"].mean()  # the mean of slopes is the slope of means
    slope = sum((x - 2.5) * by_round[x] for x in range(1, 5)) / 5
    assert read_records(run)["drift.slope.tokens"].value == pytest.approx(slope)


def test_a_stage_draws_from_all_sets_of_its_mix_and_weighs_faces(run: Run) -> None:
    stage = run.params.stage("joint")
    picks = [batches.pick_set(stage, step, 5) for step in range(400)]
    assert picks == [batches.pick_set(stage, step, 5) for step in range(400)]
    assert 150 < picks.count("masked") < 250 and set(picks) == {"same", "masked", "paired"}
    features = experiments.read_sets(run, NAMES)
    assert features["base"].weights is None
    for name, heaviest in (("masked", 2.0), ("paired", 3.0)):
        for weights in features[name].weights or ():
            torch.testing.assert_close(weights.mean(1), torch.ones(len(weights)))
            assert 1.0 <= float(weights.max() / weights.min()) <= heaviest + 1e-5


def exact(source: PeopleSource, items: list[Any], embed: Any) -> Tensor:
    subjects = torch.tensor([item.subject for item in items])
    return embed(source.render(subjects, torch.tensor([item.values for item in items])))


def test_exact_answers_are_right_and_other_people_are_wrong(run: Run) -> None:
    source = PeopleSource(24)
    settings = people_experiments.probe_settings(run, conversations=6)
    told = personalization.probe_conversations(source, settings, people=2, delay=2)
    items = [conversation.rounds[-1] for conversation in told]
    candidates = Candidates(source, pixel_rows)
    shown = exact(source, items, pixel_rows)
    assert people_experiments.picked(shown, told, candidates).all()
    torch.testing.assert_close(people_experiments.compliance(shown, items, candidates), torch.ones(6))
    states = [people_experiments._people_states(conversation) for conversation in told]
    strangers = [next(s for base, s in found.items() if base != i.base) for found, i in zip(states, items, strict=True)]
    wrong = torch.cat([candidates.features([state]) for state in strangers])
    assert not people_experiments.picked(wrong, told, candidates).any()


def test_controls_change_names_and_nothing_else(run: Run) -> None:
    source = PeopleSource(24)
    settings = people_experiments.probe_settings(run, conversations=8)
    told = personalization.probe_conversations(source, settings, people=3, delay=1)
    renamed, shuffled = (people_experiments.controlled(told, control) for control in ("renamed", "shuffled"))
    for before, after in zip(told, renamed, strict=True):
        assert {r.name for r in after.rounds} <= {*names("heldout"), None}
        assert all(a.name != b.name for a, b in zip(before.rounds, after.rounds, strict=True) if a.name)
        assert [r.values for r in after.rounds] == [r.values for r in before.rounds]
        after.validate()
    asked = [(a.rounds[-1].name, b.rounds[-1].name) for a, b in zip(told, shuffled, strict=True)]
    assert any(a != b for a, b in asked) and [c.rounds[-1].base for c in told] == [c.rounds[-1].base for c in shuffled]


@pytest.mark.parametrize("people", [2, 3])
def test_whoever_goes_by_the_name_is_right_unless_names_are_shuffled(run: Run, people: int) -> None:
    """Shows the person of the name, exactly: always right, also with everybody renamed, and by chance if shuffled."""
    source = PeopleSource(24)
    settings = people_experiments.probe_settings(
        run, conversations=60, look_alike_distance=people_experiments.LOOK_ALIKE
    )
    told = personalization.probe_conversations(source, settings, people=people, delay=2)
    candidates, found = Candidates(source, pixel_rows), {}
    for control in ("none", "renamed", "shuffled"):
        asked = people_experiments.controlled(told, control)
        shown = []
        for conversation in asked:
            item, last = conversation.rounds[-1], len(conversation) - 1
            states = people_experiments._people_states(conversation)
            shown.append(candidates.features([states[conversation.people(last)[item.name or ""]]])[0])
        found[control] = float(people_experiments.picked(torch.stack(shown), asked, candidates).float().mean())
    assert found["none"] == found["renamed"] == 1.0
    spread = (1 / people * (1 - 1 / people) / 60) ** 0.5
    assert abs(found["shuffled"] - 1 / people) < 3 * spread


def test_unknown_data_sets_and_names_used_twice_are_named(tmp_path: Path) -> None:
    from nmlib import config

    stages = [CHANGES["stages"][0] | {"data": {"base": 1.0, "bases": 1.0}}]
    with pytest.raises(config.ParamsError, match=r"'base' reads data \['bases'\]; `data:` and `people:` define"):
        open_run(tmp_path, **(CHANGES | {"stages": stages}))
    twice = CHANGES["people"] | {"base": CHANGES["people"]["same"]}
    with pytest.raises(config.ParamsError, match=r"people: \['base'\] are names of `data:` as well"):
        open_run(tmp_path, **(CHANGES | {"people": twice}))
