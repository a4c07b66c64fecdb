"""SEED-X's released folders in, safetensors out: strict, in the number type of choice, without a second copy in memory.

Modules are built on the meta device, every key and shape of the files is held to theirs, and only then the tensors
are read one by one, converted and put in their places. The key map is short, because modules have SEED-X's names:

    llm/                          plain LLaMA, LoRA merged                    -> llm.*
    agent/pytorch_model.bin       both resamplers and patch positions         -> the same names
    QwenViT/qwen_vit_G.pt         the encoder, maybe with Qwen-VL-Chat's prefix
    <tokenizer folder>            sentencepiece model and added words
    pytorch_model.bin             a tuned agent with LoRA beside its weights (peft 0.4 or later)
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import set_module_tensor_to_device
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nmlib.checkpoint import CheckpointError, require_fit
from nmlib.config import SeedXConfig
from nmlib.lora import LORA_TARGETS
from nmlib.runtime import RunError, atomic_folder, read_json, write_json
from nmlib.seedx import SeedX, check_tokenizer, count_parameters
from nmlib.seedx_files import Header, headers_of, tensors_of, weight_files
from nmlib.seedx_layout import SeedXTemplate
from nmlib.seedx_vision import QwenViT

CONFIG = "config.json"
WRAPPED = "llm.base_model.model."
# Keys that files may hold and no module needs, each with its reason.
IGNORED = {r"rotary_emb\.inv_freq$": "rotary frequencies, which are computed"}
PREFIXES = ("transformer.visual.",)  # of the encoder inside Qwen-VL-Chat
PLACES = {
    "llm": ("llm",),
    "agent": ("agent",),
    "tuned": ("pytorch_model.bin", "model.safetensors"),
    "vit": ("vit", "QwenViT", "../QwenViT"),
    "tokenizer": ("tokenizer", "*tokenizer*", "../*tokenizer*"),
    "detokenizer": ("detokenizer", "seed_detokenizer", "../seed_detokenizer"),
}


class System(NamedTuple):
    """What a released folder holds: the agent, its encoder (None where it was not asked for) and its words."""

    agent: SeedX
    vit: QwenViT | None
    template: SeedXTemplate


def find_part(folder: Path, part: str) -> Path | None:
    """Where a part of SEED-X lies: in its folder, or beside it as the released repositories have it."""
    for place in PLACES[part]:
        base = folder.resolve().parent if place.startswith("../") else folder
        for path in sorted(base.glob(place.removeprefix("../"))):
            if path.exists():
                return path
    return None


def require_part(folder: Path, part: str) -> Path:
    """The same, where the part must be there.

    Raises:
        CheckpointError: names the places that were searched.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected one with llm/ and agent/")
    found = find_part(folder, part)
    if found is None:
        raise CheckpointError(f"{folder}: no {part}; expected it at {' or '.join(PLACES[part])}")
    return found


# ---------------------------------------------------------------------------------------------------------
# the key map


def ignored(name: str) -> bool:
    """Whether a stored tensor is on the list of those that no module needs."""
    return any(re.search(pattern, name) for pattern in IGNORED)


def vit_name(name: str) -> str:
    """A stored name of the encoder as `QwenViT` calls it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def llm_name(name: str) -> str:
    """A stored name of LLaMA as the agent calls it."""
    return f"llm.{name}"


def tuned_name(name: str) -> str:
    """A stored name of a tuned agent as the installed peft calls it: `q_proj.weight` is `q_proj.base_layer.weight`."""
    owner = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if name.startswith(WRAPPED) and name.endswith(".weight") and owner in LORA_TARGETS:
        return f"{name.removesuffix('.weight')}.base_layer.weight"
    return name


def same_name(name: str) -> str:
    """A stored name that is the module's own."""
    return name


Rename = Callable[[str], str]


def named_headers(files: list[Path], rename: Rename) -> dict[str, Header]:
    """Headers of what files hold under the names of the module, without what is ignored."""
    return {rename(name): header for name, header in headers_of(files).items() if not ignored(name)}


def shapes(module: nn.Module, keep: Callable[[str], bool] = lambda name: True) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a module wants from its files."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if keep(name)}


# ---------------------------------------------------------------------------------------------------------
# loading


def fill(
    module: nn.Module,
    files: list[Path],
    rename: Rename,
    expected: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Check files against a module on the meta device, then move their tensors into it one by one.

    Raises:
        CheckpointError: names every key that is missing, unexpected or misshapen; nothing was loaded then.
    """
    found = {name: header.shape for name, header in named_headers(files, rename).items()}
    require_fit(expected, found, type(module).__name__, str(files[0] if len(files) == 1 else files[0].parent))
    for file in files:
        for name, tensor in tensors_of(file):
            if not ignored(name):
                value = tensor.to(dtype=dtype, device=device, copy=True)
                set_module_tensor_to_device(module, rename(name), device, value=value, dtype=dtype)


def load_agent(
    folder: Path, settings: SeedXConfig, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> SeedX:
    """The agent of a folder, in evaluation mode; one that was tuned keeps its LoRA.

    Raises:
        CheckpointError: a part is missing, or does not fit the settings.
    """
    with torch.device("meta"):
        agent = SeedX(settings)
    if find_part(folder, "tuned") is not None:
        agent.add_lora()
        fill(agent, weight_files(require_part(folder, "tuned")), tuned_name, shapes(agent), dtype, device)
    else:
        llm, own = require_part(folder, "llm"), require_part(folder, "agent")
        _check_llama(llm / CONFIG, settings)
        inside = {name: shape for name, shape in shapes(agent).items() if name.startswith("llm.")}
        outside = {name: shape for name, shape in shapes(agent).items() if not name.startswith("llm.")}
        fill(agent, weight_files(llm), llm_name, inside, dtype, device)
        fill(agent, weight_files(own), same_name, outside, dtype, device)
    agent.restore_buffers(device)
    return agent.eval()


def _check_llama(path: Path, settings: SeedXConfig) -> None:
    """Hold LLaMA's own settings to ours, where shapes do not show them."""
    stored = _read(path)
    model = settings.model
    wanted = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "vocab_size": settings.vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    for name, value in wanted.items():
        if stored.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} is {stored[name]}, expected {value}; give the right settings")


