"""Settings of a run: one frozen, validated object made from a file in `params/`.

Every number that matters lives in such a file. Unknown keys, wrong types and values out of range are
errors that name the file, the key, the value seen and what was expected.
"""

import hashlib
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from nmlib.extra_settings import BreaksConfig, FullBodyConfig, ModelSize, TuningConfig
from nmlib.settings import (
    ClipConfig,
    ClipModelConfig,
    DataConfig,
    DetokenizerConfig,
    ExperimentsConfig,
    IdentityConfig,
    ModelConfig,
    Name,
    OptimConfig,
    PeopleConfig,
    SeedXConfig,
    SeedXVisionConfig,
    Settings,
    SourceConfig,
    StageConfig,
    VisionConfig,
)

__all__ = [
    "BreaksConfig",
    "ClipConfig",
    "ClipModelConfig",
    "DataConfig",
    "DetokenizerConfig",
    "ExperimentsConfig",
    "FullBodyConfig",
    "IdentityConfig",
    "ModelConfig",
    "ModelSize",
    "OptimConfig",
    "PeopleConfig",
    "SeedXConfig",
    "SeedXVisionConfig",
    "Settings",
    "SourceConfig",
    "StageConfig",
    "TuningConfig",
    "VisionConfig",
]


PLAIN = str | int | float | bool | None  # what a value that is neither list nor mapping may be
LONGEST_EXERCISE = 12  # rounds of the longest exercise that `words: lookup` reads


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which no mapping gives a key twice: the second value would silently win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                fault = f"key {key.value!r} is given twice; keep one of them"
                raise yaml.constructor.ConstructorError(None, None, fault, key.start_mark)
            seen.add(key.value)
        return node


class ParamsError(ValueError):
    """A params file that cannot be used; the message says where, what was seen and what was expected."""


class Params(Settings):
    """A whole params file."""

    name: Name
    meaningful: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # what NumPy's generator takes
    threads: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    source: SourceConfig
    vision: VisionConfig
    detokenizer: DetokenizerConfig
    identity: IdentityConfig
    clip: ClipModelConfig | None = None
    data: dict[Name, DataConfig]
    people: dict[Name, PeopleConfig] = Field(default_factory=dict)
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    experiments: ExperimentsConfig
    tuning: TuningConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    breaks: BreaksConfig | None = Field(default=None, exclude_if=lambda value: value is None)
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

    def stage_model(self, stage: StageConfig) -> ModelConfig:
        """Model settings of a stage: the file's, with what the stage overrides."""
        names = ("response", "markers", "text_loss_weight", "feature_loss_weight")
        changes = {name: getattr(stage, name) for name in names if getattr(stage, name) is not None}
        return self._model_with(f"stages: {stage.name!r}", changes)

    def is_personal(self, stage: StageConfig) -> bool:
        """Whether a stage is about people: it reads names, or framing and pose."""
        return any(name in self.people or self.data[name].view for name in stage.data)

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Params":
        size = self.source.image_size
        for part in ("vision", "detokenizer", "clip"):
            settings = getattr(self, part)
            if settings is not None and size % (patch := settings.patch_size):
                raise ValueError(f"{part}.patch_size {patch} does not divide source.image_size {size}")
        self._rounds_fit()
        self._people_fit()
        self._parts_fit()
        if self.seedx is not None and self.seedx.model != self.model:
            raise ValueError("seedx.model differs from model; write it once as `model: &model` and refer to `*model`")
        self._stages_fit()
        self._widths_fit()
        self._extras_fit({stage.name for stage in self.stages})
        return self

    def _rounds_fit(self) -> None:
        """Raise ValueError unless the model has room for the longest conversation."""
        lengths = [length for part in self.data.values() for length in part.rounds]
        lengths += [length for part in self.people.values() for length in part.rounds]
        longest = max([*lengths, self.experiments.drift_rounds])
        longest = max(longest, max(self.experiments.depths) + 2)
        if any(stage.words == "lookup" for stage in self.stages):
            longest = max(longest, LONGEST_EXERCISE)
        if self.breaks is not None:
            longest = max(longest, self.breaks.drift_rounds, *self.breaks.rounds)
        if longest > self.model.max_rounds:
            raise ValueError(
                f"model.max_rounds is {self.model.max_rounds}, but conversations have up to {longest} rounds"
            )

    def _stages_fit(self) -> None:
        """Raise ValueError unless stages have names of their own and refer to what is there."""
        seen: set[str] = set()
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"stages: two stages are named {stage.name!r}; every stage has a name of its own")
            if stage.start is not None and stage.start not in seen:
                raise ValueError(
                    f"stages: {stage.name!r} starts from {stage.start!r}, which is no earlier stage; "
                    f"earlier stages are {sorted(seen)}"
                )
            unknown = sorted(set(stage.data) - set(self.data) - set(self.people))
            if unknown:
                there = sorted([*self.data, *self.people])
                raise ValueError(f"stages: {stage.name!r} reads data {unknown}; `data:` and `people:` define {there}")
            self.stage_model(stage)
            seen.add(stage.name)

    def _model_with(self, where: str, changes: dict[str, Any]) -> ModelConfig:
        """The model with some settings changed; raises ValueError that says where, if they do not go together."""
        try:
            return ModelConfig.model_validate(self.model.model_dump() | changes)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"{where}, with `model:` overridden by {changes}: {said}") from None

    def _widths_fit(self) -> None:
        """Raise ValueError unless the output resampler's heads divide the width of image tokens."""
        part, vision = ("vision", self.vision) if self.seedx is None else ("seedx.vision", self.seedx.vision)
        width, heads = vision.feature_dim, self.model.resampler_heads
        if width % heads or width % 4:
            raise ValueError(
                f"{part}.feature_dim {width} must be a multiple of model.resampler_heads {heads} and of 4: "
                "the output resampler shares it among its heads, and its grid positions are sine and cosine of x and y"
            )

    def _extras_fit(self, stages: set[str]) -> None:
        """Raise ValueError unless what optional blocks refer to is there."""
        if self.tuning is not None and (self.tuning.stage not in stages or self.tuning.data not in self.people):
            raise ValueError(
                f"tuning: stage {self.tuning.stage!r} and data {self.tuning.data!r}; "
                f"expected one of `stages:` {sorted(stages)} and one of `people:` {sorted(self.people)}"
            )
        if self.breaks is not None and not {"markov", "rollback"} <= stages:
            raise ValueError(f"breaks: compares the stages 'markov' and 'rollback'; `stages:` are {sorted(stages)}")
        for number, size in enumerate(self.breaks.sizes if self.breaks is not None else ()):
            self._model_with(f"breaks.sizes.{number}", size.model_dump())

    def _people_fit(self) -> None:
        """Raise ValueError unless data sets about people have a world of people and names of their own."""
        named = [name for name, settings in self.data.items() if settings.view]
        if (self.people or named) and self.source.kind != "world":
            raise ValueError(f"data sets {[*named, *self.people]} show people; source.kind is {self.source.kind!r}")
        twice = sorted(set(self.data) & set(self.people))
        if twice:
            raise ValueError(f"people: {twice} are names of `data:` as well; every data set has a name of its own")

    def _parts_fit(self) -> None:
        """Raise ValueError unless the smallest batch of every stage has a conversation for each of its parts."""
        for stage in self.stages:
            parts = stage.optim.parts
            lengths = [length for name in stage.data if name in self.data for length in self.data[name].rounds]
            lengths += [length for name in stage.data if name in self.people for length in self.people[name].rounds]
            longest = max(lengths, default=1)
            spoken = LONGEST_EXERCISE if stage.words == "lookup" else longest
            sizes = (("optim.batch_size", stage.optim.batch_size, longest), ("word_rounds", stage.word_rounds, spoken))
            for name, size, length in sizes:
                if parts > 1 and 0 < size < parts * length:
                    raise ValueError(
                        f"stages: {stage.name!r}: {name} {size} is {size // length} conversations of {length} rounds; "
                        f"optim.parts {parts} needs at least {parts * length}"
                    )


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
    if faults := list(_not_plain(raw)):
        raise ParamsError("\n".join(f"{where}: {key}: {fault}" for key, fault in faults))
    try:
        return Params.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        lines = [_explain(where, fault) for fault in error.errors()]
        raise ParamsError("\n".join(lines)) from None


