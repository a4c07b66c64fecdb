"""Whole bodies from faces: pictures that a diffusion pipeline makes, kept where the person is still the same.

Photographs of faces show no body, so the paper synthesises some. `DiffusionEditor` is an `Editor` like the exact one:
it proposes a picture only after it has made one that passes. What it made and why it was left out is counted.
Any pipeline of `diffusers` in a local folder serves that takes a picture and a prompt. Weights have licences of their
own, and pictures of people who did not agree to it are not to be made.
"""

import inspect
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from nmlib import phrases
from nmlib.config import FullBodyConfig, Settings
from nmlib.conversation import Box, Conversation, ConversationError, Edit, from_picture, to_picture
from nmlib.faces import Detector, Face, cut
from nmlib.people import FRAMING
from nmlib.runtime import device, write_json

Reason = Literal["no face", "more than one face", "face too small", "no whole body", "identity lost"]
CROP = 112  # pixels a side of the faces that are compared
FULL_BODY = "full body"


class FullBodyError(ValueError):
    """A pipeline or a face that cannot be used; the message says why."""


class GivenFaceError(FullBodyError):
    """The picture of a round that shows no face, or more than one, whose body could be made."""


class BodyRow(Settings):
    """What became of one picture that the pipeline made.

    Args:
        conversation: its id.
        base: the round whose face was given.
        attempt: 0 for the first picture of that face.
        seed: of the pipeline's noise.
        prompt: what it was asked for.
        reason: why it was left out; None if it was kept.
        measured: the number that decided; for a kept picture its similarity to the face given.
        threshold: what that number was compared to.
    """

    conversation: str
    base: int
    attempt: int
    seed: int
    prompt: str
    reason: Reason | None = None
    measured: float
    threshold: float


def open_pipeline(folder: Path) -> Any:
    """A pipeline of `diffusers` from a local folder.

    Raises:
        FullBodyError: the folder is missing or damaged, or its pipeline takes no picture or no prompt.
    """
    if not (folder / "model_index.json").is_file():
        raise FullBodyError(f"{folder}: no pipeline here (no model_index.json); give a folder that diffusers saved")
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # diffusers, transformers and safetensors raise kinds that share no base
        reason = " ".join(str(error).split())
        raise FullBodyError(f"{folder}: damaged or incomplete ({reason}); put the missing file back") from None
    check_pipeline(pipeline)
    return pipeline.to(device())


def check_pipeline(pipeline: Any) -> None:
    """Raise FullBodyError unless a pipeline can be called with a picture and a prompt."""
    taken = inspect.signature(pipeline.__call__).parameters
    missing = [name for name in ("image", "prompt") if name not in taken]
    if missing:
        raise FullBodyError(
            f"{type(pipeline).__name__} takes no {' and no '.join(missing)}; expected a pipeline that edits a picture "
            "by a prompt, such as InstructPix2Pix or Flux Kontext"
        )


