"""SEED-X's sequences: its instruction template, its samples for tuning, and which tokens count in the loss.

A picture that is read is 64 history tokens between `<img>` and `</img>`; one cut into tiles has each tile between
`<patch>` and `</patch>` first. A picture that is made is the same 64 words as queries on the main path. Supervised
are the reply, the opening `<img>` and the end of the text; never the query tokens nor `</img>`, which are forced.
Source: SEED-X `sft_clm.py`, `image_text_pairs_clm.py` (restated in our own words).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nmlib.config import SeedXConfig
from nmlib.conversation import Conversation
from nmlib.layout import BOI, END_INST, EOI, IGNORE, INST, MAIN, PADDING, Template, image_token
from nmlib.seedx import END_PATCH, PATCH, SeedXLayout, check_tokenizer
from nmlib.seedx_vision import WHOLE

WORD, READ, MADE = 0, 1, 2
Positions = Sequence[tuple[float, float]]
ONE_PICTURE: Positions = (WHOLE,)


class SampleError(ValueError):
    """A sample that cannot be trained on; the message says why, so that rejected rows can be counted."""


@dataclass
class Sample:
    """One sequence: ids, for each token the label it is itself (-100: not supervised), and what stands there.

    Args:
        ids: token ids.
        labels: the id where the token is to be predicted, else -100 (not shifted).
        kinds: WORD, READ (a history slot) or MADE (a query slot).
        positions: centre of each picture or tile that is read, in order.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    positions: list[tuple[float, float]] = field(default_factory=list)

    def add(self, ids: Sequence[int], labels: Sequence[int] | None = None, kinds: Sequence[int] | None = None) -> None:
        """Append tokens; without labels none is supervised, without kinds all are words."""
        self.ids += ids
        self.labels += labels if labels is not None else [IGNORE] * len(ids)
        self.kinds += kinds if kinds is not None else [WORD] * len(ids)


