"""The face embedder: trained here, exported, and read by insightface as any other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import SOURCE, Trained, raised

from nmlib import data, identity
from nmlib.config import IdentityConfig, OptimConfig
from nmlib.identity import ArcFaceTrainer, Embedder, FaceEmbedder, IdentityError, copy_paste_score
from nmlib.train import fit

CHANCE = data.step_generator(4, 0)
PEOPLE = SOURCE.sample_subjects(6, "heldout", CHANCE)
VALUES = data.sample_values(SOURCE, 6, CHANCE)
PICTURES = SOURCE.render(PEOPLE, VALUES)


@pytest.fixture(scope="module")
def embedder(trained: Trained) -> FaceEmbedder:
    return FaceEmbedder(trained.run.path("identity.onnx"))


def test_insightface_reads_what_torch_computes(trained: Trained, embedder: FaceEmbedder) -> None:
    """Same pixels in the same order of colours: the cosine between both is 1 for every picture."""
    own = trained.modules["identity"].embedder
    resized = nn.functional.interpolate(PICTURES, size=(112, 112), mode="bilinear", align_corners=False)
    eight_bits = (resized * 255).round() / 255
    with torch.no_grad():
        expected = own(eight_bits * 2 - 1)
    vectors = embedder(PICTURES)
    assert vectors.shape == expected.shape == (6, 12)
    assert ((vectors * expected).sum(1) > 0.999).all()
    swapped = own(eight_bits.flip(1) * 2 - 1)
    assert ((vectors * swapped).sum(1) < 0.999).any(), "red and blue are told apart"
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))


def test_many_pictures_equal_few(embedder: FaceEmbedder) -> None:
    many = PICTURES.repeat(50, 1, 1, 1)
    torch.testing.assert_close(embedder(many), embedder(PICTURES).repeat(50, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embedder(PICTURES[:1]), embedder(PICTURES)[:1], rtol=1e-4, atol=1e-4)


class Scripted(FaceEmbedder):
    """An embedder that looks its vectors up, to check the check."""

    def __init__(self) -> None:
        pass

    def __call__(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(images.flatten(1), dim=1)


def test_check_is_the_area_under_the_curve() -> None:
    """By hand: same pairs score 1, 1, 0; of the six others two score 1 (the third shows the first): 10 of 18 wins."""
    axes = torch.eye(3)[:, :, None, None]
    assert Scripted().check(axes, axes) == 1.0
    second = axes[[0, 1, 0]]
    same, other = [1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    wins = np.mean([[s > o for o in other] for s in same])
    assert Scripted().check(axes, second) == pytest.approx(wins)


class Blind(nn.Module):
    """Sees no difference between any two pictures."""

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(1e-6 * pixels.flatten(1)[:, :5] + 1.0, dim=1)


def test_a_network_for_which_all_are_alike_is_refused(tmp_path: Path) -> None:
    identity.export_onnx(Blind(), tmp_path / "blind.onnx")  # type: ignore[arg-type]
    blind = FaceEmbedder(tmp_path / "blind.onnx")
    text = raised(lambda: blind.check(PICTURES, PICTURES.flip(0)), IdentityError)
    assert text.startswith("every pair scores 1.00: this is no face embedder, or it scales its own input")


class ScalesItsInput(nn.Module):
    """A network that maps pixels to [-1, 1] itself, which insightface has done already."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Tensor:
        return self.inner((pixels - 127.5) / 127.5)


def test_a_good_network_that_scales_its_own_input_is_refused(
    trained: Trained, embedder: FaceEmbedder, tmp_path: Path
) -> None:
    """The same weights, with and without a second scaling: only the first tells subjects apart."""
    others = SOURCE.render(SOURCE.other_view(PEOPLE, CHANCE), VALUES)
    assert embedder.check(PICTURES, others) > 0.5
    identity.export_onnx(ScalesItsInput(trained.modules["identity"].embedder), tmp_path / "twice.onnx")  # type: ignore[arg-type]
    text = raised(lambda: FaceEmbedder(tmp_path / "twice.onnx").check(PICTURES, others), IdentityError)
    assert text.startswith("every pair scores 1.00: this is no face embedder, or it scales its own input")


@pytest.mark.parametrize(("first", "second"), [(1, 1), (3, 2), (0, 0)])
def test_check_needs_pairs(first: int, second: int) -> None:
    axes = torch.eye(3)[:, :, None, None]
    text = raised(lambda: Scripted().check(axes[:first], axes[:second]), IdentityError)
    assert text == f"{first} and {second} pictures: expected the same 2 or more subjects twice"


def on_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def test_copy_paste_score_by_hand() -> None:
    """Reference at 0 degrees, other view at 50: a copy, the other view, half way, near the copy, beyond it."""
    generated = on_circle(0, 50, 25, 10, -30)
    score = copy_paste_score(generated, on_circle(*[0] * 5), on_circle(*[50] * 5))
    torch.testing.assert_close(score, torch.tensor([1.0, -1.0, 0.0, (40 - 10) / 50, 1.0]), atol=1e-5, rtol=0)


