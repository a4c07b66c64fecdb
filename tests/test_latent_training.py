"""The full-size detokenizer trained on imported data: general pictures, people, and what a trained stage predicts."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import seedx_toy
import torch
import yaml
from pyarrow import parquet
from test_imports import write_clips, write_sessions
from test_latent_detokenizer import vae
from test_seedx_training import PAPER, run_cells, write_params
from toy import raised

from nmlib import checkpoint, jobs, latent_training, train
from nmlib.checkpoint import CheckpointError
from nmlib.conversation import ConversationError
from nmlib.folder_clips import BOXES
from nmlib.imports import import_set
from nmlib.latent_detokenizer import load_latent_detokenizer
from nmlib.latent_training import FACES, GENERAL, PREDICTED, open_latest, predicted_pairs, split
from nmlib.runtime import Run, RunError, write_json
from nmlib.seedx_training import PictureReader, open_stage, stage_batches
from nmlib.stored_sets import StoredSet

BOX = (0.0, 0.0, 0.5, 0.5)


def small(folder: Path, optim: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A run whose detokenizer is small and learns from what stage `rollback` predicts of `paired`."""
    tuning = yaml.safe_load(PAPER.read_text(encoding="utf-8"))["tuning"]
    usual = {"steps": 4, "batch_size": 12, "learning_rate": 1e-3, "warmup_steps": 1, "checkpoint_every": 2, "parts": 2}
    optim = optim or usual
    settings = {"patch_size": 2, "width": 24, "layers": 1, "heads": 3, "sampling_steps": 2, "optim": optim}
    tuning |= {"stage": "rollback", "faces": optim, "predicted": optim}
    return write_params(folder, **({"detokenizer": settings, "tuning": tuning} | changes))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path, Path]:
    """A run in which all three steps were trained, the weights and the VAE that it began with."""
    folder = tmp_path_factory.mktemp("latents")
    run, weights, sessions = small(folder), folder / "seed_x", write_sessions(folder / "magicbrush")
    seedx_toy.write_released(weights)
    vae().save_pretrained(folder / "vae")
    clips = write_clips(folder / "clips")
    for person in clips.iterdir():
        write_json(person / BOXES, {path.name: BOX for path in person.glob("*.png")})
    for name in ("base", "rollback"):
        import_set(run, name, [sessions])
    import_set(run, "paired", [clips])
    jobs.train_one(run, "rollback", weights=weights)
    jobs.train_one(run, PREDICTED, weights=weights, vae=folder / "vae")
    return run, weights, folder / "vae"


def test_each_step_goes_on_from_the_one_before(tuned: tuple[Run, Path, Path]) -> None:
    run, _, folder = tuned
    weights = [checkpoint.load(run.path(f"{name}.safetensors"))[0] for name in (GENERAL, FACES, PREDICTED)]
    names = [name for name, tensor in weights[0].items() if tensor.is_floating_point() and tensor.numel() > 99]
    for before, after in itertools.pairwise(weights):
        moved = torch.tensor([float((after[name] - before[name]).norm() / before[name].norm()) for name in names])
        assert moved.max() > 0 and moved.median() < 0.2, "four small steps away, not a new start"
    drawn = load_latent_detokenizer(run.path(f"{PREDICTED}.safetensors"), folder).decode(torch.zeros(2, 4, 32))
    assert drawn.shape == (2, 3, seedx_toy.SIDE, seedx_toy.SIDE)