class SeedXTemplate(Template):
    """SEED-X's strings, for conversations (`packed`, `prefix`, chat) and for its own tuning samples.

    Args:
        tokenizer: of the released folder, or any that has the added words.
        settings: sizes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: SeedXConfig) -> None:
        check_tokenizer(tokenizer, settings, "SeedXTemplate")
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        super().__init__(tokenizer, settings.queries, "polite")
        self.settings = settings
        self.bos, self.eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self._slots = set(self.image_ids)

    # --------------------------------------------------------------------------------------------------
    # conversations, in the terms of `Template`

    def prompt(self, conversation: Conversation, index: int) -> list[int]:
        """Ids that open a round: of a brought picture up to its `<img>`, else the instruction up to `[/INST]`."""
        item = conversation.rounds[index]
        opening = [self.bos] if index == 0 else self.encode("\n")
        if item.is_brought:
            return [*opening, *self.encode(f"{INST} {BOI}")]
        return [*opening, *self.encode(f"{INST} {item.instruction} {END_INST}\n")]

    def reply(self, conversation: Conversation, index: int) -> list[int]:
        """Ids of the text before a generated image, up to `<img>`."""
        return [*super().reply(conversation, index)[:-1], self.boi]

    def closing(self, conversation: Conversation, index: int) -> list[int]:
        """Ids after a round's history block."""
        item = conversation.rounds[index]
        return self.encode(f"{EOI}{item.instruction} {END_INST}\n") if item.is_brought else [self.eoi]

    # --------------------------------------------------------------------------------------------------
    # samples for tuning

    def picture(self, positions: Positions = ONE_PICTURE) -> str:
        """The text in which a picture stands: its tiles first, the whole last."""
        slots = "".join(image_token(index) for index in range(self.tokens_per_image))
        return f"{PATCH}{slots}{END_PATCH}" * (len(positions) - 1) + f"{BOI}{slots}{EOI}"

    def ask(self, sample: Sample, text: str, positions: Positions = (), picture_first: bool = True) -> Sample:
        """Append an instruction, with a picture before or after its text; nothing of it is learned."""
        block = self.picture(positions) if positions else ""
        asked = f"{block}{text}" if picture_first else f"{text}{block}"
        self.place(sample, f"{INST} {asked} {END_INST}\n", READ, len(positions))
        sample.positions += positions
        return sample

    def place(self, sample: Sample, text: str, kind: int, pictures: int) -> None:
        """Append text in which a number of pictures stand, as slots of one kind; nothing of it is learned.

        Raises:
            SampleError: the text brings query tokens of its own.
        """
        ids = self.encode(text)
        kinds = [kind if id_ in self._slots else WORD for id_ in ids]
        if len(ids) - kinds.count(WORD) != pictures * self.tokens_per_image:
            raise SampleError(f"text holds image words such as {image_token(0)}; expected plain words, found {text!r}")
        sample.add(ids, kinds=kinds)

    def reply_with(self, sample: Sample, response: str, kind: int, *, learn: bool, learn_image: bool) -> Sample:
        """Append a response and the picture after it.

        Args:
            sample: what was said before.
            response: words before the picture.
            kind: MADE where the model makes it, READ where it is history.
            learn: whether the words are supervised.
            learn_image: whether the opening `<img>` is.
        """
        start = len(sample.ids)
        self.place(sample, response + self.picture(), kind, 1)
        opening = len(sample.ids) - self.tokens_per_image - 2  # where `<img>` stands
        if learn:
            sample.labels[start:opening] = sample.ids[start:opening]
        if learn_image:
            sample.labels[opening] = self.boi
        if kind == READ:
            sample.positions.append(WHOLE)
        return sample

    def end(self, sample: Sample) -> Sample:
        """Append the end of the text, which is always learned."""
        sample.add([self.eos], [self.eos])
        return sample

    def edit(
        self, instruction: str, response: str, positions: Positions = ONE_PICTURE, picture_first: bool = True
    ) -> Sample:
        """A picture, what to change, and the changed picture; the response is learned."""
        sample = self.ask(self.begin(), instruction, positions, picture_first)
        return self.end(self.reply_with(sample, response, MADE, learn=True, learn_image=True))

    def text_to_image(self, prompt: str, caption: str, response: str) -> Sample:
        """A caption and its picture; the response is not learned."""
        sample = self.ask(self.begin(), f"{prompt} {caption}")
        return self.end(self.reply_with(sample, f" {response}", MADE, learn=False, learn_image=True))

    def answer(self, turns: Sequence[tuple[str, str]], positions: Positions = (), picture_first: bool = True) -> Sample:
        """Questions and answers about a picture, which stands in the first; the answers are learned."""
        sample = self.begin()
        for index, (question, answer) in enumerate(turns):
            if index:
                sample.add(self.encode("\n"))
            self.ask(sample, question, positions if index == 0 else (), picture_first)
            ids = self.encode(answer)
            sample.add(ids, ids)
        return self.end(sample)

    def rounds(self, turns: Sequence[tuple[str, str]], first: Positions = ONE_PICTURE) -> Sample:
        """One sample of prefix splitting: all rounds before the last are history, the last is learned.

        Args:
            turns: instruction and response of each round that makes a picture.
            first: the picture that the conversation begins with; empty where it begins with words.
        """
        sample = self.begin()
        for index, (instruction, response) in enumerate(turns):
            last = index == len(turns) - 1
            if index:
                sample.add(self.encode("\n"))
            self.ask(sample, instruction, first if index == 0 else ())
            kind = MADE if last or self.settings.history == "states" else READ
            self.reply_with(sample, response, kind, learn=last, learn_image=last)
        return self.end(sample)

    def begin(self) -> Sample:
        """A sample that holds the beginning of the text only."""
        sample = Sample()
        sample.add([self.bos])
        return sample

    def batch(self, samples: Sequence[Sample]) -> SeedXLayout:
        """Stack samples, padded on the right.

        Pictures are counted over the batch: `history` and `queries` point at row 0 and column i of features
        (1, P, M, D_feature), where the pictures of each sample stand in the order of its text.

        Raises:
            SampleError: a sample is too long, or supervises nothing.
        """
        for number, sample in enumerate(samples):
            if len(sample.ids) >= self.settings.max_length:
                limit = self.settings.max_length
                raise SampleError(f"sample {number} has {len(sample.ids)} tokens; expected fewer than {limit}")
            if all(label == IGNORE for label in sample.labels):
                raise SampleError(f"sample {number} supervises no token; expected a reply or a picture to learn")
        length = max(len(sample.ids) for sample in samples)

        def stack(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])  # (B, T)

        kinds = stack([sample.kinds for sample in samples], WORD)
        blocks = self._blocks(samples)
        history = [index for index, kind in enumerate(blocks) if kind == READ]
        queries = [index for index, kind in enumerate(blocks) if kind == MADE]
        zeros = torch.zeros_like(kinds)
        return SeedXLayout(
            input_ids=stack([sample.ids for sample in samples], int(self.tokenizer.pad_token_id or 0)),
            position_ids=torch.arange(length).expand(len(samples), -1).clone(),
            segments=stack([[MAIN] * len(sample.ids) for sample in samples], PADDING),
            rounds=zeros,
            labels=stack([[*sample.labels[1:], IGNORE] for sample in samples], IGNORE),
            query_slots=kinds == MADE,
            history_slots=kinds == READ,
            queries=torch.tensor([(0, index) for index in queries], dtype=torch.int64).reshape(-1, 2),
            history=torch.tensor([(0, index) for index in history], dtype=torch.int64).reshape(-1, 2),
            bases=torch.full((len(queries),), -1),
            block_start=zeros.clone(),
            patch_positions=torch.tensor([p for sample in samples for p in sample.positions]).reshape(-1, 2),
        )

    def _blocks(self, samples: Sequence[Sample]) -> list[int]:
        """Kind of every picture of a batch in order."""
        slots = [kind for sample in samples for kind in sample.kinds if kind != WORD]
        return slots[:: self.tokens_per_image]
