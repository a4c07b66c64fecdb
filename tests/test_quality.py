"""How good the parts are: each number against a case whose answer is known."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy import SOURCE, Trained, open_run

from nmlib import codec, quality
from nmlib.identity import FaceEmbedder
from nmlib.records import read_records
from nmlib.runtime import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run without anything in it that takes records."""
    return open_run(tmp_path, meaningful=False)


class Pixels(torch.nn.Module):
    """An encoder that loses nothing: every quarter of the picture is a token."""

    def forward(self, images: Tensor) -> Tensor:
        quarters = images.unflatten(2, (2, 8)).unflatten(4, (2, 8))  # (B, 3, 2, 8, 2, 8)
        return quarters.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, 4, 192)


class Unfold(torch.nn.Module):
    """The detokenizer of `Pixels`, every pixel of it wrong by a known error, in a random direction."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def decode(self, tokens: Tensor, steps: int = 1) -> Tensor:
        quarters = tokens.unflatten(1, (2, 2)).unflatten(3, (3, 8, 8))  # (B, 2, 2, 3, 8, 8)
        images = quarters.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # (B, 3, 16, 16)
        signs = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).sub(0.5).sign()
        return images + self.error * signs


def test_seams_are_jumps_at_the_borders_of_patches() -> None:
    """A chequerboard of 4 px jumps at borders only; a plain slope jumps alike everywhere."""
    slope = torch.arange(16.0).expand(2, 3, 16, 16)
    assert quality.seam_ratio(slope + slope.transpose(2, 3), 4) == pytest.approx(1.0)
    cells = torch.arange(16) // 4
    board = ((cells[:, None] + cells) % 2).float().expand(2, 3, 16, 16)
    assert quality.seam_ratio(board + 0.01 * slope + 0.01 * slope.transpose(2, 3), 4) > 50


def test_a_probe_reads_what_is_there_and_nothing_else(run: Run) -> None:
    table = quality.probe_table(run, SOURCE, Pixels())  # type: ignore[arg-type]
    assert table["attribute"].tolist() == ["square", "ground", "edge"]
    assert table["chance"].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 2])
    assert (table.set_index("attribute")["accuracy"][["ground", "edge"]] == 1.0).all()
    record = read_records(run)["encoder.probe_accuracy"]
    assert record.value == table["accuracy"].min() and record.n == quality.PROBE_TEST // 10

    class Blind(Pixels):
        def forward(self, images: Tensor) -> Tensor:
            return torch.randn(len(images), 4, 5)

    assert (quality.probe_table(run, SOURCE, Blind())["accuracy"] < 0.75).all()  # type: ignore[arg-type]


def test_a_reconstruction_with_a_known_error(run: Run) -> None:
    """An error of 0.1 in every pixel is 20 dB, and noise has no seams."""
    table = quality.reconstruction_table(run, SOURCE, Pixels(), Unfold(0.1), count=160)  # type: ignore[arg-type]
    assert set(table["steps"]) == {1, 2, 4, 8} and len(table) == 4 * 10
    assert table["psnr"].tolist() == pytest.approx([20.0] * 40, abs=1e-3)
    assert read_records(run)["detokenizer.psnr"].value == pytest.approx(20.0, abs=1e-3)
    assert read_records(run)["detokenizer.seam"].value == pytest.approx(1.0, abs=0.1)
    drift = quality.drift_of_decoding(SOURCE, Pixels(), Unfold(0.0), rounds=3, count=2)  # type: ignore[arg-type]
    assert drift["round"].tolist() == [1, 1, 2, 2, 3, 3] and (drift["psnr"] > 50).all(), "rounding to 8 bits only"


def test_a_real_reconstruction_has_records(run: Run, trained: Trained) -> None:
    encoder, detokenizer = codec.load_encoder(trained.run), codec.load_detokenizer(trained.run)
    table = quality.reconstruction_table(run, SOURCE, encoder, detokenizer, count=48)
    own = table[table["steps"] == run.params.detokenizer.sampling_steps]
    records = read_records(run)
    assert records["detokenizer.psnr"].value == pytest.approx(own["psnr"].mean())
    assert records["detokenizer.ssim"].n == 3 and records["detokenizer.seam"].value > 0


def test_similarities_of_known_pairs(run: Run, trained: Trained) -> None:
    embedder = FaceEmbedder(trained.run.path("identity.onnx"))
    table = quality.identity_table(run, SOURCE, embedder, count=12)
    assert table["pair"].value_counts().to_dict() == {"same": 12, "other": 12}
    assert table["similarity"].between(-1.001, 1.001).all()
    assert 0 <= read_records(run)["metric.arcface.auroc"].value <= 1
