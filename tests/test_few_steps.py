"""Few sampling steps: each number against a decoder whose error is known."""

from pathlib import Path

import pytest
import torch
from test_quality import Pixels, Unfold
from torch import Tensor
from toy import SOURCE, open_run

from nmlib import few_steps
from nmlib.records import read_records


class Sampler(Unfold):
    """A decoder whose error is 0.4 over the number of steps."""

    def decode(self, tokens: Tensor, steps: int = 1) -> Tensor:
        self.error = 0.4 / steps
        return super().decode(tokens, steps)


def embed(images: Tensor) -> Tensor:
    """The mean colour as a subject's embedding."""
    return torch.nn.functional.normalize(images.mean((2, 3)))


def test_quality_identity_and_time_by_steps(tmp_path: Path) -> None:
    """An error of 0.2 is 14 dB, and every halving of it 6 dB more."""
    run = open_run(tmp_path, meaningful=False)
    table = few_steps.few_steps_table(run, SOURCE, Pixels(), Sampler(0.0), embed, count=64, repeats=2)  # type: ignore[arg-type]
    assert table["steps"].tolist() == [2] * 4 + [4] * 4 + [8] * 4 + [16] * 4
    means = table.groupby("steps").mean()
    assert means["psnr"].tolist() == pytest.approx([13.98, 20.0, 26.02, 32.04], abs=0.01)
    assert (means["identity"] > 0.9).all() and means["identity"].is_monotonic_increasing
    assert (means["milliseconds"] > 0).all()
    found = read_records(run)
    assert len(found) == 3 * 4
    assert found["detokenizer.psnr.steps4"].value == pytest.approx(20.0, abs=0.01)
    assert found["detokenizer.psnr.steps4"].n == 4 and found["detokenizer.milliseconds.steps16"].unit == "ms"
