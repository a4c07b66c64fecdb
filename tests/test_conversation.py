"""Conversations: trees, names and whom they stand for, pictures, and what contradicts itself."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image
from toy import conversations, draw, make_round, raised

from nmlib import conversation as stored
from nmlib.conversation import Conversation, ConversationError, Round

# ---------------------------------------------------------------------------------------------------------
# trees


def hand_made() -> Conversation:
    """0 - 1 - 2, then back to 0 (3), on from there (4), back to 2 (5)."""
    rounds = [make_round("upload", "here is a picture")]
    for base, kind in ((0, "edit"), (1, "edit"), (0, "rollback"), (3, "edit"), (2, "rollback")):
        rounds.append(make_round(kind, "change something", base))  # type: ignore[arg-type]
    return Conversation("hand", "toy", tuple(rounds)).validate()


def test_path_children_and_depth_by_hand() -> None:
    told = hand_made()
    assert [told.path(index) for index in range(6)] == [(0,), (0, 1), (0, 1, 2), (0, 3), (0, 3, 4), (0, 1, 2, 5)]
    assert [told.children(index) for index in range(6)] == [(1, 3), (2,), (5,), (4,), (), ()]
    assert [told.depth(index) for index in range(6)] == [0, 0, 0, 2, 0, 2]
    assert not told.is_markov and told.prefix(3).is_markov
    assert len(told) == 6 and len(told.prefix(3)) == 3


def test_prefix_takes_its_pictures_along() -> None:
    told = draw(conversations()[0])
    assert told.images is not None
    assert torch.equal(told.prefix(2).images, told.images[:2])  # type: ignore[arg-type]


def test_pictures_there_and_back() -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    assert torch.equal(stored.from_picture(stored.to_picture(image), "x"), image)
    assert torch.equal(stored.from_picture(stored.to_picture(image / 255), "x"), image)
    beyond = torch.tensor([-0.5, 0.0, 2.0])[:, None, None].expand(3, 2, 2)
    assert stored.from_picture(stored.to_picture(beyond), "x")[:, 0, 0].tolist() == [0, 0, 255]
    grey = Image.new("L", (7, 5), 9)
    assert stored.from_picture(grey, "x").shape == (3, 5, 7)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_taken_sideways_is_set_upright_once(kind: str) -> None:
    """Red is on the left in the file and above in the photograph, and the given picture stays as it is."""
    lying = Image.new("RGB", (32, 16), "blue")
    lying.paste("red", (0, 0, 16, 16))
    with Image.open(io.BytesIO(sideways(lying, kind))) as opened:
        upright = stored.from_picture(opened, "x").float()
        assert torch.equal(stored.from_picture(opened, "x").float(), upright)
    assert upright.shape == (3, 32, 16)
    assert (upright[0, :12] > 200).all() and (upright[2, :12] < 50).all() and (upright[2, 20:] > 200).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0no such header"])
def test_a_picture_with_damaged_exif_is_taken_as_it_lies(exif: bytes) -> None:
    file = io.BytesIO()
    Image.new("RGB", (7, 5), "red").save(file, "PNG", exif=exif)
    with Image.open(file) as opened:
        assert stored.from_picture(opened, "x").shape == (3, 5, 7)


def test_a_huge_picture_taken_sideways_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_IMAGE_PIXELS", 34)
    with Image.open(io.BytesIO(sideways(Image.new("RGB", (7, 5)), "JPEG"))) as opened:
        monkeypatch.setattr(opened, "load", lambda: pytest.fail("was decoded"))
        text = raised(lambda: stored.from_picture(opened, "x"), ConversationError)
    assert text == "x: image is 7 x 5; at most 34 pixels"


def sideways(picture: Image.Image, kind: str) -> bytes:
    """A file of a picture that asks to be turned by a quarter to the right."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture.save(file, kind, exif=exif)
    return file.getvalue()