class DiffusionEditor:
    """An `Editor` whose pictures show the person of a round from head to toe.

    Args:
        pipeline: called with `prompt`, `image` (PIL) and `generator`; returns an object with `images`.
        detector: finds faces, for example `faces.FaceDetector`.
        embedder: aligned faces (B, 3, s, s) in [0, 1] to unit vectors (B, E), for example `faces.DlibEmbedder`.
        settings: what is asked for, and what is kept.
    """

    def __init__(
        self, pipeline: Any, detector: Detector, embedder: Callable[[Tensor], Tensor], settings: FullBodyConfig
    ) -> None:
        check_pipeline(pipeline)
        self.pipeline, self.detector, self.embedder, self.settings = pipeline, detector, embedder, settings
        self.rows: list[BodyRow] = []
        self.passed_over: list[str] = []
        self._kept: dict[tuple[str, int, str], Tensor] = {}
        self._faces: dict[tuple[str, int, str], Box] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Number of pictures made, by the reason they were left out; `kept` for the others."""
        return dict(sorted(Counter(row.reason or "kept" for row in self.rows).items()))

    def propose(self, conversation: Conversation, base: int, rng: random.Random) -> tuple[Edit | None, str] | None:
        """Make pictures of the person of round `base` until one is kept; None if none is.

        Raises:
            FullBodyError: the conversation has no pictures.
            GivenFaceError: not exactly one face in that of the round.
        """
        if conversation.images is None:
            raise FullBodyError(f"conversation {conversation.id!r} has no pictures; whole bodies are made from faces")
        if any(id_ != conversation.id for id_, *_ in self._kept):  # what was proposed of others was taken or is not
            self._kept.clear()
            self._faces.clear()
        given = conversation.images[base]  # (3, H, W)
        found = self.detector(given)
        if len(found) != 1:
            where = f"conversation {conversation.id!r}, round {base}"
            raise GivenFaceError(f"{where}: {len(found)} faces; expected one, whose body is to be made")
        reference = self._vector(given, found[0])  # (E,)
        for attempt in range(self.settings.attempts):
            prompt, seed = rng.choice(self.settings.prompts), rng.getrandbits(32)
            made = self._make(given, prompt, seed)
            reason, measured, threshold = self._judge(made, reference)
            self.rows.append(
                BodyRow(
                    conversation=conversation.id, base=base, attempt=attempt, seed=seed, prompt=prompt, reason=reason,
                    measured=measured, threshold=threshold,
                )
            )  # fmt: skip
            if reason is None:
                clause = phrases.clean(prompt)
                self._kept[conversation.id, base, clause] = self._resized(made, given.shape[-1])
                self._faces[conversation.id, base, clause] = self._share(made)
                return None, clause
        return None

    def apply(
        self, conversation: Conversation, base: int, edit: Edit | None, clause: str
    ) -> tuple[tuple[int, ...] | None, Tensor | None]:
        """The picture that was proposed, uint8 (3, H, W) of the conversation's size; its exact state is not known.

        Raises:
            FullBodyError: nothing of these words was proposed.
        """
        picture = self._kept.get((conversation.id, base, clause))
        if picture is None:
            raise FullBodyError(f"conversation {conversation.id!r}, round {base}: {clause!r} was never proposed")
        return None, picture

    def face(self, conversation: Conversation, base: int, clause: str) -> Box:
        """Where the face of a picture that was proposed is, as shares of width and height."""
        return self._faces[conversation.id, base, clause]

    def state(self) -> dict[str, Any]:
        """What was made and passed over, as plain values."""
        return {"pictures": [row.model_dump(mode="json") for row in self.rows], "passed_over": list(self.passed_over)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on counting where `state` was taken."""
        self.rows = [BodyRow.model_validate_json(json.dumps(row)) for row in state["pictures"]]
        self.passed_over = list(state["passed_over"])

    def save(self, path: Path) -> None:
        """Write what was made, kept, left out and passed over as one JSON file."""
        told = {"settings": self.settings.model_dump(mode="json"), "counts": self.counts}
        write_json(path, told | self.state())

    def _make(self, given: Tensor, prompt: str, seed: int) -> Tensor:
        side = self.settings.image_size
        face = to_picture(given).resize((side, side), Image.Resampling.BICUBIC)
        generator = torch.Generator().manual_seed(seed)
        result = self.pipeline(prompt=prompt, image=face, generator=generator, **self.settings.arguments)
        return from_picture(result.images[0].convert("RGB"), "the pipeline's picture")  # (3, H, W)

    def _judge(self, made: Tensor, reference: Tensor) -> tuple[Reason | None, float, float]:
        """Why a picture is left out, the number that decided, and its threshold."""
        settings, found = self.settings, self.detector(made)
        if len(found) != 1:
            return ("more than one face" if found else "no face"), len(found), 1
        face = found[0]
        if face.size < settings.min_face:
            return "face too small", face.size, settings.min_face
        share = (face.box[3] - face.box[1]) / made.shape[1]
        if share > settings.max_face_share:
            return "no whole body", share, settings.max_face_share
        similarity = float(self._vector(made, face) @ reference)
        return None if similarity >= settings.min_similarity else "identity lost", similarity, settings.min_similarity

    def _share(self, made: Tensor) -> Box:
        """The box of the one face of a picture (3, H, W), cut at its edges, as shares of width and height."""
        left, top, right, bottom = self.detector(made)[0].box
        height, width = made.shape[1:]
        return max(0, left / width), max(0, top / height), min(1, right / width), min(1, bottom / height)

    def _vector(self, picture: Tensor, face: Face) -> Tensor:
        """Unit vector (E,) of an aligned face."""
        return self.embedder(cut(picture, face.square, CROP)[None].float() / 255)[0]

    def _resized(self, picture: Tensor, side: int) -> Tensor:
        return from_picture(to_picture(picture), "the pipeline's picture", side)  # (3, side, side)


def with_full_bodies(
    conversations: Sequence[Conversation], editor: DiffusionEditor, share: float, seed: int, split: str
) -> list[Conversation]:
    """Replace a share of the recalls by requests for the whole body, which show what the editor makes.

    A recall for which no picture was kept, or whose introduction does not show exactly one face, stays as it is; the
    editor notes both.

    Args:
        conversations: about people, with pictures, as `personalization.build_conversations` makes them of clips.
        editor: makes the pictures from those of the introductions.
        share: of the recalls, in [0, 1].
        seed: of which, and of the words.
        split: of the phrasing, `train` or `heldout`.

    Raises:
        ConversationError: a share out of range.
    """
    if not 0 <= share <= 1:
        raise ConversationError(f"share {share}: expected a share of the recalls, from 0 to 1")
    return [_with_full_bodies(c, editor, share, random.Random(f"{seed}.{c.id}"), split) for c in conversations]


def _with_full_bodies(
    conversation: Conversation, editor: DiffusionEditor, share: float, rng: random.Random, split: str
) -> Conversation:
    value = FRAMING.values.index(FULL_BODY)
    for index, item in enumerate(conversation.rounds):
        if item.kind != "recall" or item.name is None or item.base is None or rng.random() >= share:
            continue
        if conversation.children(index):  # what starts from this picture would no longer fit it
            continue
        try:
            proposal = editor.propose(conversation, item.base, rng)
        except GivenFaceError as error:
            editor.passed_over.append(str(error))
            continue
        if proposal is None or conversation.images is None:
            continue
        text = phrases.recall_sentence(rng, item.name, (FRAMING,), (value,), split)
        images = conversation.images.clone()
        picture = editor.apply(conversation, item.base, *proposal)[1]
        face = editor.face(conversation, item.base, proposal[1])
        assert picture is not None
        images[index] = picture
        rounds = list(conversation.rounds)
        rounds[index] = replace(item, instruction=text, named=(FRAMING.name,), face=face)
        conversation = replace(conversation, rounds=tuple(rounds), images=images)
    return conversation
