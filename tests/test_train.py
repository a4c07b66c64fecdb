"""The training loop: its schedule, that it repeats exactly, resumes exactly, and can learn."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from toy import conversations, draw, make_model, raised, system

from nmlib import checkpoint
from nmlib.checkpoint import CheckpointError
from nmlib.config import OptimConfig
from nmlib.train import Training, fit, learning_rate, step_seed

OPTIM = OptimConfig(steps=23, batch_size=5, learning_rate=1e-2, warmup_steps=4, ema_decay=0.8, checkpoint_every=7)


class Squared(NamedTuple):
    total: Tensor
    other: Tensor


class Line(nn.Module):
    """A small net with a weight, a bias, a frozen parameter, a buffer that training moves, and noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.net = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Dropout(0.2), nn.Linear(7, 2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Squared:
        error = self.net(x + 0.1 * torch.randn_like(x)) * self.frozen - x[:, :2].sin()
        return Squared(error.square().mean(), error.abs().mean())


def batch_at(step: int) -> Mapping[str, Tensor]:
    return {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(step))}


def trained(folder: Path, optim: OptimConfig = OPTIM, seed: int = 3, **more: Any) -> Line:
    module = Line()
    fit(module, batch_at, optim, folder, seed=seed, precision="float32", **more)
    return module


