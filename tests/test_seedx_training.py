"""SEED-X's own class trained on imported data sets: from a released folder over two stages to an answer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import seedx_toy
import torch
import yaml
from PIL import Image
from test_imports import write_sessions
from toy import raised

from nmlib import config, curriculum, jobs, runtime, seedx_evaluation, seedx_training, train
from nmlib.checkpoint import CheckpointError
from nmlib.conversation import Conversation, Round, to_picture
from nmlib.imports import HELDOUT, import_set
from nmlib.pipeline import Project
from nmlib.runtime import Run, RunError
from nmlib.seedx_checkpoint import from_pretrained
from nmlib.seedx_evaluation import nearest_picture, predict_rounds, retrieval_rows, retrieval_table
from nmlib.seedx_generate import SeedXChat, Shown
from nmlib.seedx_training import PictureReader, open_stage, stage_batches, stage_settings, to_clip
from nmlib.seedx_vision import to_pixels
from nmlib.stored_sets import StoredSet

PAPER = Path(__file__).parent.parent / "params" / "paper.yaml"


def write_params(folder: Path, **changes: Any) -> Run:
    """A run of `paper.yaml` with SEED-X and everything about its training made small."""
    raw = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    sizes = seedx_toy.settings(max_length=200).model_dump(mode="json")
    optim = {"steps": 4, "batch_size": 12, "learning_rate": 3e-3, "warmup_steps": 1, "checkpoint_every": 2, "parts": 2}
    for settings in [*raw["data"].values(), *raw["people"].values()]:
        settings |= {"conversations": 60}
    stages = [stage | {"optim": stage["optim"] | optim} for stage in raw["stages"]]
    for part in ("faces", "predicted"):
        raw["tuning"][part] |= optim
    raw |= {
        "name": "toy",
        "threads": 1,
        "precision": "float32",
        "seedx": sizes,
        "model": sizes["model"],
        "stages": stages,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.yaml").write_text(yaml.safe_dump(raw | changes), encoding="utf-8")
    return Run.open(folder / "toy.yaml", folder / "run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path, list[Any]]:
    """A run with imported data sets and the stages `base` and `rollback`, and the folder it began with."""
    folder = tmp_path_factory.mktemp("seedx")
    run, weights, sessions = write_params(folder), folder / "seed_x", write_sessions(folder / "magicbrush")
    seedx_toy.write_released(weights)
    for name in ("base", "rollback"):
        import_set(run, name, [sessions])
    return run, weights, jobs.train_one(run, "rollback", weights=weights)


def test_the_stages_as_shipped_can_be_shared_by_eight_cards() -> None:
    for stage in config.load(PAPER).stages:
        assert stage.optim.parts % 8 == 0 and stage.optim.activation_checkpointing, stage.name


def test_a_stage_is_a_folder_that_loads_and_answers(trained: tuple[Run, Path, list[Any]]) -> None:
    run, weights, history = trained
    assert [row["step"] for row in history] == [0, 3] and all(row["image"] > 0 and row["text"] > 0 for row in history)
    system = open_stage(run, "rollback", weights)
    before = from_pretrained(weights, seedx_toy.settings(), torch.float32)
    assert system.vit is not None and before.vit is not None and not system.agent.has_lora
    for name, tensor in before.vit.state_dict().items():
        assert torch.equal(system.vit.state_dict()[name], tensor), "the encoder is frozen"
    changed = {
        name.partition(".")[0]
        for name, tensor in before.agent.state_dict().items()
        if not torch.equal(tensor, system.agent.state_dict()[name])
    }
    assert changed == {"llm", "input_resampler", "output_resampler", "patch_pos_embed"}
    chat = SeedXChat(system.agent, system.template)
    shown = Shown(system.vit(torch.zeros(1, 3, seedx_toy.SIDE, seedx_toy.SIDE)))
    (reply,) = chat.say(["make it blue"], [shown], force_image=True, max_new_tokens=9)
    assert reply.images.shape[1:] == (4, 32) and reply.images.isfinite().all()
    assert not list((run.folder / "training").rglob("progress.safetensors"))


def test_what_is_made_is_not_made_again(trained: tuple[Run, Path, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    run, weights, history = trained

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trains again")

    monkeypatch.setattr(train, "run_training", refuse)
    assert jobs.train_one(run, "rollback", weights=weights) == history
    notes = run.folder / "models" / "base" / "training.json"
    kept = notes.read_text()
    notes.write_text(kept.replace(json.loads(kept)["key"], "another"))
    with pytest.raises(AssertionError, match="trains again"):
        seedx_training.train_stage(run, "rollback", weights)
    notes.write_text(kept)


def test_an_interrupted_training_goes_on(trained: tuple[Run, Path, list[Any]], tmp_path: Path) -> None:
    """The same weights as one that was never stopped."""
    whole, weights, _ = trained
    run = write_params(tmp_path)
    (tmp_path / "run" / "data").symlink_to(whole.folder / "data")
    update, steps = train.Training.update, []

    def stop(self: train.Training, *arguments: Any) -> Any:
        steps.append(self.step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return update(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Training, "update", stop)
        seedx_training.train_stage(run, "base", weights)
    seedx_training.train_stage(run, "base", weights)
    one, other = (open_stage(each, "base", weights).agent.state_dict() for each in (whole, run))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_parts_add_up_and_each_reads_its_own_pictures(trained: tuple[Run, Path, list[Any]]) -> None:
    run, weights, _ = trained
    system = from_pretrained(weights, seedx_toy.settings(max_length=200), torch.float32)
    assert system.vit is not None
    reader = PictureReader(system.agent, system.vit).eval()
    stage = run.params.stage("rollback")
    optim = stage.optim.model_copy(update={"batch_size": 13, "parts": 1})
    stage = stage.model_copy(update={"predicted_history": 0.0, "supervision": "packed", "optim": optim})
    sets = {"rollback": StoredSet(run.path("data", "rollback"))}
    batch = stage_batches(run.params, stage, sets, system.template, 0)(3)
    encoded: list[int] = []
    system.vit.register_forward_hook(lambda module, pixels, out: encoded.append(len(pixels[0])))
    with torch.no_grad():
        together = torch.stack(list(reader(**batch)))
        everything = sum(encoded)
        pieces = [torch.stack(list(reader(**part.batch))) for part in curriculum.split(batch, 2)]
    torch.testing.assert_close(torch.stack(pieces).sum(0), together, rtol=1e-4, atol=1e-4)
    assert everything == batch["images"].shape[:2].numel() == sum(encoded) - everything
    assert set(dict(reader.named_parameters())) == {f"agent.{name}" for name, _ in system.agent.named_parameters()}
    again = stage_batches(run.params, stage, sets, system.template, 0)(3)
    assert torch.equal(again["images"], batch["images"])


def test_pictures_are_read_as_seedx_reads_them() -> None:
    images = torch.randint(256, (2, 3, seedx_toy.SIDE, seedx_toy.SIDE)).byte()
    wanted = torch.stack([to_pixels(to_picture(image), seedx_toy.SIDE) for image in images])
    torch.testing.assert_close(to_clip(images), wanted, rtol=0, atol=1e-6)
    assert isinstance(to_picture(images[0]), Image.Image)


def test_one_batch_is_overfitted(trained: tuple[Run, Path, list[Any]]) -> None:
    """With all weights trained, the pictures of a few conversations are learned, ways back among them."""
    run, weights, _ = trained
    system = from_pretrained(weights, seedx_toy.settings(max_length=200), torch.float32)
    assert system.vit is not None
    stage = run.params.stage("rollback").model_copy(update={"predicted_history": 0.0})
    stored = StoredSet(run.path("data", "rollback"))
    batch = stage_batches(run.params, stage, {"rollback": stored}, system.template, 0)(1)
    reader = PictureReader(system.agent.requires_grad_(True), system.vit)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    images = []
    for _ in range(60):
        losses = reader(**batch)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        images.append(float(losses.image.detach()))
    assert images[-1] < 0.25 * images[0]


def test_what_is_trained_is_kept_in_32_bits(trained: tuple[Run, Path, list[Any]]) -> None:
    """Beside frozen weights in 16; a step in mixed numbers gives a gradient to all of it."""
    run, weights, _ = trained
    system = from_pretrained(weights, seedx_toy.settings(max_length=200), torch.bfloat16)
    assert system.vit is not None
    stage = run.params.stage("rollback")
    seedx_training._prepare(system.agent, stage)
    kinds = {(p.requires_grad, p.dtype) for p in system.agent.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    sets = {"rollback": StoredSet(run.path("data", "rollback"))}
    batch = stage_batches(run.params, stage, sets, system.template, 0)(3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = PictureReader(system.agent, system.vit)(**batch)
    losses.total.backward()
    assert losses.total.isfinite()
    without = [name for name, p in system.agent.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_predictions_enter_the_history_by_a_ramp(trained: tuple[Run, Path, list[Any]]) -> None:
    run, *_ = trained
    stage = run.params.stage("rollback")
    sets = {"rollback": StoredSet(run.path("data", "rollback"))}
    batch_at = stage_batches(run.params, stage, sets, seedx_toy.template(), 0)
    late = [batch_at(step)["replaced"] for step in range(stage.optim.steps - 1, 40)]
    assert batch_at(0)["replaced"] is None
    shares = torch.cat([replaced.float().flatten() for replaced in late])
    assert abs(float(shares.mean()) - stage.predicted_history) < 0.1


# ---------------------------------------------------------------------------------------------------------
# what does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}, "words": "lookup"}, "data does not fit SEED-X; expected a data set; words alone are exercises"),
        ({"word_rounds": 12}, "word_rounds does not fit SEED-X; expected 0"),
        ({"change_weight": 2.0}, "change_weight does not fit SEED-X; expected 0"),
        ({"response": "grounded"}, "response does not fit SEED-X; expected polite, as SEED-X replies"),
    ],
)
def test_a_stage_asks_only_for_what_there_is(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run = write_params(tmp_path)
    stage = run.params.stages[0].model_copy(update=changes)
    assert f"toy, stage 'base': {message}" in raised(lambda: stage_settings(run.params, stage), ValueError)


def test_predictions_stand_where_encoded_pictures_stood(tmp_path: Path) -> None:
    sizes = seedx_toy.settings(history="direct").model_dump(mode="json")
    run = write_params(tmp_path, seedx=sizes)
    text = raised(lambda: stage_settings(run.params, run.params.stage("rollback")), ValueError)
    assert "seedx.history must be 'repeat'; it is 'direct'" in text
    assert stage_settings(run.params, run.params.stage("base")).history == "direct"


def test_missing_parts_are_named(tmp_path: Path) -> None:
    run = write_params(tmp_path)
    text = raised(lambda: jobs.train_one(run, "base"), CheckpointError)
    assert text.startswith(f"{run.folder / 'weights'}: no such folder; SEED-X begins with released weights")
    assert text.endswith(f"or link it there: `ln -s FOLDER {run.folder / 'weights'}`")
    text = raised(lambda: jobs.train_one(run, "base", weights=tmp_path / "none"), CheckpointError)
    assert text.endswith("give theirs with --weights")
    text = raised(lambda: jobs.train_one(run, "encoder", weights=tmp_path), RunError)
    assert text == "toy: SEED-X's encoder comes with its weights; name a stage or a detokenizer"
    text = raised(lambda: jobs.train_one(run, "rollback", weights=tmp_path), RunError)
    assert "`python -m nmlib data import FOLDER --params toy --name base`" in text
    text = raised(lambda: open_stage(run, "base", tmp_path), CheckpointError)
    assert text.endswith("not trained; `python -m nmlib train --params toy --stage base`")


def test_long_conversations_are_left_out(trained: tuple[Run, Path, list[Any]]) -> None:
    run, *_ = trained
    template = seedx_toy.template(max_length=150)
    stored = StoredSet(run.path("data", "rollback"), seedx_training.fits(template))
    assert stored.dropped > 0
    for conversation in stored.take(range(len(stored))):
        assert template.prefix([conversation], [len(conversation) - 1]).input_ids.shape[1] < 150


# ---------------------------------------------------------------------------------------------------------
# evaluation


def test_an_introduction_stands_in_the_instruction_as_an_upload_does() -> None:
    template = seedx_toy.template()
    slots = "".join(template.tokenizer.convert_ids_to_tokens(template.image_ids))
    rounds = (Round("this is anna", "introduce", name="anna"), Round("make the hat red", "edit", 0))
    told = Conversation("a", "faces", rounds, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    layout = template.packed([told])
    (row,) = layout.input_ids
    (history,) = layout.history_slots
    first = template.tokenizer.decode(row[: int(history.nonzero()[-1]) + 2]).replace(" ", "")
    assert first == f"<s>[INST]<img>{slots}</img>"
    assert (row == template.boi).sum() == 2, "one before the picture that is read, one before the one that is made"
    uploaded = replace(told, rounds=(replace(rounds[0], kind="upload", name=None), rounds[1]))
    assert torch.equal(template.packed([uploaded]).input_ids[0], row)


def test_the_nearest_picture_is_the_latest_of_equals() -> None:
    earlier = torch.tensor([1.0, 3.0, 1.0])[:, None, None].expand(3, 2, 5)
    assert nearest_picture(torch.full((2, 5), 1.4), earlier) == 2
    assert nearest_picture(torch.full((2, 5), 2.4), earlier) == 1


def test_retrieval_asks_every_way_back_and_knows_a_perfect_model(
    trained: tuple[Run, Path, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that predicts the very target is always right; one that predicts the last picture never is."""
    run, weights, _ = trained
    system, stored = open_stage(run, "rollback", weights), StoredSet(run.path("data", "rollback"))
    real = seedx_evaluation.predict_rounds

    def targets(reader: Any, layout: Any, features: torch.Tensor, own: bool) -> torch.Tensor:
        assert real(reader, layout, features, own).shape == (*features.shape[:2], 4, 32)
        return torch.stack([reader.agent.to_target(part) for part in features])

    def last(reader: Any, layout: Any, features: torch.Tensor, own: bool) -> torch.Tensor:
        return targets(reader, layout, features, own).roll(1, dims=1)

    shares = {}
    for name, predict in (("perfect", targets), ("last", last)):
        monkeypatch.setattr(seedx_evaluation, "predict_rounds", predict)
        table = retrieval_table(system, stored, limit=12)
        assert set(table["history"]) == {"own", "clean"} and (table["depth"] >= 1).all() and (table["chance"] < 1).all()
        shares[name] = table["right"].mean()
    assert shares == {"perfect": 1.0, "last": 0.0}