def test_what_is_made_is_not_made_again(
    tuned: tuple[Run, Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another VAE, an earlier step or a stage that was trained anew asks for another training."""
    run, weights, folder = tuned

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trains again")

    monkeypatch.setattr(train, "run_training", refuse)
    assert jobs.train_one(run, PREDICTED, weights=weights, vae=folder)[-1]["step"] == 3
    vae(shift=0.5).save_pretrained(tmp_path)  # weights of the same names and sizes
    with pytest.raises(AssertionError, match="trains again"):
        jobs.train_one(run, GENERAL, weights=weights, vae=tmp_path)
    tensors, metadata = checkpoint.load(run.path(f"{GENERAL}.safetensors"))
    checkpoint.save(run.path(f"{GENERAL}.safetensors"), tensors, metadata | {"key": "trained again"})
    with pytest.raises(AssertionError, match="trains again"):
        jobs.train_one(run, FACES, weights=weights, vae=folder)
    checkpoint.save(run.path(f"{GENERAL}.safetensors"), tensors, metadata)
    notes = run.folder / "models" / "rollback" / "training.json"
    told = notes.read_text()
    notes.write_text(told.replace('"key": "', '"key": "other'))
    with pytest.raises(AssertionError, match="trains again"):
        jobs.train_one(run, PREDICTED, weights=weights, vae=folder)
    notes.write_text(told)


def reader(run: Run, weights: Path) -> tuple[PictureReader, Any]:
    system = open_stage(run, "rollback", weights)
    assert system.vit is not None
    return PictureReader(system.agent, system.vit).eval(), system.template


def test_predictions_are_paired_with_what_they_should_show(tuned: tuple[Run, Path, Path]) -> None:
    """Tokens of round r, made of a history of predictions, beside the picture of round r; parts give the same pairs."""
    run, weights, _ = tuned
    read, template = reader(run, weights)
    stored = StoredSet(run.path("data", "rollback"))
    told = stored.batch(1, 12, 0)
    images = torch.stack([c.images for c in told if c.images is not None])  # (B, R, 3, H, W)
    layout = template.packed(told)
    tokens, shown = predicted_pairs(read, layout, images)
    rows, rounds = layout.queries.T
    assert torch.equal(shown, images[rows, rounds].float() / 255) and tokens.shape == (len(shown), 4, 32)
    features = read.encode(layout, images)  # (B, R, M, D_feature)
    first = read.agent.predict(layout, features[layout.history[:, 0], layout.history[:, 1]]).images
    features[rows, rounds] = read.agent.to_history(first)
    second = read.agent.predict(layout, features[layout.history[:, 0], layout.history[:, 1]]).images
    torch.testing.assert_close(tokens, second)
    assert not torch.allclose(first, second)
    pieces = split({"layout": layout, "images": images}, 2)
    parts = [predicted_pairs(read, piece.batch["layout"], images)[0] for piece in pieces]
    torch.testing.assert_close(torch.cat(parts), tokens, rtol=1e-4, atol=1e-4)
    assert sum(piece.weight for piece in pieces) == pytest.approx(1)
    assert [piece.weight for piece in pieces] == [len(part) / len(tokens) for part in parts]


def test_the_notebook_draws_what_the_model_makes(
    tuned: tuple[Run, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, weights, folder = tuned
    for name, target in (("weights", weights), (latent_training.VAE, folder)):
        run.path(name).symlink_to(target)
    names = run_cells(run, monkeypatch)
    assert list(names["drawn"]) == ["true", "tokens", "reencode", "oracle"]
    first = [names["drawn"][policy][0] for policy in ("tokens", "reencode", "oracle")]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2]), "nothing was read yet"
    assert not torch.equal(names["drawn"]["tokens"][-1], names["drawn"]["oracle"][-1])


def test_a_step_that_its_earlier_step_left_behind_is_passed_over(tuned: tuple[Run, Path, Path], tmp_path: Path) -> None:
    run = Run(tuned[0].params, tmp_path)
    assert open_latest(run, tuned[2]) is None
    for name in (GENERAL, FACES, PREDICTED):
        shutil.copy(tuned[0].path(f"{name}.safetensors"), tmp_path)
    opened = open_latest(run, tuned[2])
    assert opened is not None
    latest = checkpoint.load(run.path(f"{PREDICTED}.safetensors"))[0]
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in latest.items())
    tensors, metadata = checkpoint.load(run.path(f"{GENERAL}.safetensors"))
    checkpoint.save(run.path(f"{GENERAL}.safetensors"), tensors, metadata | {"key": "trained again"})
    opened = open_latest(run, tuned[2])
    assert opened is not None and torch.equal(opened.state_dict()["null"], tensors["null"])


def test_faces_of_clips_weigh_more_in_a_stage(tuned: tuple[Run, Path, Path]) -> None:
    """A face in the upper left quarter of 4 x 4 cells: two rows of 2, 2, 1, 1, mean 1.25; every row is a token."""
    run, weights, _ = tuned
    stage = run.params.stage("stage123").model_copy(update={"data": {"paired": 1.0, "rollback": 1.0}})
    sets = {name: StoredSet(run.path("data", name)) for name in stage.data}
    assert {item.face for c in sets["paired"].told for item in c.rounds} == {BOX}
    read, template = reader(run, weights)
    batch_at, seen = stage_batches(run.params, stage, sets, template, 0), set()
    for step in range(6):
        batch = batch_at(step)
        seen.add(batch["weights"] is None)
        if batch["weights"] is None:  # of the data set in which nobody has a name
            continue
        expected = torch.tensor([1.2, 1.2, 0.8, 0.8]).expand(*batch["images"].shape[:2], 4)
        torch.testing.assert_close(batch["weights"], expected)
        layout, images = batch["layout"], batch["images"]
        with torch.no_grad():
            upper, plain = (
                read(layout, images, weights=each).image
                for each in (torch.tensor([2.0, 2.0, 0.0, 0.0]).expand_as(expected), None)
            )
            weighed = read(layout, images, weights=batch["weights"]).image
        torch.testing.assert_close(weighed, 0.8 * plain + 0.2 * upper)
    assert seen == {True, False}


def test_missing_parts_are_named(tmp_path: Path) -> None:
    run = small(tmp_path)
    seedx_toy.write_released(tmp_path / "seed_x")
    folder = tmp_path / "vae"
    folder.mkdir()
    text = raised(lambda: jobs.train_one(run, GENERAL, weights=tmp_path / "seed_x", vae=folder), ValueError)
    assert text == (
        "toy: detokenizer learns from base or markov or rollback or masked or paired or same, of which none was "
        "imported; `python -m nmlib data import FOLDER --params toy --name base`"
    )
    import_set(run, "base", [write_sessions(tmp_path / "magicbrush")])
    text = raised(lambda: jobs.train_one(run, GENERAL, weights=tmp_path / "seed_x"), CheckpointError)
    place = run.path(latent_training.VAE)
    assert (
        text
        == f"{place}: no such folder; expected the VAE of a diffusers pipeline; link it there: `ln -s FOLDER {place}`"
    )
    run.path(latent_training.VAE).mkdir()
    assert "no VAE" in raised(lambda: jobs.train_one(run, GENERAL, weights=tmp_path / "seed_x"), CheckpointError)
    text = raised(lambda: jobs.train_one(run, FACES, weights=tmp_path / "seed_x"), ValueError)
    assert text.startswith("toy: detokenizer-faces learns from paired, of which none was imported; ")
    shutil.copytree(run.path("data", "base"), run.path("data", "paired"), dirs_exist_ok=True)
    text = raised(lambda: jobs.train_one(run, PREDICTED, weights=tmp_path / "seed_x"), CheckpointError)
    assert (
        text == f"{run.path('models', 'rollback')}: not trained; `python -m nmlib train --params toy --stage rollback`"
    )
    assert not list(run.folder.glob("*.safetensors")), "nothing is trained before all is there"
    text = raised(lambda: jobs.train_one(run, "detokenizer-face", weights=tmp_path / "seed_x"), RunError)
    assert text.endswith("; detokenizer, detokenizer-faces, detokenizer-predicted can be trained as well")
    cpu = Run.open(PAPER.parent / "cpu.yaml", tmp_path / "cpu")
    text = raised(lambda: jobs.train_one(cpu, GENERAL, vae=tmp_path), RunError)
    assert text == f"--vae {tmp_path}: cpu has no `seedx:` block, its models begin with nothing"


def test_settings_that_cannot_be_trained(tmp_path: Path) -> None:
    seedx_toy.write_released(tmp_path / "seed_x")
    start = lambda run, name: jobs.train_one(run, name, weights=tmp_path / "seed_x", vae=tmp_path)  # noqa: E731
    optim = {"steps": 4, "batch_size": 3, "learning_rate": 1e-3, "parts": 4}
    run = small(tmp_path / "parts", optim)
    import_set(run, "base", [write_sessions(tmp_path / "magicbrush")])
    text = raised(lambda: start(run, GENERAL), ValueError)
    assert text == (
        "detokenizer: batch_size 3 gives 3 conversations of 1 rounds, which cannot be cut into 4 parts; "
        "raise batch_size or lower parts"
    )
    run = small(tmp_path / "history", seedx=seedx_toy.settings(history="direct").model_dump(mode="json"))
    import_set(run, "base", [tmp_path / "magicbrush"])
    shutil.copytree(run.path("data", "base"), run.path("data", "paired"), dirs_exist_ok=True)
    text = raised(lambda: start(run, PREDICTED), ValueError)
    assert text.endswith("seedx.history must be 'repeat'; it is 'direct'")
    run = small(tmp_path / "tuning", tuning=None)
    text = raised(lambda: start(run, FACES), ValueError)
    assert text == "params 'toy': no `tuning:` block; add one, as params/paper.yaml has"


def test_data_of_an_earlier_version_says_so(tuned: tuple[Run, Path, Path], tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(tuned[0].path("data", "base"), old)
    table = parquet.read_table(old / "rounds.parquet").drop_columns(["face"])
    parquet.write_table(table, old / "rounds.parquet")
    text = raised(lambda: StoredSet(old), ConversationError)
    assert text == f"{old / 'rounds.parquet'}: written by an earlier version, without ['face']; import it again"
