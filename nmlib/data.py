"""Batches for training: pictures drawn on the fly, and conversations whose image features are computed once."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from nmlib import checkpoint
from nmlib.config import SourceConfig
from nmlib.conversation import Conversation
from nmlib.photos import PhotoSource
from nmlib.sources import Source, attribute_sizes
from nmlib.storage import load_conversations
from nmlib.world import WorldSource

SOURCES: dict[str, Callable[[int], Source]] = {"world": WorldSource, "photos": PhotoSource}


def open_source(settings: SourceConfig) -> Source:
    """The source of pictures that a params file names."""
    return SOURCES[settings.kind](settings.image_size)


def step_generator(seed: int, step: int) -> Generator:
    """A generator that depends on nothing but its two arguments."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def sample_values(source: Source, count: int, generator: Generator) -> Tensor:
    """Uniformly drawn states (B, A)."""
    columns = [torch.randint(size, (count,), generator=generator) for size in attribute_sizes(source)]
    return torch.stack(columns, dim=1)  # (B, A)


def sample_pictures(source: Source, count: int, split: str, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random pictures of a split with their truth.

    Returns:
        subjects (B, S), values (B, A), images (B, 3, H, W) in [0, 1].
    """
    subjects = source.sample_subjects(count, split, generator)  # (B, S)
    values = sample_values(source, count, generator)  # (B, A)
    return subjects, values, source.render(subjects, values)


@dataclass(frozen=True)
class ConversationFeatures:
    """Conversations with the features of their pictures.

    Args:
        conversations: of any lengths.
        features: for each, (R, N, D).
    """

    conversations: list[Conversation]
    features: list[Tensor]

    def groups(self) -> dict[int, list[int]]:
        """Indices of the conversations of each length."""
        found: dict[int, list[int]] = {}
        for index, conversation in enumerate(self.conversations):
            found.setdefault(len(conversation), []).append(index)
        return dict(sorted(found.items()))

    def take(self, indices: Sequence[int]) -> tuple[list[Conversation], Tensor]:
        """Conversations of equal length and their features (B, R, N, D)."""
        chosen = [self.conversations[index] for index in indices]
        return chosen, torch.stack([self.features[index] for index in indices])  # (B, R, N, D)

    def batch(self, step: int, pictures: int, seed: int) -> tuple[list[Conversation], Tensor]:
        """The batch of a step: conversations of one length, about `pictures` pictures in all.

        A pure function of (step, seed). Each length is drawn as often as it has pictures.
        """
        generator = step_generator(seed, step)
        groups = self.groups()
        weights = torch.tensor([float(length * len(members)) for length, members in groups.items()])
        length = list(groups)[int(torch.multinomial(weights, 1, generator=generator))]
        members = groups[length]
        count = max(1, pictures // length)
        picks = torch.randint(len(members), (count,), generator=generator).tolist()
        return self.take([members[pick] for pick in picks])


def encode_conversations(
    conversations: list[Conversation], encode: Callable[[Tensor], Tensor], chunk: int = 256
) -> ConversationFeatures:
    """Compute the features of all pictures.

    Args:
        conversations: with `images`.
        encode: uint8 (B, 3, H, W) -> (B, N, D).
        chunk: pictures at a time.
    """
    images = torch.cat([c.images for c in conversations if c.images is not None])  # (sum R, 3, H, W)
    features = torch.cat([encode(part) for part in images.split(chunk)])  # (sum R, N, D)
    return ConversationFeatures(conversations, list(features.split([len(c) for c in conversations])))


def load_features(folder: Path, encode: Callable[[Tensor], Tensor], encoder_key: str) -> ConversationFeatures:
    """Conversations of a data set folder with their features, computed on the first call and kept.

    Args:
        folder: written by `save_conversations`.
        encode: uint8 (B, 3, H, W) -> (B, N, D).
        encoder_key: identifies the encoder; features of another one, or of other pictures, are computed anew.
    """
    conversations = load_conversations(folder)
    path = folder / "features.safetensors"
    with (folder / "rounds.parquet").open("rb") as file:
        key = {"encoder": encoder_key, "pictures": hashlib.file_digest(file, "blake2b").hexdigest()[:32]}
    if path.exists():
        tensors, metadata = checkpoint.load(path)
        if metadata == key:
            lengths = [len(conversation) for conversation in conversations]
            return ConversationFeatures(conversations, list(tensors["features"].split(lengths)))
    encoded = encode_conversations(conversations, encode)
    checkpoint.save(path, {"features": torch.cat(encoded.features)}, key)
    return encoded
