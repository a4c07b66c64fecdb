"""The blocks of a params file: frozen, strict about types, unknown keys are errors."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator


def _plain_file_name(name: str) -> str:
    """A name of files and folders of results: it must not lead out of the run's folder, nor look like an option."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise ValueError(
            "expected a plain file name: at most 100 letters, digits, '_', '-' and '.', not beginning with '-' or '.'"
        )
    return name


Name = Annotated[str, AfterValidator(_plain_file_name)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# share of an average that a step keeps; an average that keeps all of it never learns
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Lengths = Annotated[tuple[Annotated[int, Field(ge=2, le=64)], ...], Field(min_length=1)]


class Settings(BaseModel):
    """Base of all settings: frozen, strict about types, finite, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SourceConfig(Settings):
    """Which pictures: the portrait world or crops of photographs."""

    kind: Literal["world", "photos"]
    image_size: Annotated[int, Field(ge=16, le=1024, description="pixels a side")]


class OptimConfig(Settings):
    """One training: length, batch and schedule (linear warm-up, cosine to `min_learning_rate_ratio`).

    A batch is read in `parts`: one after the other, their gradients added, or shared among as many processes as divide
    them. Noise and dropout belong to a part, so that the number of processes changes nothing. With
    `activation_checkpointing` the forward pass of a layer is repeated in the backward pass instead of kept. Neither is
    part of a digest while it has its default.
    """

    steps: Count
    batch_size: Count
    learning_rate: Positive
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    min_learning_rate_ratio: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    max_grad_norm: Positive = 1.0
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    ema_decay: Decay = 0.0
    checkpoint_every: Count = 200
    parts: int = Field(default=1, ge=1, exclude_if=lambda value: value == 1)
    activation_checkpointing: bool = Field(default=False, exclude_if=lambda value: not value)


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

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "DetokenizerConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class IdentityConfig(Settings):
    """The face embedder of the world, trained with the ArcFace loss."""

    embedding_dim: Count
    identities: Count
    scale: Positive = 24.0
    margin: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    optim: OptimConfig


class ClipModelConfig(Settings):
    """The small CLIP that judges whether a picture shows what a text says; `width` and `heads` are of both towers."""

    patch_size: Count
    width: Count
    heads: Count
    vision_layers: Count
    text_layers: Count
    projection_dim: Count
    optim: OptimConfig

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ClipModelConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class ClipConfig(Settings):
    """Which frames of a video or of a folder of pictures are read, and which of them make an identity clip.

    Args:
        image_size: pixels a side of the aligned faces.
        every_seconds: time between two frames read from a video; a folder is read picture by picture.
        max_frames: frames read from a clip at most, spread evenly over it.
        min_frames: a clip with fewer kept frames is rejected.
        min_face: pixels of the shorter side of a face's box below which the face is too small.
        max_identity_distance: Euclidean distance of unit vectors between a frame and the clip's medoid above which it
            shows someone else. The default is for dlib's network: its threshold of 0.6 over its vectors' length of
            about 1.4. ArcFace networks spread faces wider: a least cosine of c is a distance of sqrt(2 - 2 c).
        min_difference: mean absolute difference of pixels in [0, 1] between aligned faces below which the later frame
            is a near duplicate. One picture moved and zoomed differs from itself by about 0.03, two photographs of
            one person by about 0.2.
        max_rejected: share of rejected clips above which building them is an error.
    """

    image_size: Annotated[int, Field(ge=16, le=1024)] = 112
    every_seconds: Positive = 0.2
    max_frames: Count = 64
    min_frames: Annotated[int, Field(ge=2)] = 4
    min_face: Annotated[int, Field(ge=8)] = 64
    max_identity_distance: Annotated[float, Field(gt=0.0, le=2.0)] = 0.42
    min_difference: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.04
    max_rejected: Fraction = 0.5

    @model_validator(mode="after")
    def _enough_frames_can_be_read(self) -> "ClipConfig":
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames {self.min_frames} is above max_frames {self.max_frames}: no clip can be kept")
        return self


class DataConfig(Settings):
    """Conversations to build.

    `rounds` lists the lengths to draw from; `max_depth` bounds rollbacks, except that those which name their base
    (by number, content, or as the start) reach back `named_depth` rounds where it is given. `content_weight` says how
    many times more often a reference by content is drawn, where there is one, than each other kind. With `view`, the
    framing and pose of people are said and edited as well.
    """

    conversations: Count
    rounds: Lengths
    rollback_share: Fraction = 0.6
    max_depth: Count = 2
    named_depth: Count | None = None
    describe_share: Fraction = 0.25
    content_weight: Positive = 3.0
    view: bool = False


class PeopleConfig(Settings):
    """Conversations about people by name.

    `people` lists how many there may be in a conversation. `pairing` says what a recall shows (paper: the three
    stages): `same` the very picture of the introduction; `masked` the whole person, of whom the introduction shows
    the face alone; `paired` the person in another view. The base of a recall lies at most `max_delay` rounds back.
    Shares are of rounds, but `describe_share` of introductions and `full_body_share` of `paired` recalls. With a
    `look_alike_distance` the people of a conversation differ by that much in their identity numbers. A token inside a
    face counts `face_weight` times in the loss.
    """

    conversations: Count
    rounds: Lengths
    pairing: Literal["same", "masked", "paired"]
    people: Annotated[tuple[Annotated[int, Field(ge=1, le=8)], ...], Field(min_length=1)] = (1, 2, 3)
    max_delay: Count = 8
    recall_share: Fraction = 0.5
    rollback_share: Fraction = 0.15
    rename_share: Fraction = 0.05
    reintroduce_share: Fraction = 0.05
    describe_share: Fraction = 0.1
    full_body_share: Fraction = 0.2
    look_alike_distance: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    face_weight: Annotated[float, Field(ge=1.0)] = 2.0

    @model_validator(mode="after")
    def _shares_fit(self) -> "PeopleConfig":
        total = self.recall_share + self.rollback_share + self.rename_share + self.reintroduce_share
        if total > 1:
            raise ValueError(f"recall, rollback, rename and reintroduce shares add up to {total:g}; expected at most 1")
        if self.pairing == "masked" and self.describe_share:
            raise ValueError("describe_share: a masked introduction is a picture; set it to 0 with pairing 'masked'")
        if max(self.people) >= min(self.rounds):
            raise ValueError(
                f"people {max(self.people)}: everybody is introduced and then asked for, so the shortest conversation "
                f"of {min(self.rounds)} rounds has room for {min(self.rounds) - 1}"
            )
        return self


class ModelConfig(Settings):
    """The history-conditioned MLLM.

    `response` is the text before each image: `polite` (SEED-X) or `grounded`, which names the picture it
    starts from; `markers` adds the picture's number and the token's slot to every token in the history, and lets
    the query tokens start from the picture that the response names; `copy_gate` mixes each predicted token with that
    picture's token, in a learned share.
    """

    hidden_size: Count
    intermediate_size: Count
    layers: Count
    heads: Count
    resampler_heads: Count = 4
    lora_rank: Count = 16
    lora_alpha: Count = 16
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    max_rounds: Annotated[int, Field(ge=2, le=64)] = 16
    response: Literal["polite", "grounded"] = "grounded"
    markers: bool = True
    copy_gate: bool = False
    text_loss_weight: Annotated[float, Field(ge=0.0)] = 1.0
    feature_loss_weight: Annotated[float, Field(ge=0.0)] = 6.0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}: "
                "rotary positions turn pairs of numbers in each head"
            )
        if self.hidden_size % self.resampler_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of resampler_heads {self.resampler_heads} and of 4"
                ": the input resampler shares it among its heads, and its grid positions are sine and cosine of x and y"
            )
        if self.markers and self.response != "grounded":
            raise ValueError("markers: true needs response: grounded, whose text names the picture to start from")
        if self.copy_gate and not self.markers:
            raise ValueError("copy_gate: true needs markers: true, with which queries know the picture they start from")
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
    images replaced by the model's own predictions, reached by a linear ramp. `data` is the mix of data sets that its
    pictures come from, each with a weight; a bare name is that set alone. Each step also reads `word_rounds` rounds
    without pictures: fresh conversations of the same mix (`words: data`), of which the share `content_first` of the
    steps refers by content whenever it can, or exercises in finding what was said (`words: lookup`). A stage whose mix
    is empty (`data: {}`) reads such exercises alone, `optim.batch_size` dialogues a step. `change_weight` says how much
    more the tokens count that a request changes, see `batches.change_weights`.
    """

    name: Name
    start: str | None = None
    data: dict[str, Positive]
    trainable: Literal["all", "lora"]
    supervision: Literal["packed", "prefix"] = "packed"
    predicted_history: Fraction = 0.0
    history_noise: Annotated[float, Field(ge=0.0)] = 0.0
    change_weight: Annotated[float, Field(ge=0.0)] = 0.0
    word_rounds: Annotated[int, Field(ge=0)] = 0
    words: Literal["data", "lookup"] = "data"
    content_first: Fraction = 0.5
    text_loss_weight: Annotated[float, Field(ge=0.0)] | None = None
    feature_loss_weight: Annotated[float, Field(ge=0.0)] | None = None
    response: Literal["polite", "grounded"] | None = None
    markers: bool | None = None
    optim: OptimConfig

    @field_validator("data", mode="before")
    @classmethod
    def _one_set_or_a_mix(cls, value: Any) -> Any:
        return {value: 1.0} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _words_alone_are_exercises(self) -> "StageConfig":
        if self.data:
            return self
        if self.words != "lookup":
            raise ValueError(
                f"data: {{}} has no pictures, so the stage reads exercises; expected words: lookup, got {self.words}"
            )
        for name in ("word_rounds", "history_noise", "predicted_history", "change_weight"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}: {getattr(self, name)} has no use in a stage without pictures (data: {{}}); leave it out"
                )
        return self


class ExperimentsConfig(Settings):
    """How much to evaluate."""

    conversations: Count
    depths: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 3, 4)
    drift_conversations: Count = 32
    drift_rounds: Annotated[int, Field(ge=3, le=64)] = 12
    bootstrap: Count = 1000