def _not_plain(value: Any, key: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, str]]:
    """What YAML can hold and settings cannot (dates, bytes, sets, cycles): the key, and what is wrong with it."""
    if id(value) in above:
        yield key, "the anchor's value contains itself; write out what is meant instead of the alias"
    elif isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            inner = f"{key}.{name}" if key else str(name)
            if not isinstance(name, PLAIN):
                yield inner, f"expected a name as key, found {_typed(name)}; put text in quotes"
            yield from _not_plain(part, inner, (*above, id(value)))
    elif not isinstance(value, PLAIN):
        yield key, f"expected text, a number, a list or a mapping, found {_typed(value)}; put text in quotes"


def _typed(value: Any) -> str:
    shown = str(value) if isinstance(value, date) else repr(value)
    return f"{shown}, which YAML reads as a {type(value).__name__}"


def _explain(where: str, fault: Any) -> str:
    # a key that is refused ends in itself and `[key]`; the line ends in it already, as what was found
    loc = fault["loc"][:-2] if fault["loc"][-1:] == ("[key]",) else fault["loc"]
    key = ".".join(str(part) for part in loc) or "(whole file)"
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r} (value {fault['input']!r}); remove it or correct its spelling"
    if fault["type"] == "missing":
        return f"{where}: key {key!r} is missing; add it"
    if fault["type"] == "too_short":
        return f"{where}: {key}: expected {fault['ctx']['min_length']} or more values, found {fault['input']!r}"
    seen = "" if isinstance(fault["input"], dict) else f", found {fault['input']!r}"
    return f"{where}: {key}: {fault['msg'].removeprefix('Value error, ')}{seen}"


def load(path: str | Path) -> Params:
    """Read and check a params file.

    Args:
        path: a YAML file such as `params/cpu.yaml`.

    Raises:
        ParamsError: the file is missing, is not text or not YAML, or does not fit the schema.
    """
    path = Path(path)
    text = _text(path)
    try:
        raw = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # of a value that only looks like a date or a number: 2024-13-01
        raise ParamsError(f"{path}: not valid YAML: {error}; put text in quotes") from None
    return parse(raw, str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        known = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ParamsError(f"{path}: cannot be read ({error.strerror}); known params there: {known}") from None
    except UnicodeDecodeError as error:
        line, seen = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise ParamsError(
            f"{path}: expected UTF-8 text, found byte 0x{seen:02x} in line {line}; save as UTF-8"
        ) from None
