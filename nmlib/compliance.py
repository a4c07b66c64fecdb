"""Does a picture show what was asked? A small CLIP trained on a source's pictures, and any local one by the same call.

It is a judge: never the encoder under test, never trained on anything that a model made. A text names some of a
picture's attributes. Because states are exact, it is known which texts of a batch are also true of other pictures
of it; the contrastive loss (Radford et al. 2021) leaves those pairs out instead of pushing them apart.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Generator, Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from nmlib import data, phrases, prompts, runtime
from nmlib.config import ClipModelConfig
from nmlib.runtime import atomic_folder
from nmlib.sources import Attribute, Source

# CLIPModel reads a text at its first `</s>`, but takes the id 2 for a sign of an old faulty file: `</s>` is not 2.
PAD, BOS, UNK, EOS = "<pad>", "<s>", "<unk>", "</s>"
MAX_WORDS = 64
MAX_STRANGE = 2  # words that mean nothing to it, strewn into a text it learns from
MAX_SCALE = 100.0
CHUNK = 256
ALIKE = 1e-3  # scores whose standard deviation is below this tell nothing apart


class ComplianceError(ValueError):
    """A CLIP that cannot be used, or a text it cannot read; the message says why."""


class ClipLosses(NamedTuple):
    """`total` adds `contrast`, pictures and texts of a batch, `choice`, one value against the others, and `read`.

    `read` is the same choice, made by a linear reader of all patches instead of by texts. `accuracy` is the share of
    texts that score highest with a picture of which they are true.
    """

    total: Tensor
    contrast: Tensor
    choice: Tensor
    read: Tensor
    accuracy: Tensor


def strew(rng: random.Random, text: str) -> str:
    """A text with words of no meaning at random places, so that a prompt may hold words that were never learned."""
    words = text.split()
    for _ in range(rng.randint(0, MAX_STRANGE)):
        words.insert(rng.randint(0, len(words)), UNK)
    return " ".join(words)


def build_tokenizer(attributes: Sequence[Attribute]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the words of descriptions; case and punctuation do not matter."""
    grammar = [*phrases.DESCRIBE, "and", *(text for a in attributes for looks in a.looks.values() for text in looks)]
    words = sorted({word for text in grammar for word in text.split() if not word.startswith("{")})
    special = [PAD, BOS, UNK, EOS]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*special, *words])}, unk_token=UNK))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z0-9]+"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, special.index(word)) for word in (BOS, EOS)]
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, unk_token=UNK, eos_token=EOS, model_max_length=MAX_WORDS
    )


# ---------------------------------------------------------------------------------------------------------
# training


def new_clip(settings: ClipModelConfig, tokenizer: PreTrainedTokenizerBase, image_size: int) -> CLIPModel:
    """A fresh CLIP that reads the tokenizer's words and pictures of one size."""
    tower = {
        "hidden_size": settings.width,
        "intermediate_size": 4 * settings.width,
        "num_attention_heads": settings.heads,
        "projection_dim": settings.projection_dim,
    }
    text = tower | {
        "num_hidden_layers": settings.text_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_WORDS,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = tower | {
        "num_hidden_layers": settings.vision_layers,
        "image_size": image_size,
        "patch_size": settings.patch_size,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.projection_dim))


def _unit(found: BaseModelOutputWithPooling) -> Tensor:
    """Unit vectors (B, E) of what a tower found."""
    assert found.pooler_output is not None
    return F.normalize(found.pooler_output.float(), dim=1)  # (B, E)


def contrastive_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Symmetric cross-entropy of finding a text's picture and a picture's text, without false negatives.

    Args:
        logits: (B, B), text by picture.
        truth: (B, B) bool; a pair off the diagonal that is also true counts neither as right nor as wrong.
    """
    skipped = truth & ~torch.eye(len(truth), dtype=torch.bool, device=truth.device)
    kept = logits.masked_fill(skipped, float("-inf"))  # (B, B)
    right = torch.arange(len(kept), device=kept.device)
    return (F.cross_entropy(kept, right) + F.cross_entropy(kept.T, right)) / 2


def choice_loss(logits: Tensor, values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Cross-entropy of finding each attribute's value among all its values, summed over attributes.

    A batch seldom holds two pictures that differ in a small feature alone; without this, those are learned last. A
    mean would leave a small feature a sixth of a loss of which colours take the rest.

    Args:
        logits: (B, V), picture by text of one value, attribute after attribute.
        values: (B, A) states.
        sizes: number of values of each of the A attributes, V in all.
    """
    parts = zip(logits.split(list(sizes), dim=1), values.T, strict=True)  # A x (B, size), (B,)
    return torch.stack([F.cross_entropy(part, right) for part, right in parts]).sum()