def test_copy_paste_score_of_small_angles_is_exact() -> None:
    score = copy_paste_score(on_circle(0.025), on_circle(0), on_circle(0.1))
    torch.testing.assert_close(score, torch.tensor([0.5]), atol=1e-3, rtol=0)


def test_copy_paste_score_of_one_picture_twice_says_nothing() -> None:
    score = copy_paste_score(on_circle(0, 20, 0), on_circle(0, 0, 0), on_circle(0, 0, 90))
    assert score.isnan().tolist() == [True, True, False] and float(score.nanmean()) == 1.0


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_copy_paste_score_is_bounded_and_odd(seed: int) -> None:
    """Swapping reference and other view changes the sign; a stranger at a right angle to both scores 0."""
    generator = torch.Generator().manual_seed(seed)
    vectors = nn.functional.normalize(torch.randn(3, 5, 7, generator=generator), dim=-1)
    score = copy_paste_score(*vectors)
    assert ((score >= -1) & (score <= 1)).all()
    torch.testing.assert_close(copy_paste_score(vectors[0], vectors[2], vectors[1]), -score)
    stranger = torch.eye(8)[7:].expand(5, 8)
    padded = nn.functional.pad(vectors, (0, 1))
    torch.testing.assert_close(copy_paste_score(stranger, *padded[1:]), torch.zeros(5), atol=1e-5, rtol=0)


def test_copy_paste_score_refuses_what_is_no_embedding() -> None:
    good = on_circle(0, 1, 2)
    text = raised(lambda: copy_paste_score(good, good[:2], good), IdentityError)
    assert text == "reference is (2, 2); expected (3, 2), that is (B, E)"
    text = raised(lambda: copy_paste_score(good, good, 2 * good), IdentityError)
    assert text == "other_view: rows are no unit vectors; give what an embedder returns"


def test_files_that_are_no_embedder(trained: Trained, tmp_path: Path) -> None:
    text = raised(lambda: FaceEmbedder(tmp_path / "none.onnx"), IdentityError)
    assert text == f"{tmp_path / 'none.onnx'}: no such ONNX file; run the notebook that trains the embedder"
    damaged = tmp_path / "half.onnx"
    damaged.write_bytes(trained.run.path("identity.onnx").read_bytes()[:2000])
    assert raised(lambda: FaceEmbedder(damaged), IdentityError).startswith(f"{damaged}: damaged, or no ONNX file")
    damaged.write_text("no network")
    assert raised(lambda: FaceEmbedder(damaged), IdentityError).startswith(f"{damaged}: damaged, or no ONNX file")


def test_a_network_of_another_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "INPUT_SIZE", 104)
    identity.export_onnx(Blind(), tmp_path / "small.onnx")  # type: ignore[arg-type]
    monkeypatch.undo()
    text = raised(lambda: FaceEmbedder(tmp_path / "small.onnx"), IdentityError)
    assert text == f"{tmp_path / 'small.onnx'}: insightface does not take this for an ArcFace network of 112 px"


def test_the_margin_by_hand() -> None:
    """ArcFace: scale * cos(angle + margin) at the right subject, scale * cos elsewhere; the margin is ramped up."""
    settings = IdentityConfig(
        embedding_dim=12,
        identities=5,
        scale=10.0,
        margin=0.4,
        optim=OptimConfig(steps=1, batch_size=6, learning_rate=1e-3),
    )
    torch.manual_seed(0)
    trainer, labels = ArcFaceTrainer(settings, 16).eval(), torch.tensor([0, 1, 2, 3, 4, 0])
    with torch.no_grad():
        cosine = trainer.embedder(PICTURES * 2 - 1) @ nn.functional.normalize(trainer.centres, dim=1).T
        for step, margin in ((0, 0.0), (identity.WARMUP_STEPS // 2, 0.2), (10_000, 0.4)):
            logits = 10 * cosine
            for row, label in enumerate(labels):
                logits[row, label] = 10 * torch.cos(torch.acos(cosine[row, label]) + margin)
            expected = nn.functional.cross_entropy(logits, labels)
            torch.testing.assert_close(trainer(PICTURES, labels, step).total, expected, rtol=1e-4, atol=1e-4)
    assert 0 <= trainer(PICTURES, labels, 0).accuracy <= 1


def test_subjects_are_learned_by_heart(tmp_path: Path) -> None:
    """60 steps on six subjects of one picture each: all are recognised."""
    optim = OptimConfig(steps=60, batch_size=6, learning_rate=5e-3, warmup_steps=5)
    torch.manual_seed(0)
    trainer = ArcFaceTrainer(IdentityConfig(embedding_dim=12, identities=6, optim=optim), 16)
    batch = {"images": PICTURES, "labels": torch.arange(6)}
    history = fit(trainer, lambda step: batch | {"step": step}, optim, tmp_path, seed=0, precision="float32")
    assert history[0]["total"] > 1 and history[-1]["total"] < 0.2 and history[-1]["accuracy"] == 1.0


def test_vectors_have_length_one() -> None:
    vectors = Embedder(12, 16).eval()(torch.rand(3, 3, 112, 112) * 2 - 1)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
