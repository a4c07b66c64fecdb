"""Batches: pure functions of the step, and features that always belong to their pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import FEATURES, SOURCE, TOKENS, conversations, draw, random_tree

from nmlib import config, data
from nmlib.config import SourceConfig
from nmlib.conversation import Conversation
from nmlib.data import ConversationFeatures
from nmlib.people import PeopleSource
from nmlib.photos import PhotoSource
from nmlib.sources import attribute_index, attribute_sizes
from nmlib.storage import save_conversations
from nmlib.world import WorldSource


def some() -> ConversationFeatures:
    """Ten conversations of two rounds and five of six, whose features are their number."""
    told = [random_tree(seed, 2) for seed in range(10)] + [random_tree(seed, 6) for seed in range(5)]
    return ConversationFeatures(told, [torch.full((len(c), TOKENS, FEATURES), float(i)) for i, c in enumerate(told)])


def encode(images: Tensor) -> Tensor:
    """Features that tell what they were made of: the mean of each colour."""
    return images.float().mean((2, 3))[:, None]  # (B, 1, 3)


# ---------------------------------------------------------------------------------------------------------
# sources


def test_a_params_file_opens_its_source() -> None:
    settings = [SourceConfig(kind="world", image_size=32), SourceConfig(kind="photos", image_size=32)]
    world, photos = map(data.open_source, settings)
    people = data.open_people(settings[0])
    assert type(world) is WorldSource and isinstance(people, PeopleSource) and isinstance(photos, PhotoSource)
    assert world.image_size == people.image_size == photos.image_size == 32


def test_attributes_are_found_by_name() -> None:
    assert attribute_index(SOURCE, "ground") == 1 and attribute_sizes(SOURCE) == (3, 2, 2)
    with pytest.raises(KeyError, match="source 'toy' has no attribute 'hat'; it has square, ground, edge"):
        attribute_index(SOURCE, "hat")


def test_pictures_are_those_of_their_truth_and_all_values_come() -> None:
    subjects, values, images = data.sample_pictures(SOURCE, 600, "heldout", data.step_generator(1, 2))
    assert torch.equal(images, SOURCE.render(subjects, values)) and (subjects[:, 0] > 0.75).all()
    for column, size in enumerate(attribute_sizes(SOURCE)):
        shares = values[:, column].bincount(minlength=size) / 600
        assert (shares - 1 / size).abs().max() < 0.08


def test_chance_is_a_function_of_seed_and_step() -> None:
    def drawn(seed: int, step: int) -> list[float]:
        return torch.rand(3, generator=data.step_generator(seed, step)).tolist()

    assert drawn(1, 2) == drawn(1, 2)
    assert len({tuple(drawn(seed, step)) for seed in range(5) for step in range(50)}) == 250


# ---------------------------------------------------------------------------------------------------------
# batches


def test_groups_and_take() -> None:
    found = some()
    assert found.groups() == {2: list(range(10)), 6: list(range(10, 15))}
    told, features = found.take([12, 10])
    assert told == [found.conversations[12], found.conversations[10]]
    assert features.shape == (2, 6, TOKENS, FEATURES) and features[:, 0, 0, 0].tolist() == [12.0, 10.0]


def test_a_batch_is_a_pure_function_of_step_and_seed() -> None:
    found = some()
    told, features = found.batch(3, 24, seed=5)
    again, same = found.batch(3, 24, seed=5)
    assert told == again and torch.equal(features, same)
    picks = {tuple(c.id for c in found.batch(step, 24, seed)[0]) for step in range(20) for seed in range(3)}
    assert len(picks) > 50


def test_batches_hold_about_as_many_pictures_as_asked_of_one_length() -> None:
    found, pictures = some(), {2: 0, 6: 0}
    for step in range(400):
        told, features = found.batch(step, 13, seed=0)
        length = len(told[0])
        assert {len(c) for c in told} == {length} and len(told) == 13 // length == len(features)
        pictures[length] += 1
    # 20 pictures in short conversations and 30 in long ones: drawn 2 to 3
    assert pictures[6] / 400 == pytest.approx(0.6, abs=0.08)
    assert len(found.batch(0, 1, seed=0)[0]) == 1, "at least one conversation"


# ---------------------------------------------------------------------------------------------------------
# features


def test_every_conversation_gets_the_features_of_its_pictures() -> None:
    told = [draw(c) for c in (*conversations(), conversations()[0].prefix(2))]
    found = data.encode_conversations(told, encode, chunk=3)
    assert [len(features) for features in found.features] == [4, 4, 2]
    for conversation, features in zip(told, found.features, strict=True):
        assert conversation.images is not None
        assert torch.equal(features, encode(conversation.images))


def test_features_are_computed_once_and_anew_when_encoder_or_pictures_change(tmp_path: Path) -> None:
    calls = []

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return encode(images)

    first, second = (draw(c) for c in conversations())
    save_conversations([first], tmp_path)
    kept = data.load_features(tmp_path, counted, "a")
    again = data.load_features(tmp_path, counted, "a")
    assert calls == [4] and torch.equal(again.features[0], kept.features[0])
    data.load_features(tmp_path, counted, "b")
    assert calls == [4, 4], "another encoder"
    save_conversations([second], tmp_path)
    found = data.load_features(tmp_path, counted, "b")
    assert calls == [4, 4, 4] and second.images is not None, "other pictures, as many as before"
    assert torch.equal(found.features[0], encode(second.images)) and found.conversations[0].id == "second"


def test_weights_are_kept_beside_the_features_and_follow_their_conversations(tmp_path: Path) -> None:
    calls = []

    def weigh(told: Conversation) -> Tensor:
        calls.append(told.id)
        return torch.full((len(told), 3), float(len(told.id)))

    told = [draw(c) for c in conversations()]
    save_conversations(told, tmp_path)
    assert data.load_features(tmp_path, encode, "a").take_weights([0]) is None
    for _ in range(2):
        found = data.load_features(tmp_path, encode, "a", weigh, "by length")
        weights = found.take_weights([1, 0])
        assert weights is not None and weights[:, 2, 1].tolist() == [6.0, 5.0] and weights.shape == (2, 4, 3)
    assert calls == ["first", "second"], "computed once"
    data.load_features(tmp_path, encode, "a", weigh, "otherwise")
    assert len(calls) == 4
    assert data.load_features(tmp_path, encode, "a").weights is None, "nobody asked for them"


def test_a_batch_is_taken_by_its_indices() -> None:
    found = some()
    indices = found.batch_indices(3, 24, seed=5)
    told, features = found.batch(3, 24, seed=5)
    assert told == [found.conversations[index] for index in indices] and features[:, 0, 0, 0].tolist() == indices


# ---------------------------------------------------------------------------------------------------------
# settings that the data must fit


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("data", {"rollback": {"conversations": 4, "rounds": [4, 17]}}),
        ("experiments", {"drift_rounds": 17}),
        ("experiments", {"depths": [1, 15]}),
    ],
)
def test_conversations_longer_than_the_model_counts_are_refused(tiny: dict[str, Any], part: str, change: Any) -> None:
    tiny[part] = tiny[part] | change
    with pytest.raises(config.ParamsError, match=r"model\.max_rounds is 16, but conversations have up to 17 rounds"):
        config.parse(tiny, "tiny.yaml")
    tiny["model"]["max_rounds"] = 17
    assert config.parse(tiny, "tiny.yaml").model.max_rounds == 17


def test_conversations_about_people_need_people_and_fit_the_model(tiny: dict[str, Any]) -> None:
    extra = {"conversations": 3, "rounds": [5, 17], "pairing": "same"}
    tiny["people"] |= {"more": extra}
    with pytest.raises(config.ParamsError, match=r"model\.max_rounds is 16, but conversations have up to 17 rounds"):
        config.parse(tiny, "tiny.yaml")
    extra["rounds"] = [5, 16]
    assert config.parse(tiny, "tiny.yaml").people["more"].pairing == "same"
    tiny["source"]["kind"] = "photos"
    with pytest.raises(config.ParamsError, match=r"data sets \[.*'more'.*\] show people; source\.kind is 'photos'"):
        config.parse(tiny, "tiny.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 80}, "vision: width 80 must be a multiple of 32"),
        ({"feature_dim": 30}, "vision: feature_dim 30 must be a multiple of heads 4 and of 4"),
        ({"tokens": 15}, "vision: tokens 15 is not a square number"),
    ],
)
def test_encoders_that_cannot_be_built_are_refused(tiny: dict[str, Any], changes: Any, message: str) -> None:
    tiny["vision"] |= changes
    with pytest.raises(config.ParamsError, match=message):
        config.parse(tiny, "tiny.yaml")
