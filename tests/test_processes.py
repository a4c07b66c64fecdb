"""Several processes: the same training in one and in two gives the same losses, whoever reads which part."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import seedx_toy
import shared_training
import torch
import yaml
from toy import conversations, make_model, open_run, raised

from nmlib import batches, config, curriculum, experiments, jobs, train
from nmlib.layout import Layout
from nmlib.runtime import RunError
from nmlib.seedx import SeedXLayout
from nmlib.train import Training, cut_rows, split_rows

ROOT = Path(__file__).parent.parent


def launch(folder: Path, kind: str) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Losses and weights of two processes."""
    folder.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "params" / "accelerate" / "cpu.yaml"), str(ROOT / "tests" / "shared_training.py")]
    done = subprocess.run([*command, str(folder), kind], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "losses.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


def one_process(folder: Path, kind: str = "copies") -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Losses and weights of one process that was never interrupted."""
    torch.set_num_threads(1)
    training = shared_training.begin(folder)
    losses = shared_training.go_on(training, 10, kind)
    training.finish()
    return losses, training.module.state_dict()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """One process, with pictures."""
    return one_process(tmp_path_factory.mktemp("alone"))


def without_key_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights but for the keys' third of each `in_proj_bias`.

    A bias of keys adds the same number to all scores of a query, which softmax forgets: its gradient is nothing but
    rounding, and Adam makes steps of full length of it.
    """
    kept = dict(weights)
    for name in [name for name in weights if name.endswith("attn.in_proj_bias")]:
        queries, _, values = weights[name].chunk(3)
        kept[name] = torch.cat([queries, values])
    return kept


@pytest.mark.parametrize("kind", ["copies", "sharded", "words"])
def test_two_processes_equal_one(alone: Any, tmp_path: Path, kind: str) -> None:
    """Ten losses and the weights after them, with noise, dropout, own predictions and a checkpoint in between."""
    own_losses, own_weights = one_process(tmp_path / "one", kind) if kind == "words" else alone
    losses, weights = launch(tmp_path / kind, kind)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(own_losses), rtol=0, atol=1e-4)
    assert weights.keys() == own_weights.keys()
    found = without_key_biases(weights)
    for name, tensor in without_key_biases(own_weights).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    assert losses[0] != losses[-1]


def test_a_bias_of_keys_has_no_gradient_but_rounding() -> None:
    model, template = make_model()
    told = conversations()
    features = torch.randn(len(told), max(map(len, told)), model.tokens_per_image, model.feature_dim)
    model(template.packed(told), features).total.backward()
    for part in (model.input_resampler, model.output_resampler):
        gradient = part.attn.in_proj_bias.grad
        assert gradient is not None
        queries, keys, values = (third.abs().max() for third in gradient.chunk(3))
        assert keys < 1e-4 * min(queries, values)


def test_repeated_forward_passes_change_nothing(alone: Any, tmp_path: Path) -> None:
    training = shared_training.begin(tmp_path, activation_checkpointing=True)
    # of the attention: a repeated pass stops early, before the end of the layer
    calls, layer = [], training.module.base_llm.model.layers[0].self_attn  # type: ignore[union-attr,operator]
    layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    losses = shared_training.go_on(training, 1)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone[0][:1]), rtol=0, atol=1e-5)
    plain = shared_training.begin(tmp_path / "plain")
    before = len(calls)
    plain.module.base_llm.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(True))  # type: ignore
    shared_training.go_on(plain, 1)
    assert before > len(calls) - before, "layers ran more often than without"


def test_a_module_that_keeps_all_says_so(tmp_path: Path) -> None:
    optim = shared_training.OPTIM.model_copy(update={"activation_checkpointing": True})
    text = raised(lambda: Training(torch.nn.Linear(2, 2), optim, tmp_path / "p", 0), ValueError)
    assert text == "activation_checkpointing: no part of Linear can; set it to false"


# ---------------------------------------------------------------------------------------------------------
# parts


def test_parts_of_a_layout_are_its_rows() -> None:
    """Slots, blocks and bases of a part are those of a batch that never had the other rows."""
    _, template = make_model()
    told = [*conversations(), conversations()[0]]
    batch = template.packed(told)
    for start, stop in ((0, 1), (1, 3), (0, 3)):
        part, own = batch.rows(start, stop), template.packed(told[start:stop])
        width = own.input_ids.shape[1]
        for name, value in vars(own).items():
            found = getattr(part, name)
            if name in ("queries", "history"):
                assert torch.equal(found - torch.tensor([start, 0]), value)
            else:
                assert torch.equal(found[:, :width] if found.ndim == 2 else found, value), name
    assert type(batch.rows(0, 1)) is Layout
    prefix = template.prefix(conversations())
    counted = [len(prefix.rows(row, row + 1).queries) for row in range(len(prefix.input_ids))]
    assert counted == [1] * len(prefix.input_ids)


