"""What a folder of SEED-X weights is, what is missing and what does not fit: `python -m nmlib checkpoint inspect`.

Sizes are read off the files themselves, so that a folder of any size can be told; nothing but headers is read.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import nn

from nmlib.checkpoint import CheckpointError, misfits
from nmlib.config import ModelConfig, SeedXConfig, SeedXVisionConfig
from nmlib.runtime import RunError, read_json
from nmlib.seedx import SeedX
from nmlib.seedx_adapter import AdapterResampler
from nmlib.seedx_checkpoint import (
    CONFIG,
    PLACES,
    find_part,
    ignored,
    llm_name,
    load_tokenizer,
    named_headers,
    same_name,
    shapes,
    tuned_name,
    vit_name,
)
from nmlib.seedx_files import Header, headers_of, weight_files
from nmlib.seedx_vision import QwenViT

ADDED = 6  # opening and closing of image, patch and box
NEEDED = ("llm", "agent", "tokenizer")
RENAMES = {"llm": llm_name, "agent": same_name, "tuned": tuned_name, "vit": vit_name, "detokenizer": same_name}
SHOWN = 6


class PartReport(NamedTuple):
    """What was found of a part: one line that describes it, and what is wrong with it."""

    part: str
    line: str
    faults: list[str]


class Report(NamedTuple):
    """What was found in a folder."""

    folder: Path
    parts: list[PartReport]

    @property
    def fits(self) -> bool:
        """Whether everything that was found fits, and everything that is needed was found."""
        return bool(self.parts) and not any(part.faults for part in self.parts)

    def __str__(self) -> str:
        lines = [str(self.folder)]
        for part in self.parts:
            lines.append(f"{part.part:12} {part.line}")
            lines += [f"{'':12} - {fault}" for fault in part.faults[:SHOWN]]
            if len(part.faults) > SHOWN:
                lines.append(f"{'':12} - and {len(part.faults) - SHOWN} more")
        return "\n".join(lines)


def inspect(folder: Path) -> Report:
    """Describe a folder and hold every part to the modules that would load it.

    Raises:
        CheckpointError: there is no such folder, or it holds nothing of SEED-X.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected one with llm/ and agent/")
    paths = {part: find_part(folder, part) for part in PLACES}
    if not any(paths[part] for part in ("llm", "agent", "tuned", "vit")):
        raise CheckpointError(
            f"{folder}: nothing of SEED-X here; expected llm/ and agent/, or a tuned {PLACES['tuned'][0]}"
        )
    if paths["detokenizer"] is not None:
        paths |= {f"detokenizer/{file.parent.name}": file for file in sorted(paths["detokenizer"].rglob("*.bin"))}
    del paths["detokenizer"]
    headers, broken = {}, {}
    for part, path in paths.items():
        if path is not None and part != "tokenizer":
            try:
                headers[part] = named_headers(weight_files(path), RENAMES[part.partition("/")[0]])
            except CheckpointError as error:
                broken[part] = str(error)
    stored, settings = _llama(paths["llm"]), None
    try:
        settings = infer(headers, stored)
    except (KeyError, ValidationError, ValueError) as error:
        broken.setdefault("sizes", f"cannot be told from the files ({' '.join(str(error).split())})")
    reports = [
        _report(part, path, headers.get(part), broken.get(part), settings, paths) for part, path in paths.items()
    ]
    known = [PartReport("sizes", _sizes(settings), [broken["sizes"]] if "sizes" in broken else [])]
    return Report(folder, known + [report for report in reports if report is not None])


def _llama(path: Path | None) -> Mapping[str, Any]:
    try:
        return read_json(path / CONFIG) if path is not None else {}
    except RunError:
        return {}


def infer(headers: Mapping[str, Mapping[str, Header]], stored: Mapping[str, Any]) -> SeedXConfig:
    """Sizes of the model whose files have these headers; parts that are absent have the released sizes.

    Args:
        headers: part -> name in the module -> header.
        stored: LLaMA's own settings, which alone know its heads.

    Raises:
        KeyError, ValueError: a tensor that tells a size is missing, or sizes contradict each other.
    """
    base = SeedXConfig()
    words = {name.replace("base_model.model.", "").replace(".base_layer", ""): header.shape
             for part in ("llm", "agent", "tuned") for name, header in headers.get(part, {}).items()}  # fmt: skip
    changes: dict[str, Any] = {}
    if any(name.startswith("llm.") for name in words):
        vocabulary = stored.get("vocab_size") or words["llm.model.embed_tokens.weight"][0]
        inner = stored.get("intermediate_size") or words["llm.model.layers.0.mlp.gate_proj.weight"][0]
        ranks = [shape[0] for name, shape in words.items() if ".lora_A." in name]
        changes["model"] = ModelConfig(
            hidden_size=stored.get("hidden_size") or words["llm.model.embed_tokens.weight"][1],
            intermediate_size=inner,
            layers=stored.get("num_hidden_layers") or _count(words, r"llm\.model\.layers\.(\d+)\."),
            heads=stored.get("num_attention_heads") or 1,
            resampler_heads=1,
            lora_rank=max([*ranks, 1]),
            response="polite",
            markers=False,
        )
    if "output_resampler.query" in words:
        changes["queries"], feature_dim = words["output_resampler.query"]
        changes["vision"] = SeedXVisionConfig(feature_dim=feature_dim)
    if "model" in changes:
        queries = changes.get("queries", base.queries)
        changes |= {"image_words": queries, "location_words": 0, "words": vocabulary - ADDED - queries}
    if "vit" in headers:
        changes["vision"] = _infer_vit({name: header.shape for name, header in headers["vit"].items()})
    return SeedXConfig(**changes)


