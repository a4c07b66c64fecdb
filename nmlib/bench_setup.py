"""What the workloads of the benchmark share: their sizes, fresh models, forced conversations, and where results go."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nmlib import curriculum, data, layout, runtime
from nmlib.answer import Choose
from nmlib.chat import ChatSession, System
from nmlib.config import Params
from nmlib.conversation import Conversation, Edit, Round
from nmlib.detokenizer import Detokenizer
from nmlib.layout import PADDING, Layout, Template
from nmlib.mllm import HistoryMLLM
from nmlib.timing import Result, Task, measure, summary
from nmlib.vision import VisionTransformer


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are.

    Args:
        training_rounds: lengths of the conversations trained on.
        conversations: in a training batch.
        early, late: rounds whose latency is compared, counted from 1.
        queries: query tokens of the model that predicts them one by one; a square number.
        depth: rounds that a deep undo goes back.
        image_size: pixels a side of the pictures drawn.
        pictures: drawn at once.
        growth: rounds whose cost is measured, counted from 1.
        forks: numbers of branches grown from one round.
        mixed_rounds: lengths of the conversations that are packed together.
    """

    training_rounds: tuple[int, ...] = (8, 16)
    conversations: int = 4
    early: int = 2
    late: int = 20
    queries: int = 64
    depth: int = 8
    image_size: int = 64
    pictures: int = 256
    growth: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    forks: tuple[int, ...] = (1, 2, 4, 8, 16)
    mixed_rounds: tuple[int, ...] = (6, 8, 12)

    @property
    def rounds(self) -> int:
        """Rounds that the model must count."""
        return max(*self.training_rounds, self.late, self.depth + 2, *self.growth, *self.mixed_rounds)


QUICK = Sizes((3, 4), 2, 2, 5, 4, 3, 32, 8, (2, 4, 6), (1, 2, 3), (2, 3, 4))


@dataclass
class Bench:
    """A benchmark under way.

    Args:
        params: sizes of the models.
        sizes: of the workloads.
        repeats: how often each thing is timed.
        warmup: how often it is run before.
        results: what was found.
        series: rows of what was measured at several sizes, by workload.
    """

    params: Params
    sizes: Sizes
    repeats: int
    warmup: int
    results: list[Result] = field(default_factory=list)
    series: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def measure(self, **tasks: Task) -> dict[str, np.ndarray]:
        """Seconds of tasks that take turns."""
        return measure(tasks, self.repeats, self.warmup)

    def milliseconds(self, id: str, seconds: np.ndarray, meaning: str) -> None:
        """Note a time."""
        self.results.append(Result(id=id, unit="ms", meaning=meaning, **summary(1e3 * seconds)))

    def ratio(self, id: str, over: np.ndarray, under: np.ndarray, limit: float | None, meaning: str) -> None:
        """Note how many times longer the first took than the second, turn by turn."""
        self.results.append(Result(id=id, unit="x", limit=limit, meaning=meaning, **summary(over / under)))

    def number(self, id: str, value: float, unit: str, meaning: str, limit: float | None = None) -> None:
        """Note what was counted or fitted."""
        self.results.append(Result(id=id, value=value, unit=unit, limit=limit, meaning=meaning))

    def talk(self, rounds: int) -> Conversation:
        """An upload and edits of the picture before, all in the same words but for the numbers."""
        attribute = data.speaker(self.params).attributes[0]
        said, edit = f"make the {attribute.name} {attribute.values[0]}", Edit(attribute.name, attribute.values[0])
        edits = [Round(said, "edit", index - 1, edit) for index in range(1, rounds)]
        return Conversation("bench", self.params.source.kind, (Round("here is a picture", "upload"), *edits))

    def model(self, tokens: int | None = None) -> tuple[HistoryMLLM, Template]:
        """A fresh model on the device, that counts far enough; of the params' size or with other tokens a picture."""
        runtime.seed_everything(self.params.seed)
        tokens = tokens or self.params.tokens_per_image
        settings, speaker = self.params.model, data.speaker(self.params)
        settings = settings.model_copy(update={"max_rounds": max(settings.max_rounds, self.sizes.rounds)})
        words = layout.build_tokenizer(speaker.attributes, tokens, settings.max_rounds, speaker.names)
        model, template = curriculum.new_model(settings, words, tokens, self.params.vision.feature_dim)
        return model.to(runtime.device()).eval(), template

    def system(self) -> System:
        """Fresh models of the params' size."""
        model, template = self.model()
        vision, size = self.params.vision, self.params.source.image_size
        encoder = VisionTransformer(vision, size).eval()
        decoder = Detokenizer(self.params.detokenizer, size, vision.tokens, vision.feature_dim).eval()
        for module in (encoder, decoder, model):
            module.to(runtime.device()).requires_grad_(False)
        return System(encoder, decoder, model, template, size)

    def session(self, system: System, rounds: int) -> ChatSession:
        """A session that has so many pictures, and whose replies are forced."""
        talk = self.talk(max(rounds, 2))
        session = ChatSession(system, choose=forced(talk, system.template))
        session.upload(torch.zeros(3, system.image_size, system.image_size))
        for item in talk.rounds[1:rounds]:
            session.say(item.instruction)
        return session


def forced(talk: Conversation, template: Template) -> Choose:
    """Choose the words of a conversation's replies, whatever the model would say: one after the other, as ever."""
    replies: dict[int, list[int]] = {}

    def choose(logits: Tensor, said: Sequence[Sequence[int]], index: int) -> list[int]:
        if index not in replies:
            replies[index] = template.reply(talk_to(talk, index), index)
        return [replies[index][len(reply)] for reply in said]

    return choose


def talk_to(talk: Conversation, index: int) -> Conversation:
    """The same conversation, as long as needed for a round of that index."""
    last = talk.rounds[-1]
    more = [Round(last.instruction, "edit", place - 1, last.edit) for place in range(len(talk), index + 1)]
    return Conversation(talk.id, talk.source, (*talk.rounds, *more))


def tokens_of(batch: Layout) -> int:
    """Tokens of a batch, without padding."""
    return int((batch.segments != PADDING).sum())
