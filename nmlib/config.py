"""Settings of a run: one frozen, validated object made from a file in `params/`.

Every number that matters lives in such a file. Unknown keys, wrong types and values out of range are
errors that name the file, the key, the value seen and what was expected.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class ParamsError(ValueError):
    """A params file that cannot be used; the message says where, what was seen and what was expected."""


class Settings(BaseModel):
    """Base of all settings: frozen, strict about types, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SourceConfig(Settings):
    """Which pictures: the portrait world or crops of photographs."""

    kind: Literal["world", "photos"]
    image_size: Annotated[int, Field(ge=16, le=1024, description="pixels a side")]


class OptimConfig(Settings):
    """One training: length, batch and schedule (linear warm-up, cosine to `min_learning_rate_ratio`)."""

    steps: Count
    batch_size: Count
    learning_rate: Positive
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    min_learning_rate_ratio: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    max_grad_norm: Positive = 1.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    ema_decay: Fraction = 0.0
    checkpoint_every: Count = 200


class VisionConfig(Settings):
    """The frozen image encoder, stand-in for the Qwen-VL ViT.

    `noise` is the standard deviation of the Gaussian noise added to the unit-variance tokens while the
    encoder learns, which forces it to give every attribute a large share of the feature space.
    """

    patch_size: Count
    width: Count
    layers: Count
    heads: Count
    tokens: Annotated[int, Field(ge=1, description="tokens of one image, N; a square number")]
    feature_dim: Count
    noise: Annotated[float, Field(ge=0.0)]
    attribute_weight: Annotated[float, Field(ge=0.0)]
    subject_weight: Annotated[float, Field(ge=0.0)] = 0.0
    optim: OptimConfig

    @model_validator(mode="after")
    def _tokens_are_square(self) -> "VisionConfig":
        if int(self.tokens**0.5) ** 2 != self.tokens:
            raise ValueError(f"tokens {self.tokens} is not a square number: the tokens lie on a square grid")
        if self.width % 32:
            raise ValueError(f"width {self.width} must be a multiple of 32: a quarter of it is normalised in 8 groups")
        for name, size in (("width", self.width), ("feature_dim", self.feature_dim)):
            if size % self.heads or size % 4:
                raise ValueError(f"{name} {size} must be a multiple of heads {self.heads} and of 4")
        return self


class DetokenizerConfig(Settings):
    """The DiT that turns image tokens into pixels."""

    patch_size: Count
    width: Count
    layers: Count
    heads: Count
    sampling_steps: Count
    guidance_scale: Annotated[float, Field(ge=0.0)] = 1.0
    condition_dropout: Fraction = 0.1
    token_noise: Annotated[float, Field(ge=0.0)] = 0.0
    optim: OptimConfig


class IdentityConfig(Settings):
    """The face embedder of the world, trained with the ArcFace loss."""

    embedding_dim: Count
    identities: Count
    scale: Positive = 24.0
    margin: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    optim: OptimConfig


class DataConfig(Settings):
    """Conversations to build.

    `rounds` lists the lengths to draw from; `max_depth` bounds rollbacks, except that those which name their base
    (by number, content, or as the start) reach back `named_depth` rounds where it is given. `content_weight` says how
    many times more often a reference by content is drawn, where there is one, than each other kind.
    """

    conversations: Count
    rounds: tuple[Annotated[int, Field(ge=2, le=64)], ...]
    rollback_share: Fraction = 0.6
    max_depth: Count = 2
    named_depth: Count | None = None
    describe_share: Fraction = 0.25
    content_weight: Positive = 3.0


