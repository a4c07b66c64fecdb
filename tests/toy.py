"""A tiny exact source of coloured squares, with conversations, models and systems of a size that tests can afford.

Sizes are distinct wherever they are free, so that a swapped axis cannot pass.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Generator, Tensor, nn

from nmlib import batches, codec, curriculum, data, experiments, judges, layout, rollback, train
from nmlib.chat import System
from nmlib.config import DetokenizerConfig, ModelConfig, OptimConfig, VisionConfig
from nmlib.conversation import Conversation, Edit, Kind, Reference, Round
from nmlib.data import ConversationFeatures, encode_conversations
from nmlib.detokenizer import Detokenizer
from nmlib.layout import Template
from nmlib.mllm import HistoryMLLM
from nmlib.runtime import Run
from nmlib.sources import Attribute
from nmlib.vision import VisionTransformer

TOKENS, FEATURES = 4, 20  # N and D_feature
MAX_ROUNDS = 7
OPTIM = OptimConfig(steps=3, batch_size=5, learning_rate=1e-3)
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.1, 0.2, 0.9)}
GROUNDS = {"dark": 0.2, "light": 0.8}
EDGES = {"none": None, "white": 1.0}


def _attribute(name: str, values: Sequence[str], nouns: tuple[str, ...]) -> Attribute:
    commands = {value: tuple(f"{verb} {nouns[0]} {value}" for verb in ("make", "paint", "turn")) for value in values}
    looks = {value: (f"the {value} {name}", f"{value} {name}") for value in values}
    return Attribute(name, nouns, tuple(values), commands, looks)


class ToySource:
    """A coloured square on a grey ground with or without a white edge; the subject says where the square lies."""

    name = "toy"
    names: tuple[str, ...] = ()

    def __init__(self, image_size: int = 16) -> None:
        self.image_size = image_size
        self.attributes = (
            _attribute("square", list(COLOURS), ("the square", "the shape")),
            _attribute("ground", list(GROUNDS), ("the ground",)),
            _attribute("edge", list(EDGES), ("the edge", "the rim")),
        )

    def sample_subjects(self, count: int, split: str, generator: Generator) -> Tensor:
        """Places (B, 2) in [-1, 1]; the first number is above 0.75 for the held-out ones only."""
        places = torch.rand(count, 2, generator=generator) * 2 - 1
        low, high = {"train": (-1, 0.75), "heldout": (0.75, 1)}[split]
        places[:, 0] = low + (high - low) * (places[:, 0] + 1) / 2
        return places

    def other_view(self, subjects: Tensor, generator: Generator) -> Tensor:
        """The same place, a little to the side."""
        viewed = subjects.clone()
        viewed[:, 1] = torch.rand(len(subjects), generator=generator) * 2 - 1
        return viewed

    def render(self, subjects: Tensor, values: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]."""
        size, half = self.image_size, self.image_size // 5
        pictures = torch.empty(len(subjects), 3, size, size)
        centres = (size / 2 + subjects * (size / 2 - half - 2)).round().long().tolist()
        for picture, (x, y), (square, ground, edge) in zip(pictures, centres, values.tolist(), strict=True):
            picture[:] = list(GROUNDS.values())[ground]
            if edge:
                for side in (picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]):
                    side.fill_(1.0)
            colour = torch.tensor(list(COLOURS.values())[square])
            picture[:, y - half : y + half + 1, x - half : x + half + 1] = colour[:, None, None]
        return pictures


SOURCE = ToySource()


def make_round(
    kind: Kind, instruction: str, base: int | None = None, edit: tuple[str, str] | None = None,
    values: tuple[int, ...] | None = None, reference: Reference = "none",
) -> Round:  # fmt: skip
    """A round in few words."""
    return Round(instruction, kind, base, None if edit is None else Edit(*edit), reference, values)


def about(subject: tuple[float, ...], rounds: Sequence[Round]) -> tuple[Round, ...]:
    """Rounds that all show one subject."""
    return tuple(replace(item, subject=subject) for item in rounds)