def test_losses_of_parts_add_up() -> None:
    """Also where parts supervise different numbers of words and pictures."""
    model, _ = make_model()
    batch = shared_training.batch_at(0) | {"history_noise": 0.0}
    with torch.no_grad():
        for parts in (2, 3):
            batch["words"] = shared_training.template().packed([*conversations(), conversations()[0]], pictures=False)
            together = torch.stack(list(model(**batch)))
            pieces = [torch.stack(list(model(**part.batch))) for part in curriculum.split(batch, parts)]
            torch.testing.assert_close(torch.stack(pieces).sum(0), together, rtol=1e-5, atol=1e-5)
            means = torch.stack([torch.stack(list(model(**{**p.batch, "whole": None})))
                                 for p in curriculum.split(batch, parts)]).mean(0)  # fmt: skip
            assert not torch.allclose(means, together, rtol=1e-3), "the mean of means is another number"


def test_parts_of_seedx_with_tiles_add_up() -> None:
    """Tiles of a picture are history blocks with places of their own, which must follow their rows."""
    agent, template = seedx_toy.agent(), seedx_toy.template()
    tiles = ((0.25, 0.5), (0.75, 0.5), (0.5, 0.5))
    samples = [template.edit("make the hat red", "here it is", tiles), template.text_to_image("make", "a hat", "so")]
    samples.append(template.edit("blue", "yes"))
    batch = {"layout": template.batch(samples), "features": torch.randn(1, 7, 16, 32)}
    second = batch["layout"].rows(2, 3)
    assert second.patch_positions.tolist() == [[0.5, 0.5]] and second.history.tolist() == [[0, 5]]
    assert type(second.to("cpu")) is SeedXLayout
    with torch.no_grad():
        together = torch.stack(list(agent(**batch)))
        pieces = [torch.stack(list(agent(**part.batch))) for part in curriculum.split(batch, 3)]
    torch.testing.assert_close(torch.stack(pieces).sum(0), together, rtol=1e-4, atol=1e-4)


def test_rows_are_cut_into_runs() -> None:
    assert cut_rows(7, 3) == [(0, 2), (2, 4), (4, 7)]
    parts = split_rows({"x": torch.arange(5), "step": 3}, 2)
    assert [part.batch["x"].tolist() for part in parts] == [[0, 1], [2, 3, 4]]
    assert [part.weight for part in parts] == [0.4, 0.6] and parts[0].batch["step"] == 3
    text = raised(lambda: cut_rows(2, 3), ValueError)
    assert text == "a batch of 2 rows cannot be cut into 3 parts; raise batch_size or lower parts"


def test_seeds_of_parts_are_distinct() -> None:
    seeds = {train.step_seed(seed, step, part) for seed in range(5) for step in range(500) for part in range(8)}
    assert len(seeds) == 5 * 500 * 8
    assert train.step_seed(3, 4, 0) == train.step_seed(3, 4)


def test_settings_know_how_many_parts_a_batch_can_have(tiny: dict[str, Any]) -> None:
    plain = config.parse(tiny, "t")
    tiny["stages"][2]["optim"]["parts"] = 4
    parsed = config.parse(tiny, "t")
    assert parsed.stages[2].optim.parts == 4 and config.digest(parsed) != config.digest(plain)
    assert "parts" not in plain.model_dump()["stages"][2]["optim"], "the default changes no digest"
    tiny["stages"][2]["optim"]["parts"] = 5
    text = raised(lambda: config.parse(tiny, "t"), config.ParamsError)
    assert text == (
        "t: (whole file): stages: 'markov': optim.batch_size 24 is 4 conversations of 6 rounds; optim.parts 5 needs at "
        "least 30"
    )


def test_processes_must_share_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.Accelerator, "num_processes", property(lambda self: 3))
    text = raised(lambda: shared_training.begin(tmp_path), ValueError)
    assert text == "optim.parts 2 cannot be shared by 3 processes; expected a multiple"


# ---------------------------------------------------------------------------------------------------------
# the verb


def test_verb_says_what_is_missing(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    assert "has no stage 'last'" in raised(lambda: jobs.train_one(run, "last"), RunError)
    text = raised(lambda: jobs.train_one(run, "rollback"), RunError)
    assert text.startswith(f"{run.path('data', 'base')}: data set 'base' was not drawn yet; run the notebooks")
    assert not run.path("encoder.safetensors").exists(), "it says so before it trains anything"


def test_notebooks_find_what_the_verb_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder, base and rollback in one call; `train_stage`, as a notebook calls it, then has nothing to do."""
    run = open_run(tmp_path)
    for name in ("base", "rollback"):
        batches.build(run.params, name, run.path("data", name), 11)
    history = jobs.train_one(run, "rollback")
    assert history[-1]["step"] == 7 and run.path("models", "base.safetensors").exists()
    features = experiments.read_sets(run, ["rollback"])
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert curriculum.train_stage(run, "rollback", features) == jobs.train_one(run, "rollback") == history


@pytest.mark.parametrize("name", ["cpu", "copies", "sharded"])
def test_launch_files(name: str) -> None:
    """Precision is the params file's; accelerate's own mixing would change it."""
    settings = yaml.safe_load((ROOT / "params" / "accelerate" / f"{name}.yaml").read_text())
    assert settings["mixed_precision"] == "no" and settings["num_processes"] > 1
    assert (settings["distributed_type"] == "FSDP") == (name == "sharded")
