"""SEED-X at a size that tests can afford, and a checkpoint folder as SEED-X releases it."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from toy import excite
from transformers import PreTrainedTokenizerFast

from nmlib.config import ModelConfig, SeedXConfig, SeedXVisionConfig
from nmlib.seedx import SeedX, added_words
from nmlib.seedx_checkpoint import load_tokenizer
from nmlib.seedx_layout import SeedXTemplate
from nmlib.seedx_vision import QwenViT

TEXT = "make the wall blue and the hat red go back to what it was before undo that here is a picture of her [INST]"
SIDE = 28  # pixels of a picture


@cache
def sentence_model() -> bytes:
    """A sentencepiece model like LLaMA's (`<unk>`, `<s>`, `</s>` are 0, 1, 2), trained on one line."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_writer=out, vocab_size=330, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, character_coverage=1.0, add_dummy_prefix=True,
    )  # fmt: skip
    return out.getvalue()


def word_count() -> int:
    """Words of `sentence_model`."""
    return sentencepiece.SentencePieceProcessor(model_proto=sentence_model()).get_piece_size()


def settings(**changes: Any) -> SeedXConfig:
    """About a hundred thousand numbers; sizes are distinct wherever they are free."""
    vision = SeedXVisionConfig(
        image_size=SIDE, patch_size=4, width=24, layers=2, heads=3, mlp_size=52, tokens=16, feature_dim=32, pool_heads=2
    )
    model = ModelConfig(
        hidden_size=40, intermediate_size=60, layers=3, heads=5, resampler_heads=4, lora_rank=3, lora_alpha=3,
        lora_dropout=0.0, response="polite", markers=False,
    )  # fmt: skip
    sizes = {"vision": vision, "model": model, "queries": 4, "words": word_count(), "image_words": 7}
    return SeedXConfig(**({**sizes, "location_words": 5, "max_positions": 512} | changes))  # type: ignore[arg-type]


def write_tokenizer(folder: Path, config: SeedXConfig) -> Path:
    """A tokenizer folder with the files SEED-X releases; ids of added words in an order of its own."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(sentence_model())
    words = sorted(added_words(config), key=lambda word: word[::-1])
    added = {word: config.words + index for index, word in enumerate(words)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    options = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `settings`."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(write_tokenizer(Path(folder) / "t", settings()), settings())


def template(**changes: Any) -> SeedXTemplate:
    """The template of `settings`."""
    return SeedXTemplate(tokenizer(), settings(**changes))


def agent(seed: int = 0, **changes: Any) -> SeedX:
    """An agent in evaluation mode with lively weights everywhere."""
    torch.manual_seed(seed)
    model = SeedX(settings(**changes)).eval()
    excite(model, 3.0)
    return model


def vit(seed: int = 0) -> QwenViT:
    """An encoder in evaluation mode."""
    torch.manual_seed(seed)
    return QwenViT(settings().vision).eval()


def write_released(folder: Path, *, shards: int = 3, lora: str = "", seed: int = 0) -> SeedX:
    """Write a model as SEED-X releases it, encoder and tokenizer beside it; returns the agent that was written.

    Args:
        folder: the model's own, for example `pretrained/seed_x_i`.
        shards: files of the language model.
        lora: `old` or `new`: one file of a tuned agent, with LoRA as peft 0.4 or a later one names it.
        seed: of the weights.
    """
    written = agent(seed)
    folder.mkdir(parents=True)
    if lora:
        written.add_lora()
        with torch.no_grad():
            for name, parameter in written.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        names = {name: name.replace(".base_layer", "") if lora == "old" else name for name in written.state_dict()}
        torch.save({names[n]: t.clone() for n, t in written.state_dict().items()}, folder / "pytorch_model.bin")
    else:
        write_llm(folder / "llm", written, shards)
        (folder / "agent").mkdir()
        own = {name: t for name, t in written.state_dict().items() if not name.startswith("llm.")}
        torch.save(own, folder / "agent" / "pytorch_model.bin")
    (folder.parent / "QwenViT").mkdir()
    named = {f"transformer.visual.{name}": tensor for name, tensor in vit(seed).state_dict().items()}
    torch.save(named, folder.parent / "QwenViT" / "qwen_vit_G.pt")
    write_tokenizer(folder.parent / "cvlm_llama2_tokenizer_100img_and_224loc_addpatch", settings())
    return written


def write_llm(folder: Path, written: SeedX, shards: int) -> None:
    """LLaMA in sharded `.bin` files with their index, and with the buffers that old versions stored."""
    folder.mkdir()
    tensors = dict(written.llm.state_dict())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: tensors[name].clone() for name in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    written.llm.config.save_pretrained(folder)
