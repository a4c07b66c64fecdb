"""Conversations about people: names stand for who they say, recalls show what is asked, controls change names alone."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy import raised

from nmlib import layout, name_controls, personalization, phrases
from nmlib.config import PeopleConfig
from nmlib.conversation import Conversation, ConversationError, Round
from nmlib.face_region import GREY
from nmlib.folder_clips import BOXES, FolderClips
from nmlib.layout import Template
from nmlib.names import NAMES, names
from nmlib.people import PeopleSource
from nmlib.rollback import is_heldout_state
from nmlib.runtime import write_json
from nmlib.sources import attribute_index
from nmlib.world import is_heldout
from nmlib.world_portrait import IDENTITY, SUBJECT

SOURCE = PeopleSource(32)
PLACES = {attribute.name: place for place, attribute in enumerate(SOURCE.attributes)}
TOKENIZER = layout.build_tokenizer(SOURCE.attributes, 4, 16, SOURCE.names)
PAIRINGS, SPLITS = st.sampled_from(["same", "masked", "paired"]), st.sampled_from(["train", "heldout"])
seeds = st.integers(0, 10**6)


def config(pairing: str = "paired", **changes: Any) -> PeopleConfig:
    given_: dict[str, Any] = {"conversations": 2, "rounds": (5, 9, 12), "pairing": pairing, "rename_share": 0.15}
    given_ |= {"describe_share": 0.0 if pairing == "masked" else 0.3, "reintroduce_share": 0.1}
    return PeopleConfig(**(given_ | changes))


def build(pairing: str = "paired", seed: int = 0, split: str = "train", **changes: Any) -> list[Conversation]:
    return personalization.build_conversations(SOURCE, config(pairing, **changes), seed=seed, split=split)


# ---------------------------------------------------------------------------------------------------------
# whole data sets


@settings(max_examples=60, deadline=None)
@given(seed=seeds, pairing=PAIRINGS, split=SPLITS)
def test_every_conversation_is_true_to_its_names(seed: int, pairing: str, split: str) -> None:
    for told in build(pairing, seed, split):
        told.validate()
        last = len(told) - 1
        assert len(told) in (5, 9, 12) and told.rounds[0].name is not None
        assert told.rounds[last].kind == "recall" or min(last - base for base in told.people(last).values()) > 8
        newest: dict[str, int] = {}  # restated: who was introduced last by a name, or got it from somebody
        for index, item in enumerate(told.rounds):
            if item.kind in ("introduce", "describe"):
                newest[item.name or ""] = index
            elif item.kind == "edit" and item.name is not None:
                shown = told.path(index)[0]
                old = [name for name, base in newest.items() if base == shown]
                assert len(old) == 1 and item.name not in newest
                newest[item.name] = newest.pop(old[0])
            elif item.kind == "recall":
                assert item.base == newest[item.name or ""] and 1 <= index - item.base <= 8
                base = told.rounds[item.base]
                assert item.subject == base.subject and item.subject is not None


@settings(max_examples=60, deadline=None)
@given(seed=seeds, pairing=PAIRINGS, split=SPLITS)
def test_a_recall_says_all_that_differs_and_nothing_wrong(seed: int, pairing: str, split: str) -> None:
    for told in build(pairing, seed, split):
        for item in told.rounds:
            if item.kind != "recall":
                continue
            assert item.base is not None and item.values is not None
            start = told.rounds[item.base].values
            assert start is not None
            said = f" {phrases.without_name(item.instruction, item.name)} "
            for place, attribute in enumerate(SOURCE.attributes):
                word = attribute.values[item.values[place]]
                if attribute.name in item.named:
                    assert any(f" {detail} " in said for detail in attribute.details[word]), (attribute.name, said)
                else:
                    assert item.values[place] == start[place], f"{attribute.name} was not said, and stays"
            assert set(personalization.ALWAYS[pairing]) <= set(item.named)  # type: ignore[index]
            if pairing == "same":
                assert item.values == start
            assert bool({"framing", "pose"} & set(item.named)) == (pairing == "paired")


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_paired_views_differ_from_the_introduction(seed: int) -> None:
    view = slice(len(IDENTITY), len(SUBJECT))
    for told in build("paired", seed):
        for item in told.rounds:
            if item.kind == "recall" and item.base is not None:
                base = told.rounds[item.base]
                pair = torch.tensor([item.subject, base.subject]), torch.tensor([item.values, base.values])
                viewed = SOURCE.viewed(*pair)
                assert (viewed[0, view] != viewed[1, view]).any()
                assert torch.equal(viewed[0, : len(IDENTITY)], viewed[1, : len(IDENTITY)])


def test_somebodys_own_hair_is_asked_for_only_where_it_was_seen() -> None:
    hair, count = attribute_index(SOURCE, "hair"), 0
    for told in build("paired", 3, conversations=60):
        for item in told.rounds:
            if item.kind == "recall" and item.base is not None and item.values and item.values[hair] == 0:
                start = told.rounds[item.base].values
                assert start is not None and start[hair] == 0
                count += "hair" in item.named
    assert count


def test_splits_share_no_name_no_person_and_no_phrasing() -> None:
    for split in ("train", "heldout"):
        for told in build("paired", 1, split, conversations=40):
            for item in told.rounds:
                assert item.name is None or item.name in names(split)
                assert is_heldout(torch.tensor([item.subject])).item() == (split == "heldout")
                sentence = phrases.without_name(item.instruction, item.name)
                assert phrases.is_heldout(sentence) == (split == "heldout"), sentence
                assert split == "heldout" or not is_heldout_state(item.values or ())
                assert set(item.instruction.split()) & set(NAMES) == ({item.name} if item.name else set())


def test_everything_happens_and_shares_are_settings() -> None:
    made = build("paired", 2, conversations=120, full_body_share=0.4)
    kinds = {(item.kind, item.name is not None) for told in made for item in told.rounds}
    assert kinds == {
        ("introduce", True), ("describe", True), ("recall", True), ("edit", False), ("edit", True), ("rollback", False)
    }  # fmt: skip
    recalls = [(i, item) for told in made for i, item in enumerate(told.rounds) if item.kind == "recall"]
    assert {index - (item.base or 0) for index, item in recalls} == set(range(1, 9))
    framed = [item.values[PLACES["framing"]] == 3 for _, item in recalls if "framing" in item.named and item.values]
    assert 0.3 < sum(framed) / len(framed) < 0.5
    assert {max(len(told.people(index)) for index in range(len(told))) for told in made} == {1, 2, 3}
    none = build(
        "paired", 2, conversations=30, rename_share=0.0, reintroduce_share=0.0, describe_share=0.0, people=(2,)
    )
    introduced = [[item.name for item in told.rounds if item.kind == "introduce"] for told in none]
    assert all(len(set(found)) == len(found) <= 2 for found in introduced)
    assert not any(item.name and item.kind in ("edit", "describe") for told in none for item in told.rounds)


def test_a_seed_gives_the_same_conversations_and_another_one_others() -> None:
    assert build(seed=4) == build(seed=4) != build(seed=5)


def test_the_tokenizer_knows_every_sentence_and_names_are_single_words() -> None:
    for split in ("train", "heldout"):
        for told in build("paired", 6, split, conversations=30):
            for item in told.rounds:
                words = TOKENIZER.tokenize(item.instruction)
                assert layout.UNK not in words and " ".join(words) == item.instruction


def test_look_alikes_look_alike() -> None:
    for told in build("paired", 1, look_alike_distance=0.4, people=(3,), reintroduce_share=0.0, conversations=5):
        people = torch.tensor([i.subject for i in told.rounds if i.kind in ("introduce", "describe")])
        apart = torch.cdist(people[:, : len(IDENTITY)], people[:, : len(IDENTITY)])
        assert apart.max() <= 0.81 and (len(people) == 1 or apart.max() > 0.39)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"recall_share": 0.9, "rollback_share": 0.3}, "add up to 1.45; expected at most 1"),
        ({"pairing": "masked", "describe_share": 0.1}, "set it to 0 with pairing 'masked'"),
        ({"rounds": (3, 8), "people": (3,)}, "the shortest conversation of 3 rounds has room for 2"),
    ],
)
def test_settings_that_contradict_themselves(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        config(**changes)


# ---------------------------------------------------------------------------------------------------------
# probes


@pytest.mark.parametrize(("people", "delay"), [(1, 1), (3, 1), (2, 6)])
def test_probes_have_one_shape_and_are_held_out(people: int, delay: int) -> None:
    made = personalization.probe_conversations(SOURCE, config(conversations=7), people=people, delay=delay)
    for told in made:
        told.validate()
        brought = [item.is_brought for item in told.rounds]
        assert brought == [True] * people + [False] * delay and told.rounds[-1].kind == "recall"
        assert {item.name for item in told.rounds if item.name} <= set(names("heldout"))
        assert is_heldout(torch.tensor([item.subject for item in told.rounds])).all()
    assert {told.rounds[-1].base for told in made} == set(range(people))


# ---------------------------------------------------------------------------------------------------------
# pictures


def test_masked_introductions_show_the_face_alone_and_targets_show_all() -> None:
    made = build("masked", 3, conversations=4)
    masked, whole = (personalization.with_images(SOURCE, made, pairing) for pairing in ("masked", "paired"))
    for told, full in zip(masked, whole, strict=True):
        assert told.images is not None and full.images is not None
        for index, item in enumerate(told.rounds):
            if item.kind != "introduce":
                assert torch.equal(told.images[index], full.images[index])
                continue
            state = torch.tensor([item.subject]), torch.tensor([item.values])
            left, top, right, bottom = SOURCE.face_boxes(*state)[0].tolist()
            for y in range(32):
                for x in range(32):
                    inside = left <= x + 0.5 < right and top <= y + 0.5 < bottom
                    expected = full.images[index, :, y, x].tolist() if inside else [GREY] * 3
                    assert told.images[index, :, y, x].tolist() == expected


def test_masked_faces_are_never_edited() -> None:
    for told in build("masked", 3, conversations=40):
        for item in told.rounds:
            if item.kind in ("edit", "rollback") and item.base is not None:
                assert told.rounds[item.base].kind != "introduce"


def test_face_weights_of_a_conversation() -> None:
    told = build("paired", 0)[0]
    weights = personalization.face_weights(SOURCE, 16, 4.0)(told)
    assert weights.shape == (len(told), 16)
    torch.testing.assert_close(weights.mean(1), torch.ones(len(told)))
    assert (weights[:, [5, 6]] > weights[:, [12, 15]]).all(), "a face is in the middle, rarely in the lower corners"


# ---------------------------------------------------------------------------------------------------------
# what the model reads


def test_introductions_are_read_as_uploads_and_recalls_answered_by_the_picture_they_start_from() -> None:
    told = build("paired", 9, conversations=30, describe_share=0.0)
    template = Template(TOKENIZER, 4, "grounded")
    for conversation in told:
        supervised = template.packed([conversation]).queries[:, 1].tolist()
        assert supervised == [index for index, item in enumerate(conversation.rounds) if not item.is_brought]
        for index, item in enumerate(conversation.rounds):
            if item.kind == "recall" and item.base is not None:
                reply = TOKENIZER.decode(template.reply(conversation, index))
                assert reply == f"said {item.name} #{item.base + 1} to #{index + 1} <img>"
                assert phrases.base_of_response(reply.removesuffix(" <img>"), index) == item.base
            if item.kind == "introduce":
                assert TOKENIZER.decode(template.closing(conversation, index)) == f"</img> {item.instruction} [/INST]"


# ---------------------------------------------------------------------------------------------------------
# controls


@settings(max_examples=30, deadline=None)
@given(seed=seeds, pairing=PAIRINGS)
def test_renaming_twice_is_composition_and_changes_names_alone(seed: int, pairing: str) -> None:
    told, rng = build(pairing, seed)[0], random.Random(seed)
    used = sorted({item.name for item in told.rounds if item.name})
    first = dict(zip(used, rng.sample(NAMES, len(used)), strict=True))
    second = dict(zip(first.values(), rng.sample(NAMES, len(used)), strict=True))
    once = name_controls.rename_everybody(told, first)
    twice = name_controls.rename_everybody(once, second)
    assert twice == name_controls.rename_everybody(told, {name: second[first[name]] for name in used})
    once.validate()
    for before, after in zip(told.rounds, once.rounds, strict=True):
        assert phrases.without_name(before.instruction, before.name) == phrases.without_name(
            after.instruction, after.name
        )
        assert replace(before, name=None, instruction="") == replace(after, name=None, instruction="")
    back = name_controls.rename_everybody(once, {new: old for old, new in first.items()})
    assert back == told


def test_two_people_cannot_get_one_name() -> None:
    told = next(told for told in build("paired", 0, conversations=20) if len(told.people(12)) > 1)
    pair = sorted({item.name for item in told.rounds if item.name})[:2]
    text = raised(lambda: name_controls.rename_everybody(told, {pair[0]: pair[1]}), ConversationError)
    assert text == f"conversation {told.id!r}: two people would be called {pair[1]!r}"


def test_shuffled_names_do_not_say_who_and_pictures_stay() -> None:
    right, total = 0, 0
    made = personalization.probe_conversations(SOURCE, config(conversations=150), people=3, delay=1)
    for number, told in enumerate(made):
        shuffled = name_controls.shuffle_names(told, torch.Generator().manual_seed(number))
        for before, after in zip(told.rounds, shuffled.rounds, strict=True):
            if before.kind != "recall":
                assert after == before
            assert replace(before, name=None, instruction="") == replace(after, name=None, instruction="")
            assert after.name is None or after.name in after.instruction.split()
        last = shuffled.rounds[-1]
        right += shuffled.introduction(last.name or "", len(told) - 1) == last.base
        total += 1
    assert 0.2 < right / total < 0.47, "one in three by chance"


# ---------------------------------------------------------------------------------------------------------
# faces from folders


@pytest.fixture
def folder(tmp_path: Path) -> FolderClips:
    """People of three frames; a frame's colour is (person, frame, 7)."""
    for number in range(40):
        (tmp_path / f"id{number:02d}").mkdir()
        for frame in range(3):
            Image.new("RGB", (8, 8), (number, frame, 7)).save(tmp_path / f"id{number:02d}" / f"{frame}.png")
    return FolderClips(tmp_path, 8)