def test_validate_counts_pictures() -> None:
    told = replace(conversations()[0], images=torch.zeros(3, 3, 2, 2, dtype=torch.uint8))
    assert raised(told.validate, ConversationError) == "conversation 'first': 3 images for 4 rounds"
    text = raised(lambda: told.validate("my.json: row 3"), ConversationError)
    assert text == "my.json: row 3: 3 images for 4 rounds"


# ---------------------------------------------------------------------------------------------------------
# names


def said(kind: str, text: str, base: int | None = None, name: str | None = None) -> Round:
    return replace(make_round(kind, text, base), name=name)  # type: ignore[arg-type]


def named() -> Conversation:
    """Ada and Bo; Ada is edited and called Cy; Bo gets another picture; both are asked for."""
    rounds = (
        said("introduce", "this is ada", name="ada"),
        said("describe", "a picture of bo with a hat", name="bo"),
        said("recall", "ada smiling", 0, "ada"),
        said("edit", "make the wall red", 2),
        said("edit", "call her cy and add a hat", 3, "cy"),
        said("introduce", "here is bo", name="bo"),
        said("recall", "a close up of bo", 5, "bo"),
        said("recall", "cy on a blue wall", 0, "cy"),
    )
    return Conversation("named", "toy", rounds).validate()


def test_names_stand_for_the_newest_introduction_and_follow_a_person_who_is_renamed() -> None:
    told = named()
    assert told.people(0) == {}
    assert told.people(4) == {"ada": 0, "bo": 1}
    assert told.people(5) == {"cy": 0, "bo": 1}, "the original picture, and the old name is gone"
    assert told.people(8) == {"cy": 0, "bo": 5}
    assert told.introduction("bo", 5) == 1 and told.introduction("bo", 6) == 5 and told.introduction("ada", 5) is None
    assert [item.is_brought for item in told.rounds] == [True, False, False, False, False, True, False, False]
    assert told.path(4) == (0, 2, 3, 4) and told.depth(7) == 6


def test_naming_whom_nobody_introduced_makes_their_first_picture_stand_for_them() -> None:
    rounds = (
        said("upload", "here"),
        said("edit", "hat", 0),
        said("edit", "call him bo", 1, "bo"),
        said("recall", "bo", 0, "bo"),
    )
    assert Conversation("late", "toy", rounds).validate().people(3) == {"bo": 0}


@pytest.mark.parametrize(
    ("index", "item", "text"),
    [
        (
            2,
            said("recall", "cy", 0, "cy"),
            "round 2: field 'name' is 'cy', whom nobody introduced; names known: ada, bo",
        ),
        (
            7,
            said("recall", "ada", 0, "ada"),
            "round 7: field 'name' is 'ada', whom nobody introduced; names known: bo, cy",
        ),
        (6, said("recall", "bo", 1, "bo"), "round 6: field 'base' is 1; expected 5, the picture that 'bo' stands for"),
        (
            2,
            said("recall", "ada", 1, "ada"),
            "round 2: field 'base' is 1; expected 0, the picture that 'ada' stands for",
        ),
        (
            0,
            said("upload", "this is ada", name="ada"),
            "round 0: field 'name' is 'ada'; a round of kind 'upload' has none",
        ),
        (0, said("introduce", "this is adam", name="ada"), "round 0: field 'name' is 'ada'; expected a word of the"),
        (0, said("introduce", "this is ada"), "round 0: field 'name' is empty; a round of kind 'introduce' needs one"),
        (0, said("introduce", "ada", 0, "ada"), "round 0: field 'base' is 0; a round of kind 'introduce' has none"),
        (2, said("recall", "ada", None, "ada"), "round 2: field 'base' is None; expected an earlier round, 0 to 1"),
    ],
)
def test_names_that_contradict_the_conversation(index: int, item: Round, text: str) -> None:
    rounds = list(named().rounds)
    rounds[index] = item
    message = raised(Conversation("named", "toy", tuple(rounds)).validate, ConversationError)
    assert message.startswith(f"conversation 'named', {text}")