def test_a_way_back_to_what_is_shown_already_is_not_asked(trained: tuple[Run, Path, list[Any]]) -> None:
    """Nor is a branch, which shows what no earlier picture shows."""
    run, weights, _ = trained
    system = open_stage(run, "rollback", weights)
    assert system.vit is not None
    first, second, third = torch.randint(256, (3, 3, seedx_toy.SIDE, seedx_toy.SIDE)).byte()
    rounds = (
        Round("here is a picture", "upload"),
        Round("make the hat red", "edit", 0),
        Round("go back", "rollback", 0, reference="count"),
        Round("go back to the first picture", "rollback", 0, reference="ordinal"),
        Round("go back to #2 and make it blue", "rollback", 1, reference="ordinal"),
    )
    images = torch.stack([first, second, first, first, third])
    told = [Conversation("a", "chains", rounds, images).validate()]
    reader = PictureReader(system.agent, system.vit).eval()
    rows = retrieval_rows(reader, system.template.packed(told), told)
    assert [(row["history"], row["depth"], row["chance"]) for row in rows] == [("own", 1, 0.5), ("clean", 1, 0.5)]


def test_own_history_is_what_was_predicted(trained: tuple[Run, Path, list[Any]]) -> None:
    """Round by round in one layout equals asking for each round behind the predictions before it."""
    run, weights, _ = trained
    system, stored = open_stage(run, "rollback", weights), StoredSet(run.path("data", "rollback"))
    assert system.vit is not None
    reader = PictureReader(system.agent, system.vit).eval()
    (conversation,) = stored.take([next(i for i, c in enumerate(stored.take(range(9))) if len(c) == 4)])
    assert conversation.images is not None
    layout = system.template.packed([conversation])
    features = reader.encode(layout, conversation.images[None])
    made = predict_rounds(reader, layout, features, own=True)
    read = features.clone()
    with torch.no_grad():
        for index in range(1, 4):
            alone = system.template.prefix([conversation], [index])
            (image,) = system.agent.predict(alone, read[alone.history[:, 0], alone.history[:, 1]]).images
            torch.testing.assert_close(made[0, index], image, rtol=1e-4, atol=1e-5)
            read[0, index] = system.agent.to_history(image[None])[0]
    assert not torch.allclose(made, predict_rounds(reader, layout, features, own=False))