class ModelConfig(Settings):
    """The history-conditioned MLLM.

    `response` is the text before each image: `polite` (SEED-X) or `grounded`, which names the picture it
    starts from; `markers` adds the picture's number and the token's slot to every token in the history, and lets
    the query tokens start from the picture that the response names.
    """

    hidden_size: Count
    intermediate_size: Count
    layers: Count
    heads: Count
    resampler_heads: Count = 4
    lora_rank: Count = 16
    lora_alpha: Count = 16
    lora_dropout: Fraction = 0.0
    max_rounds: Annotated[int, Field(ge=2, le=64)] = 16
    response: Literal["polite", "grounded"] = "grounded"
    markers: bool = True
    text_loss_weight: Annotated[float, Field(ge=0.0)] = 1.0
    feature_loss_weight: Annotated[float, Field(ge=0.0)] = 6.0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}: "
                "rotary positions turn pairs of numbers in each head"
            )
        if self.markers and self.response != "grounded":
            raise ValueError("markers: true needs response: grounded, whose text names the picture to start from")
        return self


class SeedXVisionConfig(Settings):
    """The Qwen ViT that SEED-X freezes; the defaults are the released sizes."""

    image_size: Count = 448
    patch_size: Count = 14
    width: Count = 1664
    layers: Count = 48
    heads: Count = 16
    mlp_size: Count = 8192
    tokens: Annotated[int, Field(ge=1, description="tokens of an encoded image; a square number")] = 256
    feature_dim: Count = 4096
    pool_heads: Count = 32


