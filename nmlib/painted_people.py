"""Conversations about the people of real clips with edits, ways back and new names between the recalls (paper, data 2).

Nobody can draw another state of a photograph, so a diffusion pipeline paints the edits. A painted picture is kept where
the person in it is still the same; where none is, somebody is asked for by name instead.
"""

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nmlib import phrases
from nmlib.config import DataConfig, FullBodyConfig, PeopleConfig
from nmlib.conversation import Box, Conversation, ConversationError, Edit
from nmlib.faces import DlibEmbedder, FaceDetector
from nmlib.folder_clips import FolderClips
from nmlib.full_body import DiffusionEditor, GivenFaceError
from nmlib.names import names
from nmlib.personalization import Cast, PeopleBuilder
from nmlib.rollback import ConversationBuilder

EDITS = (
    "make the background a sunny beach",
    "make the background a dark forest",
    "put a plain blue wall behind",
    "put a plain red wall behind",
    "put a bookshelf behind",
    "add a pair of glasses",
    "add sunglasses",
    "add a straw hat",
    "add a red woollen cap",
    "make the hair blonde",
    "make the hair black",
    "turn the jacket green",
    "make it a black and white photograph",
    "make it look like an oil painting",
    "light it with a warm evening sun",
    "let it snow",
)
PORTRAIT = FullBodyConfig(image_size=512, prompts=EDITS, attempts=2, max_face_share=1.0)


def portrait_editor(pipeline: Any, side: int) -> DiffusionEditor:
    """Paints edits of faces with a pipeline, and keeps those that dlib's network takes for the same person.

    Args:
        pipeline: of `full_body.open_pipeline`.
        side: pixels a side of what it is asked for.
    """
    settings = PORTRAIT.model_copy(update={"image_size": side})
    return DiffusionEditor(pipeline, FaceDetector(), DlibEmbedder(), settings)


class _Careful:
    """An `Editor` that passes over pictures without exactly one face, and knows where the face of the last edit is."""

    def __init__(self, editor: DiffusionEditor) -> None:
        self.editor = editor
        self.face: Box | None = None

    def propose(self, conversation: Conversation, base: int, rng: random.Random) -> tuple[Edit | None, str] | None:
        try:
            return self.editor.propose(conversation, base, rng)
        except GivenFaceError as error:
            self.editor.passed_over.append(str(error))
            return None

    def apply(
        self, conversation: Conversation, base: int, edit: Edit | None, clause: str
    ) -> tuple[tuple[int, ...] | None, Tensor | None]:
        self.face = self.editor.face(conversation, base, clause)
        return self.editor.apply(conversation, base, edit, clause)


class PaintedPeopleBuilder(PeopleBuilder):
    """A `PeopleBuilder` for clips of which pixels alone are known.

    Args:
        source: clips.
        settings: lengths, shares and pairing.
        split: `train` or `heldout`.
        editor: paints edits.
    """

    def __init__(self, source: FolderClips, settings: PeopleConfig, split: str, editor: DiffusionEditor) -> None:
        super().__init__(source, settings, split)
        self.painter = _Careful(editor)
        self.edits = ConversationBuilder((), self.painter, DataConfig(conversations=1, rounds=(2,), max_depth=3), split)

    def edit(self, conversation: Conversation, rng: random.Random) -> Conversation | None:
        """Paint an edit of the last picture; None where nothing that was painted is kept, or only a face is shown."""
        last = len(conversation) - 1
        if not self._editable(conversation, last):
            return None
        try:
            return self._placed(self.edits.edit(conversation, last, rng), self.painter.face)
        except ConversationError:  # nothing was kept
            return None

    def roll_back(self, conversation: Conversation, rng: random.Random) -> Conversation | None:
        """Go back to an earlier picture, with or without an edit; None if there is none to go back to."""
        self.painter.face = None
        made = super().roll_back(conversation, rng)
        if made is None:
            return None
        base = made.rounds[-1].base
        assert base is not None
        return self._placed(made, self.painter.face or made.rounds[base].face)

    def rename(self, conversation: Conversation, who: Cast, rng: random.Random) -> Conversation | None:
        """Call the person shown otherwise from now on, and edit the picture; None if that cannot be done."""
        last = len(conversation) - 1
        if conversation.path(last)[0] not in conversation.people(len(conversation)).values():
            return None
        made = self.edit(conversation, rng)
        if made is None:
            return None
        name, command = who.unused.pop(), made.rounds[-1].instruction
        text = phrases.rename_sentence(rng, name, lambda: command, self.split)
        renamed = replace(made.rounds[-1], instruction=text, name=name)
        return replace(made, rounds=(*made.rounds[:-1], renamed))

    def _editable(self, conversation: Conversation, index: int) -> bool:
        return not (self.settings.pairing == "masked" and conversation.rounds[index].kind == "introduce")

    @staticmethod
    def _placed(conversation: Conversation, face: Box | None) -> Conversation:
        """The same conversation, and where the face in its last picture is."""
        return replace(conversation, rounds=(*conversation.rounds[:-1], replace(conversation.rounds[-1], face=face)))


def paint_conversation(
    source: FolderClips, settings: PeopleConfig, editor: DiffusionEditor, *, seed: int, split: str, id_: str
) -> Conversation:
    """Draw one conversation about people of clips, as `personalization.build_conversations` does without a painter.

    Args:
        source: clips.
        settings: lengths, shares and pairing.
        editor: of `portrait_editor`.
        seed: of people, names, edits and words.
        split: `train` or `heldout`: people, names and phrasings.
        id_: of the conversation.
    """
    rng = random.Random(f"{seed}.{split}")
    people, rounds = rng.choice(settings.people), rng.choice(settings.rounds)
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    clips = source.clips(people + (settings.reintroduce_share > 0), split, generator, settings.look_alike_distance)
    known = list(names(split))
    rng.shuffle(known)
    who, builder = Cast(clips, people, known), PaintedPeopleBuilder(source, settings, split, editor)
    conversation = Conversation(id_, source.name, ())
    while len(conversation) < rounds - 1:
        conversation = builder.extend(conversation, who, rng)
    return builder.recall_somebody(conversation, who, rng) or builder.extend(conversation, who, rng)