def test_evaluation_writes_records(trained: tuple[Run, Path, list[Any]]) -> None:
    run, weights, _ = trained
    table = seedx_evaluation.evaluate(run, "rollback", "rollback", weights)
    found = seedx_evaluation.summary(table)
    assert isinstance(found, pd.DataFrame) and len(found) and (found["low"] <= found["right"]).all()
    depth = found["depth"].iloc[0]
    record = runtime.read_json(run.path("records", f"seedx.retrieval.rollback.own.depth{depth}.rollback.json"))
    asked = table[(table["history"] == "own") & (table["depth"] == depth)]
    assert record["unit"] == "share" and record["n"] == asked["conversation"].nunique()
    assert config.digest(run.params) == record["params_hash"]
    stored = StoredSet(run.path("data", "rollback", HELDOUT))
    told = {conversation.id: conversation for conversation in stored.take(range(len(stored)))}
    for row in table.itertuples():
        images = told[row.conversation].images
        assert images is not None and told[row.conversation].rounds[row.round].base == row.base
        assert row.right == torch.equal(images[row.base], images[row.nearest])


def test_every_conversation_counts_the_same() -> None:
    """One that was asked three times, right and at a chance of a half each, and one asked once, wrong at a fifth."""
    rows = [{"conversation": "a", "right": True, "chance": 0.5}] * 3 + [
        {"conversation": "b", "right": False, "chance": 0.2}
    ]
    (line,) = seedx_evaluation.summary(pd.DataFrame(rows).assign(history="own", depth=2)).itertuples()
    assert (line.right, line.chance, line.conversations, line.rounds) == (0.5, pytest.approx(0.35), 2, 4)