def conversations() -> list[Conversation]:
    """Two conversations of four rounds: unequal texts, an upload and a description, a branch and a pure rollback."""
    first = (
        make_round("upload", "here is a picture", values=(1, 1, 1)),
        make_round("edit", "please make the square red thanks", 0, ("square", "red"), (0, 1, 1)),
        make_round("rollback", "undo that and then paint the ground dark", 0, ("ground", "dark"), (1, 0, 1), "count"),
        make_round("edit", "turn the shape blue", 2, ("square", "blue"), (2, 0, 1)),
    )
    second = (
        make_round("describe", "a picture with the blue square and dark ground and no edge", values=(2, 0, 0)),
        make_round("edit", "make the edge white", 0, ("edge", "white"), (2, 0, 1)),
        make_round("edit", "now i want make the ground light for me", 1, ("ground", "light"), (2, 1, 1)),
        make_round("rollback", "start over", 0, None, (2, 0, 0), "start"),
    )
    return [
        Conversation("first", "toy", about((0.25, -0.5), first)).validate(),
        Conversation("second", "toy", about((-0.75, 0.5), second)).validate(),
    ]


def random_tree(seed: int, rounds: int, upload: bool = True) -> Conversation:
    """A conversation of any shape: every round but the first starts from any earlier one."""
    rng = random.Random(seed)
    words = "make the square red paint ground dark undo that and then".split()
    items = [make_round("upload" if upload else "describe", "this is the picture to edit")]
    for index in range(1, rounds):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 9)))
        base = rng.randrange(index)
        items.append(make_round("edit" if base == index - 1 else "rollback", text, base))
    return Conversation(f"tree-{seed}", "toy", tuple(items)).validate()


def random_features(count: int, rounds: int, seed: int = 0) -> Tensor:
    """Features (B, R, N, D_feature) as an encoder would give them: every token of unit variance."""
    drawn = torch.randn(count, rounds, TOKENS, FEATURES, generator=Generator().manual_seed(seed))
    return torch.nn.functional.layer_norm(drawn, (FEATURES,))


def model_settings(**changes: Any) -> ModelConfig:
    """Settings of a model of about 20 thousand numbers, with a copy gate where it has markers."""
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 44, "layers": 2, "heads": 3}
    sizes["copy_gate"] = changes.get("markers", True)
    return ModelConfig(**(sizes | {"resampler_heads": 2, "max_rounds": MAX_ROUNDS, "lora_rank": 3} | changes))


