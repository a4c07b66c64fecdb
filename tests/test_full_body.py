"""Whole bodies from faces: what is kept, why the rest is not, and pipelines and faces that cannot be used."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_clips import hue
from torch import Tensor
from toy import raised

from nmlib import phrases
from nmlib.config import DataConfig, FullBodyConfig, PeopleConfig
from nmlib.conversation import Conversation, ConversationError, Round, from_picture
from nmlib.faces import Face, Square
from nmlib.folder_clips import FolderClips
from nmlib.full_body import DiffusionEditor, FullBodyError, check_pipeline, open_pipeline, with_full_bodies
from nmlib.personalization import build_conversations
from nmlib.rollback import ConversationBuilder

SIDE = 40  # of what the pipeline makes; faces given are smaller
SETTINGS = FullBodyConfig(image_size=SIDE, prompts=("whole body", "in a street"), min_face=8, min_similarity=0.9)


def marked(colour: tuple[int, int, int], faces: int = 1, height: int = 8, side: int = SIDE) -> Image.Image:
    """A picture of one colour whose first pixel says how many faces there are and how high they are."""
    picture = Image.new("RGB", (side, side), colour)
    picture.putpixel((0, 0), (faces, height, 0))
    return picture


def detect(picture: Tensor) -> list[Face]:
    """As many faces of such a height as the first pixel says; all show the colour of the middle."""
    faces, height = int(picture[0, 0, 0]), float(picture[1, 0, 0])
    middle = picture.shape[-1] / 2
    return [Face((0.0, 2.0, height, 2.0 + height), Square(middle, middle, 4.0, 0.0))] * faces


class Result:
    def __init__(self, image: Image.Image) -> None:
        self.images = [image]


class Pipeline:
    """Gives the pictures it was made with, one after another, and notes what it was asked for."""

    def __init__(self, *pictures: Image.Image) -> None:
        self.pictures, self.asked = list(pictures), list[dict[str, Any]]()

    def __call__(self, prompt: str, image: Image.Image, generator: torch.Generator, steps: int = 1) -> Result:
        self.asked.append({"prompt": prompt, "image": image, "seed": generator.initial_seed(), "steps": steps})
        return Result(self.pictures[(len(self.asked) - 1) % len(self.pictures)])


RED, BLUE, DARK_RED = (220, 0, 0), (0, 0, 220), (120, 0, 0)


def introduced(*extra: Round) -> Conversation:
    """Anna is introduced by a red face of 16 pixels, then asked for."""
    rounds = (
        Round("this is anna", "introduce", name="anna"),
        Round("a picture of anna", "recall", 0, name="anna"),
        *extra,
    )
    face = from_picture(marked(RED, side=16), "a face")
    return Conversation("anna", "clips", rounds, torch.stack([face] * len(rounds))).validate()


def editor(*pictures: Image.Image, **changes: Any) -> tuple[DiffusionEditor, Pipeline]:
    pipeline = Pipeline(*pictures)
    return DiffusionEditor(pipeline, detect, hue, SETTINGS.model_copy(update=changes)), pipeline


def test_the_first_picture_that_passes_is_kept_and_the_others_are_counted() -> None:
    """Two faces, none, a tiny one, one that fills the picture, somebody blue; then a darker red one, who is Anna."""
    tries = [marked(RED, faces=2), marked(RED, faces=0), marked(RED, height=5), marked(RED, height=13), marked(BLUE)]
    made, pipeline = editor(*tries, marked(DARK_RED), attempts=7, arguments={"steps": 3})
    proposal = made.propose(introduced(), 0, random.Random(0))
    assert proposal is not None and proposal[0] is None and proposal[1] in SETTINGS.prompts
    assert made.counts == {
        "face too small": 1, "identity lost": 1, "kept": 1, "more than one face": 1, "no face": 1, "no whole body": 1,
    }  # fmt: skip
    found = [(row.reason, round(row.measured, 3), row.threshold) for row in made.rows]
    assert found[:5] == [
        ("more than one face", 2, 1), ("no face", 0, 1), ("face too small", 5, 8), ("no whole body", 13 / SIDE, 0.3),
        ("identity lost", 0.0, 0.9),
    ]  # fmt: skip
    assert found[5] == (None, 1.0, 0.9) and [row.attempt for row in made.rows] == [*range(6)]
    assert [asked["seed"] for asked in pipeline.asked] == [row.seed for row in made.rows]
    assert {asked["steps"] for asked in pipeline.asked} == {3} and pipeline.asked[0]["image"].size == (SIDE, SIDE)
    values, picture = made.apply(introduced(), 0, *proposal)
    assert values is None and picture is not None and picture.shape == (3, 16, 16)
    assert picture[:, 8, 8].tolist() == list(DARK_RED)


def test_nothing_is_proposed_where_nothing_passes() -> None:
    made, pipeline = editor(marked(BLUE), attempts=3)
    assert made.propose(introduced(), 0, random.Random(0)) is None
    assert made.counts == {"identity lost": 3} and len(pipeline.asked) == 3
    text = raised(lambda: made.apply(introduced(), 0, None, "whole body"), FullBodyError)
    assert text == "conversation 'anna', round 0: 'whole body' was never proposed"


def test_a_builder_of_conversations_takes_it_as_any_editor() -> None:
    made, _ = editor(marked(DARK_RED))
    builder = ConversationBuilder((), made, DataConfig(conversations=1, rounds=(4,)), "any")
    longer = builder.edit(introduced(), 1, random.Random(1))
    assert longer.rounds[-1].instruction in SETTINGS.prompts and longer.rounds[-1].base == 1
    assert longer.images is not None and longer.images[-1, :, 8, 8].tolist() == list(DARK_RED)
    longer.validate()


def test_recalls_become_requests_for_the_whole_body() -> None:
    """The recall shows the picture made, and says so; one that something starts from, or that failed, stays."""
    made, _ = editor(marked(DARK_RED))
    told = introduced()
    changed = with_full_bodies([told], made, 1.0, 0, "train")[0].validate()
    assert changed.rounds[1].named == ("framing",) and "anna" in changed.rounds[1].instruction
    assert changed.images is not None and changed.images[1, :, 8, 8].tolist() == list(DARK_RED)
    assert changed.rounds[1].face == (0.0, 2 / SIDE, 8 / SIDE, 10 / SIDE), "where the face of the new picture is"
    assert told.images is not None and told.images[1, :, 8, 8].tolist() == list(RED), "the old one is as it was"
    assert with_full_bodies([told], made, 0.0, 0, "train") == [told]
    followed = introduced(Round("make it dark", "edit", 1))
    assert with_full_bodies([followed], made, 1.0, 0, "train") == [followed]
    refused, _ = editor(marked(BLUE))
    assert with_full_bodies([told], refused, 1.0, 0, "train") == [told] and refused.counts == {"identity lost": 4}
    text = raised(lambda: with_full_bodies([told], made, 1.5, 0, "train"), ConversationError)
    assert text == "share 1.5: expected a share of the recalls, from 0 to 1"


def test_words_are_of_the_split() -> None:
    made, _ = editor(marked(DARK_RED))
    for split in ("train", "heldout"):
        said = [with_full_bodies([introduced()], made, 1.0, seed, split)[0].rounds[1].instruction for seed in range(6)]
        assert {phrases.is_heldout(phrases.without_name(text, "anna")) for text in said} == {split == "heldout"}
        assert len(set(said)) > 1


def test_conversations_of_clips_get_whole_bodies(tmp_path: Path) -> None:
    """From folders of frames to conversations in which some recalls show the body; each still shows its person."""
    for number in range(24):
        for frame in range(3):
            path = tmp_path / f"person-{number:02d}" / f"{frame}.png"
            path.parent.mkdir(exist_ok=True)
            marked((200, 10 * frame, 0), side=16).save(path)
    clips = FolderClips(tmp_path, 16)
    settings = PeopleConfig(conversations=6, rounds=(4,), pairing="paired", people=(1,), describe_share=0.0)
    told = build_conversations(clips, settings, seed=1, split="train")
    made, _ = editor(marked((190, 20, 0)))
    changed = with_full_bodies(told, made, 1.0, 0, "train")
    asked = [item for c in changed for item in c.rounds if item.named == ("framing",)]
    assert len(asked) == made.counts["kept"] > 0
    for conversation in changed:
        conversation.validate()


def test_an_introduction_without_a_face_is_passed_over_and_the_others_keep_their_bodies() -> None:
    """A person whose face cannot be found costs nobody else the picture that was made."""
    blank = from_picture(marked(BLUE, faces=0, side=16), "a picture")
    told = introduced(Round("this is bob", "introduce", name="bob"), Round("a picture of bob", "recall", 2, name="bob"))
    assert told.images is not None
    told.images[2] = blank
    made, _ = editor(marked(RED))
    (changed,) = with_full_bodies([told], made, 1.0, 0, "train")
    assert [item.named for item in changed.rounds] == [(), ("framing",), (), ()] and made.counts == {"kept": 1}
    assert made.passed_over == ["conversation 'anna', round 2: 0 faces; expected one, whose body is to be made"]


def test_what_was_made_is_written_down(tmp_path: Path) -> None:
    made, _ = editor(marked(BLUE), marked(DARK_RED))
    made.propose(introduced(), 0, random.Random(0))
    made.save(tmp_path / "bodies.json")
    read = json.loads((tmp_path / "bodies.json").read_text())
    assert read["counts"] == {"identity lost": 1, "kept": 1} and read["settings"]["image_size"] == SIDE
    assert [row["reason"] for row in read["pictures"]] == ["identity lost", None]


def test_faces_that_cannot_be_given() -> None:
    made, _ = editor(marked(RED))
    told = introduced()
    assert told.images is not None
    blank = Conversation("anna", "clips", told.rounds, torch.zeros_like(told.images))
    text = raised(lambda: made.propose(blank, 0, random.Random(0)), FullBodyError)
    assert text == "conversation 'anna', round 0: 0 faces; expected one, whose body is to be made"
    unseen = Conversation("anna", "clips", told.rounds)
    text = raised(lambda: made.propose(unseen, 0, random.Random(0)), FullBodyError)
    assert text == "conversation 'anna' has no pictures; whole bodies are made from faces"


def test_pipelines_that_cannot_be_used(tmp_path: Path) -> None:
    text = raised(lambda: open_pipeline(tmp_path), FullBodyError)
    assert text == f"{tmp_path}: no pipeline here (no model_index.json); give a folder that diffusers saved"
    (tmp_path / "model_index.json").write_text("{}")
    assert raised(lambda: open_pipeline(tmp_path), FullBodyError).startswith(f"{tmp_path}: damaged or incomplete (")

    class Words:
        def __call__(self, prompt: str) -> None: ...

    text = raised(lambda: check_pipeline(Words()), FullBodyError)
    assert text.startswith("Words takes no image; expected a pipeline that edits a picture by a prompt")
    with pytest.raises(FullBodyError, match="Words takes no image"):
        DiffusionEditor(Words(), detect, hue, SETTINGS)