def test_only_histories_of_the_encoder_s_size_are_evaluated(tmp_path: Path) -> None:
    sizes = seedx_toy.settings(max_length=200, history="direct").model_dump(mode="json")
    run = write_params(tmp_path, seedx=sizes, model=sizes["model"])
    text = raised(lambda: seedx_evaluation.evaluate(run, "rollback", "rollback", tmp_path), ValueError)
    assert text.endswith("so seedx.history must be 'repeat'; it is 'direct'") and text.startswith("toy: ")


# ---------------------------------------------------------------------------------------------------------
# the notebook


def test_a_run_of_seedx_is_its_own_notebook_and_no_other(trained: tuple[Run, Path, list[Any]]) -> None:
    """The notebooks about the small model would draw a world at 448 pixels and train an encoder of its size."""
    run, *_ = trained
    steps = Project(PAPER.parent.parent).steps()
    assert [step.name for step in steps if step.applies(run.params)] == ["15_seedx"]
    small = config.load(PAPER.parent / "smoke.yaml")
    assert [step.name for step in steps if not step.applies(small)] == ["15_seedx"]


def test_the_notebook_takes_what_was_trained_and_asks_it(
    trained: tuple[Run, Path, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, weights, history = trained
    run.path("weights").symlink_to(weights)
    assert seedx_training.weights_folder(run) == weights.resolve()
    monkeypatch.setattr(train, "run_training", lambda *_, **__: pytest.fail("trains again"))
    names = run_cells(run, monkeypatch)
    assert names["ready"] == ["base", "rollback"] and names["histories"]["rollback"] == history
    assert names["lacks"]["stage12"] == ["same", "masked"] and names["lacks"]["markov"] == ["markov"]
    assert set(names["answers"]["stage"]) == {"base", "rollback"} and len(names["shown"]) > 0
    assert [len(row) for row in names["rows"].values()] == [len(names["shown"])] * 2
    assert len(names["replies"]) == len(names["asked"]) > 1 and list(names["drawn"]) == ["true"]


def test_the_notebook_says_what_is_to_be_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_params(tmp_path)
    assert "ln -s FOLDER" in raised(lambda: run_cells(run, monkeypatch), CheckpointError)
    seedx_toy.write_released(tmp_path / "seed_x")
    run.path("weights").symlink_to(tmp_path / "seed_x")
    assert "no stage has its data sets yet" in raised(lambda: run_cells(run, monkeypatch), AssertionError)


def run_cells(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the cells of the notebook define."""
    path = PAPER.parent.parent / "notebooks" / "15_seedx.ipynb"
    monkeypatch.chdir(path.parent)
    names: dict[str, Any] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= {"params": str(run.path("params.yaml")), "run": str(run.folder)}
    return names