def excite(module: nn.Module, scale: float = 5.0) -> None:
    """Enlarge the weights of a fresh language model, so that every token matters to those after it."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)


def make_model(seed: int = 0, excitement: float = 5.0, **changes: Any) -> tuple[HistoryMLLM, Template]:
    """A model with lively random weights and its template, in evaluation mode."""
    torch.manual_seed(seed)
    settings = model_settings(**changes)
    tokenizer = layout.build_tokenizer(SOURCE.attributes, TOKENS, settings.max_rounds)
    model, template = curriculum.new_model(settings, tokenizer, TOKENS, FEATURES)
    excite(model.llm, excitement)
    for resampler in (model.input_resampler, model.output_resampler):
        nn.init.constant_(resampler.ln_q.weight, 0.5)  # zero in a fresh one, which hides the queries
        nn.init.normal_(resampler.query)  # tiny in a fresh one, which makes their gradients all rounding error
    return model.eval(), template


def vision_settings(**changes: Any) -> VisionConfig:
    """Settings of an encoder of 4 tokens."""
    sizes: dict[str, Any] = {"patch_size": 4, "width": 32, "layers": 1, "heads": 2, "noise": 0.1}
    sizes |= {"tokens": TOKENS, "feature_dim": FEATURES, "attribute_weight": 1.0, "optim": OPTIM}
    return VisionConfig(**(sizes | changes))


def detokenizer_settings(**changes: Any) -> DetokenizerConfig:
    """Settings of a detokenizer of two steps."""
    sizes: dict[str, Any] = {"patch_size": 4, "width": 32, "layers": 1, "heads": 2, "sampling_steps": 2}
    return DetokenizerConfig(**(sizes | {"optim": OPTIM} | changes))


@cache
def system() -> System:
    """An untrained system whose every part is at work; shared, so leave it as it is."""
    torch.manual_seed(1)
    encoder = VisionTransformer(vision_settings(), SOURCE.image_size)
    detokenizer = Detokenizer(detokenizer_settings(guidance_scale=1.5), SOURCE.image_size, TOKENS, FEATURES)
    excite(detokenizer, 2.0)
    model, template = make_model(2)
    for module in (encoder, detokenizer, model):
        module.eval().requires_grad_(False)
    return System(encoder, detokenizer, model, template, SOURCE.image_size)


SETTINGS: dict[str, Any] = {
    "name": "toy",
    "threads": 1,
    "precision": "float32",
    "source": {"kind": "world", "image_size": 16},
    "vision": {"patch_size": 4, "width": 32, "layers": 1, "heads": 2, "tokens": TOKENS, "feature_dim": FEATURES,
               "noise": 0.1, "attribute_weight": 1.0, "optim": {"steps": 8, "batch_size": 7, "learning_rate": 1e-3}},
    "detokenizer": {"patch_size": 4, "width": 32, "layers": 1, "heads": 2, "sampling_steps": 2,
                    "optim": {"steps": 6, "batch_size": 5, "learning_rate": 1e-3, "ema_decay": 0.5}},
    "identity": {"embedding_dim": 12, "identities": 11,
                 "optim": {"steps": 6, "batch_size": 9, "learning_rate": 1e-3}},
    "data": {
        "base": {"conversations": 9, "rounds": [2, 3], "rollback_share": 0.0, "describe_share": 0.5},
        "rollback": {"conversations": 7, "rounds": [4, 5], "rollback_share": 0.7, "max_depth": 2},
    },
    "model": {"hidden_size": 24, "intermediate_size": 44, "layers": 2, "heads": 3, "resampler_heads": 2,
              "lora_rank": 3, "max_rounds": MAX_ROUNDS},
    "stages": [
        {"name": "base", "data": "base", "trainable": "all", "history_noise": 0.1,
         "optim": {"steps": 8, "batch_size": 9, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 3}},
        {"name": "rollback", "start": "base", "data": "rollback", "trainable": "lora", "predicted_history": 0.8,
         "optim": {"steps": 8, "batch_size": 15, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 3}},
        {"name": "plain", "start": "base", "data": "rollback", "trainable": "lora", "supervision": "prefix",
         "response": "polite", "markers": False, "optim": {"steps": 2, "batch_size": 10, "learning_rate": 1e-12}},
    ],
    "experiments": {"conversations": 5, "depths": [1, 2], "drift_conversations": 3, "drift_rounds": 4, "bootstrap": 50},
}  # fmt: skip


def open_run(folder: Path, **changes: Any) -> Run:
    """A run of the toy settings, some of its parts replaced."""
    path = folder / "toy.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(SETTINGS | changes), encoding="utf-8")
    return Run.open(path, folder / "run")


def trained_anew(folder: Path, names: Sequence[str], **changes: Any) -> Run:
    """A run in which the named data sets are built and everything is trained for a few steps."""
    made = open_run(folder, **changes)
    source = data.open_source(made.params.source)
    codec.train_encoder(made, source)
    codec.train_detokenizer(made, source, codec.load_encoder(made))
    judges.train_identity(made, source)
    for offset, name in enumerate(names):
        batches.build(made.params, name, made.path("data", name), 20 + offset)
    features = experiments.read_sets(made, names)
    for stage in made.params.stages:
        curriculum.train_stage(made, stage.name, features)
    return made


def features_of(run: Run, name: str) -> ConversationFeatures:
    """A data set of a run with the features of its encoder."""
    settings = run.params.data[name]  # type: ignore[index]
    made = rollback.build_conversations(SOURCE, settings, seed=3, split="train", name=name)
    encoder = codec.load_encoder(run)
    return encode_conversations(rollback.with_images(SOURCE, made), lambda images: encoder(images.float() / 255))


@dataclass
class Trained:
    """A run in which everything was trained for a few steps, and the modules as they were when training ended."""

    run: Run
    modules: dict[str, Any]
    features: dict[str, ConversationFeatures]


def train_everything(folder: Path) -> Trained:
    """Encoder, detokenizer, face embedder and every stage of the toy settings."""
    made = Trained(open_run(folder), {}, {})
    real = train.fit

    def noted(module: nn.Module, *args: Any, **kwargs: Any) -> list[dict[str, float]]:
        made.modules[kwargs["title"]] = module
        return real(module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", noted)
        codec.train_encoder(made.run, SOURCE)
        codec.train_detokenizer(made.run, SOURCE, codec.load_encoder(made.run))
        judges.train_identity(made.run, SOURCE)
        made.features = {name: features_of(made.run, name) for name in ("base", "rollback")}
        for stage in made.run.params.stages:
            curriculum.train_stage(made.run, stage.name, made.features)
    return made


def draw(conversation: Conversation) -> Conversation:
    """A conversation with its pictures."""
    return rollback.with_images(SOURCE, [conversation])[0]


def raised(call: Callable[[], object], error: type[Exception]) -> str:
    """The one line of the error that a call raises."""
    try:
        call()
    except error as caught:
        assert "\n" not in str(caught), f"not one line: {caught}"
        return str(caught)
    raise AssertionError(f"{error.__name__} was not raised")