class ClipTrainer(nn.Module):
    """A small CLIP with its loss.

    A CLIP sums a picture up in one vector that at first is the average of its patches, in which a mouth is lost. While
    it trains, a linear reader of all patches, each at its place, makes them tell every attribute; it is not kept.

    Args:
        settings: sizes.
        source: gives the words and the pictures' size.
    """

    def __init__(self, settings: ClipModelConfig, source: Source) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer(source.attributes)
        self.clip = new_clip(settings, self.tokenizer, source.image_size)
        self.image_size = source.image_size
        self.sizes = [len(source.attributes[place].values) for place in prompts.visible(source)]
        patches = (source.image_size // settings.patch_size) ** 2
        self.reader = nn.Linear((1 + patches) * settings.width, sum(self.sizes))

    def forward(
        self, images: Tensor, texts: Mapping[str, Tensor], truth: Tensor, choices: Mapping[str, Tensor], values: Tensor
    ) -> ClipLosses:
        """Loss of a batch.

        Args:
            images: (B, 3, H, W) in [0, 1].
            texts: `input_ids` and `attention_mask` (B, T) of descriptions, row i of picture i.
            truth: (B, B) bool, see `prompts.true_of`.
            choices: the same (V, T) of a text for every value, see `prompts.list_choices`.
            values: (B, A) states in the attributes that show.
        """
        scale = self.clip.logit_scale.exp().clamp(max=MAX_SCALE)
        seen = self.clip.get_image_features(images * 2 - 1)
        pictures, patches = _unit(seen), seen.last_hidden_state.flatten(1)  # (B, E), (B, (1 + P) * D)
        logits = scale * (_unit(self.clip.get_text_features(**texts)) @ pictures.T)  # (B, B)
        against = scale * (pictures @ _unit(self.clip.get_text_features(**choices)).T)  # (B, V)
        contrast, choice = contrastive_loss(logits, truth), choice_loss(against, values, self.sizes)
        read = choice_loss(self.reader(patches), values, self.sizes)
        best = truth.gather(1, logits.argmax(1, keepdim=True))  # (B, 1)
        return ClipLosses(contrast + choice + read, contrast, choice, read, best.float().mean())

    def batch(self, source: Source, count: int, generator: Generator, rng: random.Random) -> dict[str, Any]:
        """What `forward` takes: `count` pictures of training subjects with training texts, in pairs of near twins.

        Two pictures of a pair differ in one attribute that their texts name, so that every picture meets a text that
        is nearly true of it. Pictures of an odd count leave one of them alone.
        """
        half = (count + 1) // 2
        subjects, values = source.sample_subjects(half, "train", generator), data.sample_values(source, half, generator)
        named = prompts.draw_named(rng, source, half)  # (B/2, A)
        values = torch.cat([values, prompts.change(rng, source, values, prompts.pick_one(rng, named))])[
            :count
        ]  # (B, A)
        subjects, named = subjects.repeat(2, 1)[:count], named.repeat(2, 1)[:count]  # (B, S), (B, A)
        texts = [strew(rng, text) for text in prompts.describe(rng, source, values, named, "train")]
        return {
            "images": source.render(subjects, values),
            "texts": self.tokenizer(texts, padding=True, return_tensors="pt"),
            "truth": prompts.true_of(values, named),
            "choices": self.tokenizer(prompts.list_choices(rng, source, "train"), padding=True, return_tensors="pt"),
            "values": values[:, prompts.visible(source)],
        }

    def save(self, folder: Path) -> None:
        """Write model, tokenizer and how pictures are prepared, in transformers' format, whole or not at all."""
        side = self.image_size
        prepare = CLIPImageProcessorPil(
            size={"height": side, "width": side}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        with atomic_folder(folder) as temporary, _quiet():
            self.clip.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            prepare.save_pretrained(temporary)


# ---------------------------------------------------------------------------------------------------------
# scoring


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers; what matters is checked."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


class ClipScorer:
    """A CLIP from a local folder in transformers' format: a run's own, or for photographs any other.

    Args:
        folder: holds `config.json`, the weights, the tokenizer and `preprocessor_config.json`.

    Raises:
        ComplianceError: the folder is missing, incomplete, or holds another kind of model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise ComplianceError(f"{folder}: no CLIP here (no config.json); run the notebook that trains it")
        kind = runtime.read_json(folder / "config.json").get("model_type")
        if kind != "clip":
            raise ComplianceError(f"{folder}: holds a model of type {kind!r}, expected 'clip'; give a CLIP's folder")
        try:
            with _quiet():
                loaded: Any = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
                self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                self._prepare = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers, tokenizers and safetensors raise kinds that share no base
            reason = " ".join(str(error).split())
            raise ComplianceError(f"{folder}: damaged or incomplete ({reason}); put the missing file back") from None
        self._clip: CLIPModel = loaded[0]
        absent = sorted([*loaded[1]["missing_keys"], *loaded[1]["mismatched_keys"]], key=str)
        if absent:
            raise ComplianceError(f"{folder}: {len(absent)} weights are missing or misshapen, the first is {absent[0]}")
        self._clip.to(runtime.device()).eval().requires_grad_(False)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, E) of pictures (B, 3, H, W) in [0, 1]."""
        vectors = []
        for part in images.split(CHUNK):
            pixels = list((part * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy())
            ready = self._prepare(pixels, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
            vectors.append(_unit(self._clip.get_image_features(ready.to(self._clip.device))).cpu())
        return torch.cat(vectors)  # (B, E)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, E) of texts.

        Raises:
            ComplianceError: a text is longer than this CLIP reads.
        """
        limit, vectors = self._clip.text_model.config.max_position_embeddings, []
        for start in range(0, len(texts), CHUNK):
            words = self._tokenizer(list(texts[start : start + CHUNK]), padding=True, return_tensors="pt")
            lengths = words["attention_mask"].sum(1)  # (B,)
            if int(lengths.max()) > limit:
                long = texts[start + int(lengths.argmax())]
                raise ComplianceError(f"text {long!r} has {int(lengths.max())} tokens, this CLIP reads {limit}; cut it")
            inputs = {key: words[key].to(self._clip.device) for key in ("input_ids", "attention_mask")}
            vectors.append(_unit(self._clip.get_text_features(**inputs)).cpu())
        return torch.cat(vectors)  # (B, E)

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine of each picture with its text.

        Args:
            images: (B, 3, H, W) in [0, 1], of any size.
            texts: B.

        Returns:
            (B,) in [-1, 1].

        Raises:
            ComplianceError: not as many texts as pictures, or a text that is too long.
        """
        if len(images) != len(texts):
            raise ComplianceError(f"{len(texts)} texts for {len(images)} pictures; expected one for each")
        return (self.embed_images(images) * self.embed_texts(texts)).sum(1)  # (B,)

    def auroc(self, images: Tensor, right: Sequence[str], wrong: Sequence[str]) -> float:
        """Area under the ROC curve on known pairs: texts that are right against texts that are wrong.

        Args:
            images: (B, 3, H, W) in [0, 1].
            right: B texts that are true of the pictures.
            wrong: B texts that are not, for example the same ones with one attribute changed.

        Raises:
            ComplianceError: every pair scores alike, as with weights that were never trained.
        """
        scores = torch.cat([self.score(images, right), self.score(images, wrong)])  # (2B,)
        if float(scores.std()) < ALIKE:
            raise ComplianceError(
                f"{self.folder}: every pair scores {float(scores.mean()):.2f}: this CLIP tells nothing apart here; "
                "train it longer or give another one"
            )
        return float(roc_auc_score([1] * len(right) + [0] * len(wrong), scores.numpy()))
