"""Batches for training: pictures drawn on the fly, and conversations whose image features are computed once."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from nmlib import checkpoint
from nmlib.config import Params, SourceConfig
from nmlib.conversation import Conversation
from nmlib.people import PeopleSource
from nmlib.photos import PhotoSource
from nmlib.sources import Source, attribute_sizes
from nmlib.storage import load_conversations
from nmlib.world import WorldSource

VIEW_SHARE = 0.25  # of the pictures that encoder and detokenizer learn from, where people are asked for
SOURCES: dict[str, Callable[[int], Source]] = {"world": WorldSource, "photos": PhotoSource}


def open_source(settings: SourceConfig) -> Source:
    """The source of pictures that a params file names."""
    return SOURCES[settings.kind](settings.image_size)


def open_people(settings: SourceConfig) -> PeopleSource:
    """The world of a params file with framing, pose and names to ask for."""
    return PeopleSource(settings.image_size)


def speaker(params: Params) -> Source:
    """The source whose grammar holds all that is said in the data sets of a params file."""
    names_people = bool(params.people) or any(settings.view for settings in params.data.values())
    return open_people(params.source) if names_people else open_source(params.source)


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


def training_pictures(
    params: Params, source: Source, count: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of the training split for encoder and detokenizer; where people are asked for, in every view.

    Returns:
        subjects (B, S), values (B, A) of the source's own attributes, images (B, 3, H, W) in [0, 1].
    """
    people = speaker(params)
    viewed = round(VIEW_SHARE * count) if isinstance(people, PeopleSource) else 0
    subjects, values, images = sample_pictures(source, count - viewed, "train", generator)
    if not isinstance(people, PeopleSource) or not viewed:
        return subjects, values, images
    others = people.sample_subjects(viewed, "train", generator)  # (V, S)
    states = sample_values(people, viewed, generator)  # (V, A + 2)
    shown = people.viewed(others, states).clamp(-1, 1)  # (V, S)
    return (
        torch.cat([subjects, shown]),  # (B, S)
        torch.cat([values, states[:, : values.shape[1]]]),  # (B, A)
        torch.cat([images, people.render(others, states)]),  # (B, 3, H, W)
    )


@dataclass(frozen=True)
class ConversationFeatures:
    """Conversations with the features of their pictures.

    Args:
        conversations: of any lengths.
        features: for each, (R, N, D).
        weights: for each, (R, N) weights of the tokens in the loss, of mean 1 in each picture; None weighs all alike.
    """

    conversations: list[Conversation]
    features: list[Tensor]
    weights: list[Tensor] | None = None

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

    def take_weights(self, indices: Sequence[int]) -> Tensor | None:
        """Loss weights (B, R, N) of conversations of equal length; None where all tokens weigh alike."""
        if self.weights is None:
            return None
        return torch.stack([self.weights[index] for index in indices])  # (B, R, N)

    def batch(self, step: int, pictures: int, seed: int) -> tuple[list[Conversation], Tensor]:
        """The batch of a step: the conversations of `batch_indices` with their features."""
        return self.take(self.batch_indices(step, pictures, seed))

    def batch_indices(self, step: int, pictures: int, seed: int) -> list[int]:
        """Which conversations a step takes: of one length, about `pictures` pictures in all.

        A pure function of (step, seed). Each length is drawn as often as it has pictures.
        """
        generator = step_generator(seed, step)
        groups = self.groups()
        weights = torch.tensor([float(length * len(members)) for length, members in groups.items()])
        length = list(groups)[int(torch.multinomial(weights, 1, generator=generator))]
        members = groups[length]
        count = max(1, pictures // length)
        picks = torch.randint(len(members), (count,), generator=generator).tolist()
        return [members[pick] for pick in picks]


def encode_conversations(
    conversations: list[Conversation],
    encode: Callable[[Tensor], Tensor],
    chunk: int = 256,
    weigh: Callable[[Conversation], Tensor] | None = None,
) -> ConversationFeatures:
    """Compute the features of all pictures.

    Args:
        conversations: with `images`.
        encode: uint8 (B, 3, H, W) -> (B, N, D).
        chunk: pictures at a time.
        weigh: conversation -> loss weights (R, N), for example `personalization.face_weights`.
    """
    images = torch.cat([c.images for c in conversations if c.images is not None])  # (sum R, 3, H, W)
    features = torch.cat([encode(part) for part in images.split(chunk)])  # (sum R, N, D)
    weights = None if weigh is None else [weigh(conversation) for conversation in conversations]
    return ConversationFeatures(conversations, list(features.split([len(c) for c in conversations])), weights)


def load_features(
    folder: Path,
    encode: Callable[[Tensor], Tensor],
    encoder_key: str,
    weigh: Callable[[Conversation], Tensor] | None = None,
    weigh_key: str = "",
) -> ConversationFeatures:
    """Conversations of a data set folder with their features, computed on the first call and kept.

    Args:
        folder: written by `save_conversations`.
        encode: uint8 (B, 3, H, W) -> (B, N, D).
        encoder_key: identifies the encoder; features of another one, or of other pictures, are computed anew.
        weigh: conversation -> loss weights (R, N); kept beside the features.
        weigh_key: identifies the weights, as `encoder_key` does the encoder.
    """
    conversations = load_conversations(folder)
    path = folder / "features.safetensors"
    with (folder / "rounds.parquet").open("rb") as file:
        pictures = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    key = {"encoder": encoder_key, "pictures": pictures, "weights": weigh_key if weigh else None}
    if path.exists():
        tensors, metadata = checkpoint.load(path)
        if metadata == key:
            lengths = [len(conversation) for conversation in conversations]
            parts = {name: list(tensor.split(lengths)) for name, tensor in tensors.items()}
            return ConversationFeatures(conversations, parts["features"], parts.get("weights"))
    encoded = encode_conversations(conversations, encode, weigh=weigh)
    kept = {"features": torch.cat(encoded.features)}
    kept |= {} if encoded.weights is None else {"weights": torch.cat(encoded.weights)}
    checkpoint.save(path, kept, key)
    return encoded