def equal(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Killed(Exception):
    """Stands in for the end of a process."""


# ---------------------------------------------------------------------------------------------------------
# schedule


def test_learning_rate_by_hand() -> None:
    """Warm-up over 4 steps to 0.4, then 8 steps of cosine down to a tenth; half way the mean of both ends."""
    optim = OptimConfig(steps=12, batch_size=1, learning_rate=0.4, warmup_steps=4, min_learning_rate_ratio=0.1)
    rates = [learning_rate(optim, step) for step in range(12)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[8] == pytest.approx(0.5 * (0.4 + 0.04))
    assert learning_rate(optim, 12) == learning_rate(optim, 99) == pytest.approx(0.04)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    none = optim.model_copy(update={"warmup_steps": 0})
    assert learning_rate(none, 0) == pytest.approx(0.4)
    only = optim.model_copy(update={"warmup_steps": 12})
    assert learning_rate(only, 11) == pytest.approx(0.4)


def test_the_optimizer_uses_the_rate_of_its_step(tmp_path: Path) -> None:
    training = Training(Line(), OPTIM, tmp_path / "p.safetensors", 0)
    for step in range(6):
        training.update(batch_at(step), torch.float32)
        assert {group["lr"] for group in training.optimizer.param_groups} == {learning_rate(OPTIM, step)}


def test_step_seeds_are_distinct() -> None:
    assert len({step_seed(seed, step) for seed in range(9) for step in range(2000)}) == 9 * 2000


# ---------------------------------------------------------------------------------------------------------
# one step


def test_a_step_is_adamw_with_clipping(tmp_path: Path) -> None:
    """Against torch.optim.AdamW driven by hand; weights decay, vectors do not, what is frozen stays."""
    optim = OPTIM.model_copy(update={"max_grad_norm": 0.05, "weight_decay": 0.3, "ema_decay": 0.0})
    training = Training(Line(), optim, tmp_path / "p.safetensors", 7)
    other = Line()
    matrices = [p for p in other.parameters() if p.ndim == 2]
    vectors = [p for p in other.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=optim.betas)
    for step in range(3):
        training.update(batch_at(step), torch.float32)
        torch.manual_seed(step_seed(7, step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step)
        other(**batch_at(step)).total.backward()
        assert nn.utils.clip_grad_norm_(other.parameters(), 0.05) > 0.05, "there is something to clip"
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(training.module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(training.module.frozen, torch.ones(2))


def test_the_average_by_hand(tmp_path: Path) -> None:
    training = Training(Line(), OPTIM, tmp_path / "p.safetensors", 0)
    weight = training.parameters["net.0.weight"]
    expected = weight.detach().clone()
    for step in range(4):
        training.update(batch_at(step), torch.float32)
        expected = 0.8 * expected + 0.2 * weight.detach()
    training.finish()
    torch.testing.assert_close(weight, expected)
    assert "frozen" not in training.average


def test_what_is_no_tensor_goes_into_the_module_too(tmp_path: Path) -> None:
    class Moved:
        """Like a layout: no tensor, but it knows how to move."""

        moved = 0

        def to(self, device: torch.device) -> "Moved":
            self.moved += 1
            return self

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, layout: Moved, step: int) -> Squared:
            assert layout.moved == 1 and step == 5
            return Squared(self.weight.square().sum(), self.weight.sum())

    Training(Sum(), OPTIM, tmp_path / "p.safetensors", 0).update({"layout": Moved(), "step": 5}, torch.float32)


# ---------------------------------------------------------------------------------------------------------
# again, and on


def test_two_runs_of_a_seed_agree_exactly_and_another_seed_differs(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "a"), trained(tmp_path / "b")
    assert equal(first, second)
    assert not equal(first, trained(tmp_path / "c", seed=4))
    assert not equal(first, Line())


@pytest.mark.parametrize("last", [3, 7, 8, 20])
def test_resumed_equals_uninterrupted(tmp_path: Path, last: int) -> None:
    """Killed before the step `last`: at a checkpoint, just after one, before the first, near the end."""

    def dying(step: int) -> Mapping[str, Tensor]:
        if step == last:
            raise Killed
        return batch_at(step)

    module = Line()
    with pytest.raises(Killed):
        fit(module, dying, OPTIM, tmp_path / "a", seed=3, precision="float32")
    resumed, history = Line(), []
    history = fit(resumed, batch_at, OPTIM, tmp_path / "a", seed=3, precision="float32")
    whole = Line()
    assert history == fit(whole, batch_at, OPTIM, tmp_path / "b", seed=3, precision="float32")
    assert equal(resumed, whole)
    assert [record["step"] for record in history] == [0, 10, 20, 22]


def test_a_finished_training_gives_its_result_again(tmp_path: Path) -> None:
    first, again = trained(tmp_path), Line()
    history = fit(
        again, lambda step: pytest.fail("nothing is left to do"), OPTIM, tmp_path, seed=3, precision="float32"
    )
    assert equal(first, again) and history[-1]["step"] == OPTIM.steps - 1


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from nmlib.train import fit
from test_train import OPTIM, Line, batch_at
def slowly(step):
    print(step, flush=True)
    if step > 8:
        sys.stdin.readline()
    return batch_at(step)
fit(Line(), slowly, OPTIM, Path({folder!r}), seed=3, precision="float32")
"""


def test_a_process_killed_in_training_is_resumed_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as child:  # type: ignore[call-overload]
        assert any(line.strip() == "9" for line in child.stdout), "it got to step 9"
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    _, metadata = checkpoint.load(folder / "progress.safetensors")
    assert metadata["step"] == 7, "the last checkpoint is whole"
    assert equal(trained(folder), trained(tmp_path / "whole"))


def test_a_checkpoint_that_was_being_written_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, real = [], checkpoint.save_file

    def dying(tensors: Any, name: Path, metadata: Any) -> None:
        written.append(name)
        if len(written) == 2:
            Path(name).write_bytes(b"half of it")
            raise Killed
        real(tensors, name, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", dying)
    with pytest.raises(Killed):
        trained(tmp_path / "a")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "a" / "progress.safetensors")[1]["step"] == 7
    assert equal(trained(tmp_path / "a"), trained(tmp_path / "b"))


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"optim": OPTIM.model_copy(update={"learning_rate": 2e-2})}, {"key": "other noise"}]
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    trained(tmp_path)
    text = raised(lambda: trained(tmp_path, **change), CheckpointError)
    why = "belongs to other settings, data or library code; delete it to train anew"
    assert text == f"{tmp_path / 'progress.safetensors'}: {why}"


def test_a_checkpoint_of_another_network_or_damaged_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    path = tmp_path / "progress.safetensors"

    class Wider(Line):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    text = raised(lambda: fit(Wider(), batch_at, OPTIM, tmp_path, seed=3), CheckpointError)
    assert text.startswith(f"{path}: does not fit Wider: missing more.weight (2, 2)")
    path.write_bytes(path.read_bytes()[:-9])
    assert raised(lambda: trained(tmp_path), CheckpointError).startswith(f"{path}: damaged or truncated")


# ---------------------------------------------------------------------------------------------------------
# what goes wrong, and what is written down


@pytest.mark.parametrize("bad", [3, 8])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_is_never_stored(tmp_path: Path, bad: int) -> None:
    def poisoned(step: int) -> Mapping[str, Tensor]:
        return {"x": batch_at(step)["x"] * (float("nan") if step == bad else 1)}

    folder = tmp_path / "encoder"
    text = raised(lambda: fit(Line(), poisoned, OPTIM, folder, seed=3, precision="float32"), FloatingPointError)
    assert text == f"training 'encoder', step {bad}: the loss is nan; lower the learning rate"
    assert equal(trained(folder), trained(tmp_path / "whole")), "a better batch goes on from the last good checkpoint"


def test_a_gradient_that_is_not_finite_is_named_too(tmp_path: Path) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self) -> Squared:
            return Squared(self.weight.sqrt().sum(), self.weight.sum())

    module = Root()
    text = raised(lambda: fit(module, lambda step: {}, OPTIM, tmp_path / "root", seed=0), FloatingPointError)
    assert text == "training 'root', step 0: the gradient is inf; lower the learning rate"
    assert torch.equal(module.weight, torch.zeros(1))


def test_history_and_tensorboard(tmp_path: Path) -> None:
    module = Line()
    history = fit(module, batch_at, OPTIM, tmp_path, seed=3, precision="float32")
    assert [record.keys() for record in history] == [{"total", "other", "step", "learning_rate"}] * 4
    assert json.loads(json.dumps(history)) == history and not module.training
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"total", "other", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("total")] == [0, 10, 20, 22]


def test_bfloat16_computes_in_it_and_keeps_float32_weights(tmp_path: Path) -> None:
    seen = []

    class Spy(Line):
        def forward(self, x: Tensor) -> Squared:
            seen.append(self.net[0](x).dtype)
            return super().forward(x)

    module = Spy()
    fit(module, batch_at, OPTIM, tmp_path, seed=3, precision="bfloat16")
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_on_a_cpu_attention_is_not_fused(tmp_path: Path) -> None:
    """Neither forward nor, where layers repeat it, backward."""
    seen = []

    class Spy(Line):
        def forward(self, x: Tensor) -> Squared:
            seen.append(torch.backends.cuda.flash_sdp_enabled())
            losses = super().forward(x)
            losses.total.register_hook(lambda _: seen.append(torch.backends.cuda.flash_sdp_enabled()))
            return losses

    fit(Spy(), batch_at, OPTIM.model_copy(update={"steps": 1}), tmp_path, seed=3)
    assert seen == [False, False] and torch.backends.cuda.flash_sdp_enabled()


# ---------------------------------------------------------------------------------------------------------
# learning


def test_the_model_learns_one_batch_by_heart(tmp_path: Path) -> None:
    """300 steps on one batch: the words below 0.01 (from ln 128 = 4.9), the pictures below 0.03 (from 2)."""
    model, template = make_model(0, excitement=3.0, hidden_size=48, heads=2)
    batch = template.packed(conversations())
    features = torch.stack([system().encode(draw(told).images) for told in conversations()])  # type: ignore[arg-type]
    optim = OptimConfig(steps=300, batch_size=2, learning_rate=1e-2, warmup_steps=10, weight_decay=0.0)
    history = fit(
        model, lambda step: {"layout": batch, "features": features}, optim, tmp_path, seed=0, precision="float32"
    )
    assert history[0]["text"] > 4 and history[0]["image"] > 1
    with torch.no_grad():
        losses = model(batch, features)
    assert losses.text < 0.01 and losses.image < 0.03