def load_vit(
    folder: Path, settings: SeedXConfig, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> QwenViT:
    """The frozen encoder of a folder or beside it.

    Raises:
        CheckpointError: it is missing, or does not fit the settings.
    """
    with torch.device("meta"):
        vit = QwenViT(settings.vision)
    fill(vit, weight_files(require_part(folder, "vit")), vit_name, shapes(vit), dtype, device)
    return vit.eval().requires_grad_(False)


def load_tokenizer(folder: Path, settings: SeedXConfig | None) -> PreTrainedTokenizerFast:
    """The words of a tokenizer folder, held to those of the model if it is given; ids are those of its files.

    Raises:
        CheckpointError: the folder holds no tokenizer, or one with other words.
    """
    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, local_files_only=True)  # type: ignore
        if settings is not None:
            check_tokenizer(tokenizer, settings, str(folder))
    except (ValueError, OSError) as error:
        line = str(error).partition("\n")[0]
        raise CheckpointError(line if line.startswith(str(folder)) else f"{folder}: no tokenizer ({line})") from None
    return tokenizer


def from_pretrained(
    folder: Path,
    settings: SeedXConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    vision: bool = True,
) -> System:
    """Load a folder that SEED-X released or that `save_pretrained` wrote.

    Args:
        folder: with `llm/` and `agent/`; encoder and tokenizer in it or beside it.
        settings: sizes; by default those of the folder's `config.json`, else the released ones.
        dtype: number type of all weights.
        device: where they go.
        vision: also load the encoder.

    Raises:
        CheckpointError: something is missing, damaged or does not fit; names it.
    """
    settings = settings or stored_settings(folder) or SeedXConfig()
    template = SeedXTemplate(load_tokenizer(require_part(folder, "tokenizer"), settings), settings)
    agent = load_agent(folder, settings, dtype, device)
    return System(agent, load_vit(folder, settings, dtype, device) if vision else None, template)


def stored_settings(folder: Path) -> SeedXConfig | None:
    """The settings in a folder that `save_pretrained` wrote; None in others."""
    if not (folder / CONFIG).is_file():
        return None
    raw = _read(folder / CONFIG)
    try:
        return SeedXConfig.model_validate_json(json.dumps(raw["seedx"]))
    except (KeyError, TypeError, ValidationError) as error:
        line = " ".join(str(error).split())
        raise CheckpointError(f"{folder / CONFIG}: no settings that `save_pretrained` wrote ({line})") from None


def _read(path: Path) -> dict[str, object]:
    try:
        found = read_json(path)
    except RunError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds {type(found).__name__}; expected a mapping of settings")
    return found


# ---------------------------------------------------------------------------------------------------------
# saving


def save_pretrained(system: System, folder: Path, shard_size: str = "5GB") -> None:
    """Write a folder of safetensors that `from_pretrained` reads, whole or not at all; an older one is replaced.

    Args:
        system: what to save; LoRA must be merged.
        folder: where.
        shard_size: largest file of the language model.

    Raises:
        CheckpointError: LoRA is not merged.
    """
    agent = system.agent
    if agent.has_lora:
        raise CheckpointError(f"{folder}: the agent has LoRA beside its weights; call merge_lora() first")
    with atomic_folder(folder) as temporary:
        write_json(temporary / CONFIG, {"model_type": "seedx", "seedx": agent.config.model_dump(mode="json")})
        agent.llm.save_pretrained(temporary / "llm", max_shard_size=shard_size)
        own = {name: tensor for name, tensor in agent.state_dict().items() if not name.startswith("llm.")}
        parts = {"agent": own} | ({} if system.vit is None else {"vit": system.vit.state_dict()})
        for part, tensors in parts.items():
            (temporary / part).mkdir()
            file = temporary / part / "model.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
        system.template.tokenizer.save_pretrained(temporary / "tokenizer")
        (temporary / "README.md").write_text(model_card(system), encoding="utf-8")


def model_card(system: System) -> str:
    """The card of a saved model: what it is, its sizes, how to load it, and the licences of what it came from."""
    settings, agent = system.agent.config, system.agent
    rows = {"language model": count_parameters(agent.llm), "input resampler": count_parameters(agent.input_resampler)}
    rows |= {
        "output resampler": count_parameters(agent.output_resampler),
        "patch positions": agent.patch_pos_embed.numel(),
    }
    if system.vit is not None:
        rows["image encoder"] = count_parameters(system.vit)
    table = "\n".join(f"| {name} | {count:,} |" for name, count in rows.items())
    return f"""---
library_name: nmlib
pipeline_tag: any-to-any
license: other
---
# A SEED-X model for conversations of many rounds

| part | parameters |
|---|---|
{table}

Number type {str(agent.dtype).removeprefix("torch.")}, {settings.vocabulary:,} words, {settings.queries} query tokens a
picture, history by `{settings.history}`.

```python
from pathlib import Path
from nmlib.seedx_checkpoint import from_pretrained

system = from_pretrained(Path("this folder"))
```

The architecture is SEED-X (arXiv 2404.14396), trained on conversations as in arXiv 2601.20911. Weights that began as
SEED-X, LLaMA-2 or Qwen-VL stay under the licences of those.
"""
