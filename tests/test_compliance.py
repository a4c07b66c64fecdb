"""The CLIP judge: its loss by hand, what it learns, and what its files give back; and the exact measure beside it."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from toy import COLOURS, SOURCE, Trained, open_run, raised
from transformers import BertConfig

from nmlib import compliance, data, judges, metrics, prompts, quality
from nmlib.checkpoint import CheckpointError
from nmlib.compliance import ClipScorer, ClipTrainer, ComplianceError
from nmlib.config import ClipModelConfig, OptimConfig
from nmlib.metrics import Candidates, attribute_compliance, pixel_rows
from nmlib.records import read_records
from nmlib.train import fit

SIZES = {"patch_size": 8, "width": 32, "heads": 2, "vision_layers": 1, "text_layers": 2, "projection_dim": 20}
OPTIM = OptimConfig(steps=150, batch_size=12, learning_rate=3e-3, warmup_steps=5)
PICTURES = data.sample_pictures(SOURCE, 5, "heldout", data.step_generator(4, 0))[2]
TEXTS = ["a picture with the red square", "white edge", "The DARK ground, please!", "a picture with no", "zebra"]


def make_trainer(seed: int = 0, optim: OptimConfig = OPTIM) -> ClipTrainer:
    torch.manual_seed(seed)
    return ClipTrainer(ClipModelConfig(**SIZES, optim=optim), SOURCE).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a CLIP with random weights; leave them as they are."""
    path = tmp_path_factory.mktemp("clip") / "clip"
    make_trainer().save(path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The same files, to be spoiled."""
    return Path(shutil.copytree(folder, tmp_path / "clip"))


# ---------------------------------------------------------------------------------------------------------
# losses


def test_the_contrastive_loss_by_hand() -> None:
    """Text 0 is also true of picture 2: that pair is neither right nor wrong, in its row and in its column."""
    logits = torch.tensor([[2.0, 1.0, 9.0], [0.0, 3.0, 1.0], [1.0, 0.0, 2.0]])
    truth = torch.eye(3, dtype=torch.bool)
    truth[0, 2] = True

    def loss(right: float, *wrong: float) -> float:
        return math.log(sum(math.exp(number) for number in (right, *wrong))) - right

    rows = loss(2, 1) + loss(3, 0, 1) + loss(2, 1, 0)
    columns = loss(2, 0, 1) + loss(3, 1, 0) + loss(2, 1)
    assert compliance.contrastive_loss(logits, truth).item() == pytest.approx((rows + columns) / 6, abs=1e-5)
    free = logits.clone()
    free[0, 2] = -50.0
    assert torch.equal(compliance.contrastive_loss(free, truth), compliance.contrastive_loss(logits, truth))


def test_false_negatives_have_no_gradient() -> None:
    """A batch of equal states has nothing to learn: its loss is zero, whatever the scores."""
    logits = torch.randn(4, 4, requires_grad=True)
    loss = compliance.contrastive_loss(logits, torch.ones(4, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_the_choice_loss_by_hand() -> None:
    """Two attributes of 3 and 2 values: the sum over attributes of the mean over pictures."""
    logits = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    first = (math.log(math.e + 2) - 1 + math.log(3)) / 2
    second = (math.log(math.e**2 + 1) - 0 + math.log(2)) / 2
    found = compliance.choice_loss(logits, torch.tensor([[0, 1], [2, 0]]), [3, 2])
    assert found.item() == pytest.approx(first + second, abs=1e-6)


def test_a_batch_is_pairs_of_near_twins() -> None:
    """Rows i and i + 3 show one subject, differ in one named attribute, and neither text is true of the other."""
    trainer = make_trainer()
    batch = trainer.batch(SOURCE, 6, data.step_generator(0, 0), random.Random(0))
    again = trainer.batch(SOURCE, 6, data.step_generator(0, 0), random.Random(0))
    assert torch.equal(batch["images"], again["images"]) and torch.equal(
        batch["texts"]["input_ids"], again["texts"]["input_ids"]
    )
    assert ((batch["values"][:3] != batch["values"][3:]).sum(1) == 1).all()
    assert batch["truth"].diag().all()
    assert not batch["truth"][:3, 3:].diag().any() and not batch["truth"][3:, :3].diag().any()
    assert batch["choices"]["input_ids"].shape[0] == 7
    assert len(trainer.batch(SOURCE, 5, data.step_generator(0, 0), random.Random(0))["images"]) == 5


def test_the_losses_of_a_batch_are_those_of_the_saved_scores(folder: Path) -> None:
    trainer, scorer = make_trainer(), ClipScorer(folder)
    batch = trainer.batch(SOURCE, 6, data.step_generator(0, 0), random.Random(0))
    images = (batch["images"] * 255).round() / 255
    with torch.no_grad():
        losses = trainer(**batch | {"images": images})
    texts = trainer.tokenizer.batch_decode(batch["texts"]["input_ids"], skip_special_tokens=False)
    inner = [text.split("<s> ")[1].split(" </s>")[0] for text in texts]
    scale = trainer.clip.logit_scale.detach().exp()
    logits = scale * (scorer.embed_texts(inner) @ scorer.embed_images(images).T)
    torch.testing.assert_close(
        losses.contrast, compliance.contrastive_loss(logits, batch["truth"]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(losses.total, losses.contrast + losses.choice + losses.read)
    best = [float(batch["truth"][row, column]) for row, column in enumerate(logits.argmax(1).tolist())]
    assert losses.accuracy.item() == pytest.approx(sum(best) / 6)


def test_a_handful_of_pairs_is_learned_by_heart(tmp_path: Path) -> None:
    trainer = make_trainer()
    batch = trainer.batch(SOURCE, 8, data.step_generator(1, 0), random.Random(1))
    history = fit(trainer, lambda step: batch, OPTIM, tmp_path, seed=0, precision="float32")
    assert history[0]["contrast"] > 1 and history[-1]["contrast"] < 0.2 and history[-1]["choice"] < 0.2
    assert history[-1]["accuracy"] == 1.0


# ---------------------------------------------------------------------------------------------------------
# scores


def test_a_score_does_not_depend_on_its_batch(folder: Path) -> None:
    scorer = ClipScorer(folder)
    together = scorer.score(PICTURES, TEXTS)
    alone = torch.cat([scorer.score(PICTURES[i : i + 1], TEXTS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    many = scorer.score(PICTURES.repeat(60, 1, 1, 1), TEXTS * 60)
    torch.testing.assert_close(many, together.repeat(60), rtol=1e-4, atol=1e-5)
    assert together.abs().max() <= 1 and together.std() > 0


def test_what_is_saved_is_what_is_loaded(folder: Path) -> None:
    """Same weights, same words, same pixels: scores equal those of the modules in memory."""
    trainer = make_trainer()
    images = (PICTURES * 255).round() / 255
    words = trainer.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = trainer.clip(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=images * 2 - 1
        )
    expected = (found.text_embeds * found.image_embeds).sum(1)
    torch.testing.assert_close(ClipScorer(folder).score(PICTURES, TEXTS), expected, rtol=1e-4, atol=1e-5)
    assert (folder / "model.safetensors").is_file() and not list(folder.parent.glob(".tmp*"))


def test_case_and_punctuation_do_not_matter_and_order_does(folder: Path) -> None:
    scorer = ClipScorer(folder)
    plain, typed, turned = scorer.embed_texts(
        ["the red square and dark ground", "The RED square, and... dark ground!", "the dark square and red ground"]
    )
    torch.testing.assert_close(plain, typed)
    assert (plain - turned).norm() > 1e-3


def test_words_it_does_not_know_are_one_word(folder: Path) -> None:
    first, second = ClipScorer(folder).embed_texts(["a zebra with the red square", "a giraffe with the red square"])
    torch.testing.assert_close(first, second)


def test_pictures_of_another_size_are_fitted(folder: Path) -> None:
    large = PICTURES.repeat_interleave(2, 2).repeat_interleave(2, 3)
    scorer = ClipScorer(folder)
    assert ((scorer.embed_images(large) * scorer.embed_images(PICTURES)).sum(1) > 0.9).all()


class Scripted(ClipScorer):
    """Scores that are looked up in the pictures and texts themselves."""

    def __init__(self) -> None:
        self.folder = Path("clip")

    def score(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor([float(text) for text in texts])


def test_the_area_under_the_curve_by_hand() -> None:
    """Right texts score 3, 2, 1 and wrong ones 2, 0, 0: eight of nine pairs are in order, one of these a tie."""
    pictures = torch.zeros(3, 3, 2, 2)
    assert Scripted().auroc(pictures, ["3", "2", "1"], ["0.5", "0", "0"]) == 1.0
    wins = (3 + 2.5 + 2) / 9
    assert Scripted().auroc(pictures, ["3", "2", "1"], ["2", "0", "0"]) == pytest.approx(wins)


def test_attributes_are_tried_one_by_one() -> None:
    """A scorer that reads the square alone: sure of it, and no better than a coin at what it does not look at."""

    class ReadsSquares(ClipScorer):
        def __init__(self) -> None:
            self.folder = Path("clip")

        def score(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:  # type: ignore[override]
            pixels, found = images.flatten(2), []  # (B, 3, H*W)
            for picture, text in zip(pixels, texts, strict=True):
                shown = [name for name, rgb in COLOURS.items() if bool((torch.tensor(rgb) == picture.T).all(1).any())]
                said = [name for name in COLOURS if name in text.split()]
                found.append(float(said == shown) if said else 0.5)
            return torch.tensor(found)

    table = quality.clip_attributes(ReadsSquares(), SOURCE, count=60).set_index("attribute")
    assert list(table.index) == ["square", "ground", "edge"] and table.loc["square", "auroc"] == 1.0
    assert table.loc["ground", "auroc"] == table.loc["edge", "auroc"] == 0.5
    assert table["n"].between(20, 60).all()


def test_scores_that_tell_nothing_apart_are_refused() -> None:
    text = raised(lambda: Scripted().auroc(torch.zeros(2, 3, 2, 2), ["0.25"] * 2, ["0.25"] * 2), ComplianceError)
    assert text == (
        "clip: every pair scores 0.25: this CLIP tells nothing apart here; train it longer or give another one"
    )


def test_texts_that_do_not_fit(folder: Path) -> None:
    scorer = ClipScorer(folder)
    text = raised(lambda: scorer.score(PICTURES, TEXTS[:2]), ComplianceError)
    assert text == "2 texts for 5 pictures; expected one for each"
    text = raised(lambda: scorer.embed_texts(["red", "red " * 63]), ComplianceError)
    assert text.endswith("has 65 tokens, this CLIP reads 64; cut it")
    assert scorer.embed_texts(["red " * 62]).shape == (1, 20)


# ---------------------------------------------------------------------------------------------------------
# files


def test_folders_that_hold_no_clip(tmp_path: Path) -> None:
    text = raised(lambda: ClipScorer(tmp_path / "none"), ComplianceError)
    assert text == f"{tmp_path / 'none'}: no CLIP here (no config.json); run the notebook that trains it"
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    text = raised(lambda: ClipScorer(tmp_path), ComplianceError)
    assert text == f"{tmp_path}: holds a model of type 'bert', expected 'clip'; give a CLIP's folder"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_folder_that_lacks_a_file_is_refused(copied: Path, name: str) -> None:
    (copied / name).unlink()
    text = raised(lambda: ClipScorer(copied), ComplianceError)
    assert text.startswith(f"{copied}: damaged or incomplete (") and text.endswith("; put the missing file back")


def test_weights_that_are_cut_off_or_absent_are_refused(copied: Path) -> None:
    """A loader that fills a gap with random numbers would give scores of no meaning."""
    path = copied / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {name: part for name, part in tensors.items() if name != "text_projection.weight"}, path, {"format": "pt"}
    )
    text = raised(lambda: ClipScorer(copied), ComplianceError)
    assert text == f"{copied}: 1 weights are missing or misshapen, the first is text_projection.weight"
    path.write_bytes(path.read_bytes()[:500])
    assert raised(lambda: ClipScorer(copied), ComplianceError).startswith(f"{copied}: damaged or incomplete (")


def test_a_run_trains_its_clip_once(tmp_path: Path) -> None:
    block = {**SIZES, "optim": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}}
    run = open_run(tmp_path, clip=block, meaningful=False)
    history = judges.train_clip(run, SOURCE)
    written = run.path("clip", "model.safetensors").stat().st_mtime_ns
    assert judges.train_clip(run, SOURCE) == history
    assert run.path("clip", "model.safetensors").stat().st_mtime_ns == written
    assert list(run.folder.rglob("progress.safetensors")) == []
    table = quality.clip_table(run, SOURCE, ClipScorer(run.path("clip")), count=320)
    assert 0 <= read_records(run)["metric.clip.auroc"].value <= 1 and read_records(run)["metric.clip.auroc"].n == 20
    assert {f"metric.clip.auroc.{name}" for name in ("square", "ground", "edge")} <= set(read_records(run))
    assert table["case"].tolist()[:4] == ["right text", "one attribute wrong", "all attributes wrong", "another person"]
    assert table["mean"].between(-1, 1).all() and table["below"][0] == 0
    other = open_run(tmp_path, clip=block | {"width": 48}, meaningful=False)
    assert judges.train_clip(other, SOURCE) != history
    assert json.loads(run.path("clip", "config.json").read_text())["text_config"]["hidden_size"] == 48


def test_a_training_that_was_killed_goes_on_under_its_own_settings_only(tmp_path: Path) -> None:
    block = {**SIZES, "optim": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 1}}
    run = open_run(tmp_path, clip=block)
    other = open_run(tmp_path / "other", clip=block | {"text_layers": 1})
    judges.train_clip(run, SOURCE)
    progress = other.path("training", "clip", "progress.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipTrainer, "save", lambda self, folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            judges.train_clip(other, SOURCE)
    assert progress.exists()
    moved = run.path("training", "clip", "progress.safetensors")
    moved.write_bytes(progress.read_bytes())
    shutil.rmtree(run.path("clip"))
    assert raised(lambda: judges.train_clip(run, SOURCE), CheckpointError).endswith("delete it to train anew")


def test_params_without_a_clip_say_so(trained: Trained) -> None:
    text = raised(lambda: judges.train_clip(trained.run, SOURCE), ValueError)
    assert text == "params 'toy': no `clip:` block; add one, or score with the folder of another CLIP"


# ---------------------------------------------------------------------------------------------------------
# exact compliance


def shown(images: torch.Tensor) -> torch.Tensor:
    """Another space than that of pixels: random, and without loss."""
    mixed = torch.randn(48, 48, generator=data.step_generator(9, 0)) / 7
    return pixel_rows(images) @ mixed


@pytest.mark.parametrize("encode", [pixel_rows, shown])
def test_compliance_by_hand(encode: metrics.Encode) -> None:
    """As asked is 1; with a colour and an edge swapped these two are 0; what is not named is no number."""
    subjects, asked = torch.tensor([[0.25, -0.5], [-0.5, 0.5]]), torch.tensor([[0, 1, 1], [2, 0, 1]])
    named = torch.tensor([[True, True, True], [True, False, True]])
    candidates = Candidates(SOURCE, encode)

    def comply(values: list[list[int]]) -> list[list[float]]:
        pictures = encode(SOURCE.render(subjects, torch.tensor(values)))
        return attribute_compliance(pictures, subjects, asked, named, candidates).nan_to_num(-1).tolist()

    assert comply(asked.tolist()) == [[1, 1, 1], [1, -1, 1]]
    assert comply([[1, 1, 1], [2, 0, 0]]) == [[0, 1, 1], [1, -1, 0]]
    assert comply([[2, 0, 0], [0, 0, 0]]) == [[0, 0, 0], [0, -1, 0]]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_true_pictures_always_comply(seed: int) -> None:
    subjects, values, images = data.sample_pictures(SOURCE, 3, "heldout", data.step_generator(seed, 2))
    named = prompts.draw_named(random.Random(seed), SOURCE, 3)
    right = attribute_compliance(pixel_rows(images), subjects, values, named, Candidates(SOURCE, pixel_rows))
    assert torch.equal(right.isnan(), ~named) and (right[named] == 1).all()
    wrong = prompts.change(random.Random(seed), SOURCE, values, named)
    told = attribute_compliance(pixel_rows(images), subjects, wrong, named, Candidates(SOURCE, pixel_rows))
    single = named.sum(1) == 1  # with several wrong at once the nearest candidate of one is not decided by it alone
    assert (told[single][named[single]] == 0).all()


def test_shapes_that_do_not_belong_together() -> None:
    candidates, named = Candidates(SOURCE, pixel_rows), torch.ones(2, 3, dtype=torch.bool)
    values = torch.zeros(2, 3, dtype=torch.int64)
    text = raised(
        lambda: attribute_compliance(torch.zeros(3, 16, 48), torch.zeros(2, 2), values, named, candidates), ValueError
    )
    assert text == (
        "3 predictions with subjects (2, 2), values (2, 3) and named (2, 3); expected (3, S) and twice (3, 3)"
    )


def test_the_card_of_exact_compliance() -> None:
    """Its two known answers: all right as asked; with one attribute changed every picture has exactly one wrong."""
    card = quality.compliance_card(SOURCE, pixel_rows, count=24).set_index("case")
    assert card.loc["as asked"].tolist() == [1.0, 1.0]
    assert card.loc["one attribute wrong", "all"] == 0
    assert card.loc["noise 0.4", "compliance"] <= card.loc["as asked", "compliance"]
    assert len(card) == 4 + len(quality.NOISE) + len(quality.BLUR)