@pytest.mark.parametrize("pairing", ["same", "masked", "paired"])
def test_rounds_of_clips_say_where_the_face_is(folder: FolderClips, pairing: str) -> None:
    """Every frame has a face of its own place; a face that fills the last of four tokens weighs 3 beside 1, 1 and 1."""
    boxes = [(0.5, 0.5, 1.0, 1.0), (0.0, 0.0, 0.25, 0.25), (0.25, 0.5, 0.5, 0.75)]
    for person in folder.people:
        write_json(person / BOXES, {f"{frame}.png": box for frame, box in enumerate(boxes)})
    made = personalization.build_conversations(folder, config(pairing, people=(1,)), seed=0, split="train")
    seen = set()
    for told in made:
        assert told.images is not None
        weights = personalization.face_weights(SOURCE, 4, 3.0)(told)
        for index, item in enumerate(told.rounds):
            if pairing != "masked" or item.kind != "introduce":
                assert item.face == boxes[int(told.images[index, 1, 0, 0])]
            if item.face == boxes[0]:
                torch.testing.assert_close(weights[index], torch.tensor([1.0, 1.0, 1.0, 3.0]) / 1.5)
            seen.add(item.face)
    assert seen == set(boxes)


def test_a_round_without_a_face_weighs_all_tokens_alike() -> None:
    told = Conversation("c", "clips", (Round("this is ada", "introduce", name="ada"),))
    assert torch.equal(personalization.found_face_weights(told, 9, 5.0), torch.ones(1, 9))


@pytest.mark.parametrize("pairing", ["same", "paired"])
def test_folders_of_frames_give_pictures_of_the_right_person(folder: FolderClips, pairing: str) -> None:
    made = personalization.build_conversations(
        folder, config(pairing, conversations=25, people=(1, 2)), seed=0, split="train"
    )
    assert any(len(told.people(len(told))) == 2 for told in made)
    for told in made:
        told.validate()
        assert told.images is not None and told.images.shape == (len(told), 3, 8, 8)
        for index, item in enumerate(told.rounds):
            assert item.kind in ("introduce", "recall") and item.values is item.subject is None
            if item.kind == "recall" and item.base is not None:
                (person, frame), (first, start) = (told.images[i, :2, 0, 0].tolist() for i in (index, item.base))
                assert person == first and (frame == start) == (pairing == "same")


def test_masks_of_frames_need_boxes(folder: FolderClips) -> None:
    text = raised(
        lambda: personalization.build_conversations(folder, config("masked", people=(1,)), seed=0, split="train"),
        ConversationError,
    )
    assert text == "source 'clips': pairing 'masked' needs face boxes, which it has not"