class SeedXConfig(Settings):
    """SEED-X; the defaults are the released 17B model (Ge et al., arXiv 2404.14396).

    `history` is what a later round reads of a predicted picture: `repeat` brings its tokens back to the number that
    the encoder gives, `direct` reads them as they are, `states` keeps the keys and values of its query tokens.
    """

    vision: SeedXVisionConfig = SeedXVisionConfig()
    model: ModelConfig = ModelConfig(
        hidden_size=5120, intermediate_size=13824, layers=40, heads=40, resampler_heads=32, lora_rank=32,
        lora_alpha=32, lora_dropout=0.05, response="polite", markers=False,
    )  # fmt: skip
    queries: Annotated[int, Field(ge=1, description="query tokens of a generated image, N; a square number")] = 64
    words: Annotated[int, Field(ge=1, description="vocabulary before SEED-X's own tokens are added")] = 32000
    image_words: Count = 100
    location_words: Annotated[int, Field(ge=0)] = 224
    max_positions: Count = 2048
    max_length: Annotated[int, Field(ge=1, description="tokens of the longest training sample")] = 2048
    grids: tuple[Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*$")], ...] = ("1x1",)
    history: Literal["repeat", "direct", "states"] = "repeat"

    @property
    def vocabulary(self) -> int:
        """Words with the added ones: images, locations, and the opening and closing of image, patch and box."""
        return self.words + self.image_words + self.location_words + 6

    @property
    def pooling(self) -> int:
        """Encoder tokens that are averaged to one target token."""
        return self.vision.tokens // self.queries

    @model_validator(mode="after")
    def _counts_fit(self) -> "SeedXConfig":
        for name, count in (("queries", self.queries), ("vision.tokens", self.vision.tokens)):
            if int(count**0.5) ** 2 != count:
                raise ValueError(f"{name} {count} is not a square number: the tokens lie on a square grid")
        if self.vision.tokens % self.queries:
            raise ValueError(f"vision.tokens {self.vision.tokens} must be a multiple of queries {self.queries}")
        if self.image_words < self.queries:
            raise ValueError(f"image_words {self.image_words} must be at least queries {self.queries}")
        if self.model.markers:
            raise ValueError("model.markers must be false: SEED-X has no markers of rounds")
        return self


class StageConfig(Settings):
    """One training stage as data: where it starts, what it reads, what it may change.

    `start` names the stage whose weights it continues from (none: from scratch); `trainable` is `all` or
    `lora` (LoRA and norms, embeddings, resamplers); `predicted_history` is the final share of history
    images replaced by the model's own predictions, reached by a linear ramp. Each step also reads `word_rounds`
    rounds of fresh conversations without their pictures; for the share `content_first` of the steps these refer by
    content whenever they can.
    """

    name: str
    start: str | None = None
    data: Literal["base", "markov", "rollback", "deep"]
    trainable: Literal["all", "lora"]
    supervision: Literal["packed", "prefix"] = "packed"
    predicted_history: Fraction = 0.0
    history_noise: Annotated[float, Field(ge=0.0)] = 0.0
    word_rounds: Annotated[int, Field(ge=0)] = 0
    content_first: Fraction = 0.5
    response: Literal["polite", "grounded"] | None = None
    markers: bool | None = None
    optim: OptimConfig


class ExperimentsConfig(Settings):
    """How much to evaluate."""

    conversations: Count
    depths: tuple[Count, ...] = (1, 2, 3, 4)
    drift_conversations: Count = 32
    drift_rounds: Annotated[int, Field(ge=3, le=64)] = 12
    bootstrap: Count = 1000


class Params(Settings):
    """A whole params file."""

    name: str
    meaningful: bool = True
    seed: int = 0
    threads: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    source: SourceConfig
    vision: VisionConfig
    detokenizer: DetokenizerConfig
    identity: IdentityConfig
    data: dict[Literal["base", "markov", "rollback", "deep"], DataConfig]
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    experiments: ExperimentsConfig
    seedx: SeedXConfig | None = Field(default=None, exclude_if=lambda value: value is None)

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one image, N."""
        return self.vision.tokens

    def stage(self, name: str) -> StageConfig:
        """The stage of that name; raises KeyError that lists the names."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"params {self.name!r} has no stage {name!r}; it has {[s.name for s in self.stages]}")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Params":
        size = self.source.image_size
        for part in ("vision", "detokenizer"):
            patch = getattr(self, part).patch_size
            if size % patch:
                raise ValueError(f"{part}.patch_size {patch} does not divide source.image_size {size}")
        longest = max([*(n for d in self.data.values() for n in d.rounds), self.experiments.drift_rounds])
        longest = max(longest, max(self.experiments.depths) + 2)
        if longest > self.model.max_rounds:
            raise ValueError(
                f"model.max_rounds is {self.model.max_rounds}, but conversations have up to {longest} rounds"
            )
        if self.seedx is not None and self.seedx.model != self.model:
            raise ValueError("seedx.model differs from model; write it once as `model: &model` and refer to `*model`")
        seen: set[str] = set()
        for stage in self.stages:
            if stage.start is not None and stage.start not in seen:
                raise ValueError(
                    f"stages: {stage.name!r} starts from {stage.start!r}, which is no earlier stage; "
                    f"earlier stages are {sorted(seen)}"
                )
            if stage.data not in self.data:
                raise ValueError(f"stages: {stage.name!r} reads data {stage.data!r}, which `data:` does not define")
            seen.add(stage.name)
        return self


def digest(settings: BaseModel) -> str:
    """Short hash of settings, equal when and only when all values are equal."""
    text = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def parse(raw: Any, where: str) -> Params:
    """Check a mapping against the schema.

    Args:
        raw: what the YAML file holds.
        where: file name for error messages.

    Raises:
        ParamsError: unknown key, wrong type or value out of range; one line for each fault.
    """
    if not isinstance(raw, dict):
        raise ParamsError(f"{where}: expected a mapping of settings, found {type(raw).__name__}")
    try:
        return Params.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        lines = [_explain(where, fault) for fault in error.errors()]
        raise ParamsError("\n".join(lines)) from None


def _explain(where: str, fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "(whole file)"
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r} (value {fault['input']!r}); remove it or correct its spelling"
    if fault["type"] == "missing":
        return f"{where}: key {key!r} is missing; add it"
    seen = "" if isinstance(fault["input"], dict) else f", found {fault['input']!r}"
    return f"{where}: {key}: {fault['msg'].removeprefix('Value error, ')}{seen}"


def load(path: str | Path) -> Params:
    """Read and check a params file.

    Args:
        path: a YAML file such as `params/cpu.yaml`.

    Raises:
        ParamsError: the file is missing, is not YAML, or does not fit the schema.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        known = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ParamsError(f"{path}: cannot be read ({error.strerror}); known params there: {known}") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return parse(raw, str(path))