def _infer_vit(found: Mapping[str, tuple[int, ...]]) -> SeedXVisionConfig:
    width, _, patch, _ = found["conv1.weight"]
    tokens, feature_dim = found["attn_pool.query"]
    return SeedXVisionConfig(
        patch_size=patch,
        width=width,
        layers=_count(found, r"transformer\.resblocks\.(\d+)\."),
        heads=1,
        mlp_size=found["transformer.resblocks.0.mlp.c_fc.weight"][0],
        tokens=tokens,
        feature_dim=feature_dim,
        pool_heads=1,
    )


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max(int(match.group(1)) for name in names if (match := re.match(pattern, name)))


def _sizes(settings: SeedXConfig | None) -> str:
    if settings is None:
        return "unknown"
    model, vision = settings.model, settings.vision
    released = SeedXConfig()
    ours = (settings.vocabulary, settings.queries, model.hidden_size, model.intermediate_size, model.layers)
    theirs = (released.vocabulary, released.queries, 5120, 13824, 40)
    kind = "the released ones" if ours == theirs else "not the released ones"
    return (
        f"hidden {model.hidden_size:,}, {model.layers} layers, {settings.vocabulary:,} words, "
        f"{settings.queries} queries, features {vision.tokens} x {vision.feature_dim:,}: {kind}"
    )


def _report(
    part: str, path: Path | None, found: dict[str, Header] | None, broken: str | None,
    settings: SeedXConfig | None, paths: Mapping[str, Path | None],
) -> PartReport | None:  # fmt: skip
    if path is None:
        needless = (part in ("llm", "agent") and paths["tuned"]) or part == "tuned"
        if needless:
            return None
        lacks = [f"missing: expected at {' or '.join(PLACES[part])}"] if part in NEEDED else []
        return PartReport(part, "not found" if not lacks else "missing", lacks)
    if broken is not None:
        return PartReport(part, str(path), [broken])
    if part == "tokenizer":
        return _tokenizer(path, settings)
    assert found is not None
    expected = {} if settings is None else _expected(part, settings)
    faults = misfits(expected, {name: header.shape for name, header in found.items() if _checked(part, name)})
    return PartReport(part, _describe(path, part, found), faults if expected else [])


def _tokenizer(path: Path, settings: SeedXConfig | None) -> PartReport:
    """A tokenizer must have as many words as the model; how they divide, the files of the model do not say."""
    try:
        count = len(load_tokenizer(path, None))
    except CheckpointError as error:
        return PartReport("tokenizer", str(path), [str(error)])
    wrong = settings is not None and count != settings.vocabulary
    faults = [f"{count:,} words, the model has {settings.vocabulary:,}"] if wrong and settings else []
    return PartReport("tokenizer", f"{count:,} words", faults)


def _checked(part: str, name: str) -> bool:
    """Of a detokenizer the resampler is held to its module; whether files hold the whole UNet is not known."""
    return not part.startswith("detokenizer") or name.startswith("resampler.")


def _expected(part: str, settings: SeedXConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        if part == "vit":
            return shapes(QwenViT(settings.vision))
        if part.startswith("detokenizer"):
            return shapes(nn.ModuleDict({"resampler": AdapterResampler(settings.vision.feature_dim)}))
        agent = SeedX(settings)
        if part == "tuned":
            agent.add_lora()
            return shapes(agent)
    return shapes(agent, lambda name: name.startswith("llm.") == (part == "llm"))


def _describe(path: Path, part: str, found: Mapping[str, Header]) -> str:
    """Files, number types, tensors, numbers and bytes of a part."""
    files = sorted({header.file for header in found.values()})
    kinds = Counter(str(header.dtype).removeprefix("torch.") for header in found.values())
    numbers = {header: torch.Size(header.shape).numel() for header in set(found.values())}
    total = sum(numbers[header] for header in found.values())
    size = sum(numbers[header] * header.dtype.itemsize for header in found.values())
    style = ""
    if part == "tuned":
        old = not any(".base_layer." in name for name in headers_of(files))
        style = f", LoRA as peft {'0.4' if old else '0.5 and later'} names it"
    skipped = sum(ignored(name) for name in headers_of(files))
    style += f", {skipped} ignored" if skipped else ""
    shown = files[0].name if len(files) == 1 else f"{len(files)} shards {files[0].suffix}"
    return (
        f"{shown}, {' and '.join(sorted(kinds))}, {len(found)} tensors, {total:,} numbers, {size / 1e9:.2f} GB{style}"
    )
