"""From conversations to token sequences: template, vocabulary, positions, masks and labels.

One conversation becomes one sequence (SEED-X's template, one turn a round):

    <s> [INST] #1 <img> C*N </img> use this picture [/INST]            an upload, or
    <s> [INST] a picture with ... [/INST] #1 <img> Q*N C*N </img>        a description
        [INST] #2 <img> C*N </img> this is olivia [/INST]                  an introduction
        [INST] olivia on a red wall [/INST] said olivia #2 to #5 <img> Q*N C*N </img>  a recall
        [INST] make the wall blue [/INST] blue background #1 to #2 <img> Q*N C*N </img> ...

Q are the N query tokens whose hidden states become the image; C are the N history tokens of the same image,
which later rounds read. In `packed` supervision both stand in one sequence at the *same positions*; a query
block is a dead end that nothing else sees. In `prefix` supervision (the paper's) a conversation of R rounds is R
samples, each ending in one query block. The two are equal by construction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nmlib import phrases
from nmlib.conversation import Conversation
from nmlib.sources import Attribute

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
INST, END_INST, BOI, EOI = "[INST]", "[/INST]", "<img>", "</img>"
IGNORE = -100
MAIN, PADDING = 0, -1


def image_token(index: int) -> str:
    """The word of the n-th query token, `<img_00000>` and so on."""
    return f"<img_{index:05d}>"


def build_tokenizer(
    attributes: Sequence[Attribute], tokens_per_image: int, max_rounds: int, names: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer for a source's grammar.

    Every name is one word, held-out names too. No data set that is trained on has those; exercises in finding words
    (`lookup`) do, so that their embeddings are words like others, of nobody whom a picture has shown.

    Args:
        attributes: their phrases give the words.
        tokens_per_image: N query tokens.
        max_rounds: number of picture markers (`#1` ...).
        names: of people, of all splits.
    """
    special = [PAD, BOS, EOS, UNK, INST, END_INST, BOI, EOI]
    words = [*special, *(image_token(index) for index in range(tokens_per_image))]
    words += [phrases.marker(index) for index in range(max_rounds)]
    words += phrases.vocabulary(attributes, names)
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap_tokenizer(core, tokens_per_image)


def wrap_tokenizer(core: Tokenizer, tokens_per_image: int) -> PreTrainedTokenizerFast:
    """A `transformers` tokenizer around a core one whose special words are known."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK
    )
    special = [INST, END_INST, BOI, EOI, *(image_token(index) for index in range(tokens_per_image))]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


@dataclass
class Layout:
    """A batch of sequences ready for the model.

    Args:
        input_ids: (B, T) token ids.
        position_ids: (B, T); query and history block of a round share theirs.
        segments: (B, T) 0 on the main path, r + 1 in the query block of round r, -1 on padding.
        rounds: (B, T) round that a token belongs to, 0 on padding.
        labels: (B, T) the id that follows on the main path where it is supervised, else -100.
        query_slots: (B, T) True where a query token stands.
        history_slots: (B, T) True where a history token stands.
        queries: (Q, 2) batch row and round of each query block, in order of the True runs of `query_slots`.
        history: (C, 2) batch row and round of each history block, in the order of `history_slots`.
        bases: (Q,) history block (row of `history`) of the picture that each query block starts from, as the text
            before it says; -1 for none.
        block_start: (B, T) first position of the query block a query token belongs to, else 0.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    rounds: Tensor
    labels: Tensor
    query_slots: Tensor
    history_slots: Tensor
    queries: Tensor
    history: Tensor
    bases: Tensor
    block_start: Tensor
    OF_HISTORY: ClassVar[tuple[str, ...]] = ("history",)  # what has a row for each history block

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return type(self)(**{name: value.to(device) for name, value in vars(self).items()})

    def rows(self, start: int, stop: int) -> Self:
        """Rows of the batch with the blocks that stand in them; `queries` and `history` count conversations as before.

        Args:
            start: first row.
            stop: the row after the last.
        """
        read = _blocks_of(self.history_slots, len(self.history), start, stop)
        made = _blocks_of(self.query_slots, len(self.queries), start, stop)
        cut = dict.fromkeys(self.OF_HISTORY, read) | dict.fromkeys(("queries", "bases"), made)
        part = {name: value[cut.get(name, slice(start, stop))] for name, value in vars(self).items()}
        part["bases"] = torch.where(part["bases"] < 0, part["bases"], part["bases"] - read.start)
        return type(self)(**part)

    def attention_mask(self) -> Tensor:
        """Who sees whom: (B, 1, T, T) bool, True where row i may look at column j.

        The main path is causal and never sees a query block; a query block sees the main path before it and
        itself, causally. Every token sees itself, so that padding rows stay finite.
        """
        position, segment = self.position_ids, self.segments
        causal = position[:, None, :] <= position[:, :, None]  # (B, T, T)
        on_main = (segment == MAIN)[:, None, :]  # (B, 1, T)
        is_query = (segment > MAIN)[:, :, None]  # (B, T, 1)
        before_block = position[:, None, :] < self.block_start[:, :, None]  # (B, T, T)
        main = causal & on_main & (~is_query | before_block)
        own = causal & is_query & (segment[:, None, :] == segment[:, :, None])
        diagonal = torch.eye(position.shape[1], dtype=torch.bool, device=position.device)
        return (main | own | diagonal)[:, None]  # (B, 1, T, T)


def _blocks_of(slots: Tensor, count: int, start: int, stop: int) -> slice:
    """Which of `count` blocks of one size stand in rows of `slots` (B, T)."""
    if not count:
        return slice(0, 0)
    size = int(slots.sum()) // count
    before, own = int(slots[:start].sum()) // size, int(slots[start:stop].sum()) // size
    return slice(before, before + own)


@dataclass
class _Row:
    """One sequence under construction."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    rounds: list[int]
    labels: list[int]
    starts: list[int]
    history: list[int]
    queries: list[int]
    bases: list[int]
    in_history: list[bool]
    position: int = 0
    round: int = 0

    def add(
        self, ids: Sequence[int], segment: int = MAIN, labels: Sequence[int] | None = None, in_history: bool = False
    ) -> None:
        start = self.position
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.segments += [segment] * len(ids)
        self.rounds += [self.round] * len(ids)
        self.labels += labels if labels is not None else [IGNORE] * len(ids)
        self.starts += [start if segment > MAIN else 0] * len(ids)
        self.in_history += [in_history] * len(ids)
        if segment == MAIN:
            self.position += len(ids)


class Template:
    """Turns rounds into token ids.

    Args:
        tokenizer: knows the words of this module.
        tokens_per_image: N.
        response: `grounded` or `polite`, see `phrases.response`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokens_per_image: int, response: str) -> None:
        self.tokenizer, self.response, self.tokens_per_image = tokenizer, response, tokens_per_image
        self.image_ids = [self.word_id(image_token(index)) for index in range(tokens_per_image)]
        self.boi, self.eoi = self.word_id(BOI), self.word_id(EOI)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens added."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def word_id(self, word: str) -> int:
        """Id of one word of the vocabulary."""
        return int(self.tokenizer.convert_tokens_to_ids(word))  # type: ignore[arg-type]

    def marker_id(self, index: int) -> int:
        """Id of the marker of a round's picture."""
        return self.word_id(phrases.marker(index))

    def prompt(self, conversation: Conversation, index: int) -> list[int]:
        """Ids that open a round: up to the `<img>` of a picture that is brought, else up to `[/INST]`."""
        opening = BOS + " " if index == 0 else ""
        item = conversation.rounds[index]
        if item.is_brought:
            number = phrases.marker(index) + " " if self.response == "grounded" else ""
            return self.encode(f"{opening}{INST} {number}{BOI}")
        return self.encode(f"{opening}{INST} {item.instruction} {END_INST}")

    def reply(self, conversation: Conversation, index: int) -> list[int]:
        """Ids of the text before a generated image, up to `<img>`."""
        item, before = conversation.rounds[index], conversation.named_edit(index)
        edit = f"{item.edit.value} {item.edit.attribute}" if item.edit else ""
        name = item.name if item.kind == "recall" and item.name else ""
        text = phrases.response(self.response, index, item.base, item.instruction, edit, before, name)
        return self.encode(f"{text} {BOI}")

    def closing(self, conversation: Conversation, index: int) -> list[int]:
        """Ids after a round's history block."""
        item = conversation.rounds[index]
        tail = f" {item.instruction} {END_INST}" if item.is_brought else ""
        return self.encode(f"{EOI}{tail}")

    def _add_round(
        self, row: _Row, conversation: Conversation, index: int, *, query: bool, history: bool, pictures: bool = True
    ) -> None:
        row.round = index
        row.add(self.prompt(conversation, index))
        if not conversation.rounds[index].is_brought:
            reply = self.reply(conversation, index)
            if query:
                row.labels[-1] = reply[0]
            row.add(reply, labels=[*reply[1:], IGNORE] if query else None)
            if query and pictures:
                row.add(self.image_ids, segment=index + 1)
                row.queries.append(index)
                base = conversation.rounds[index].base
                row.bases.append(-1 if base is None else base)
        if history:
            if pictures:
                row.history.append(index)
                row.add(self.image_ids, in_history=True)
            else:
                row.position += self.tokens_per_image
            row.add(self.closing(conversation, index))

    def packed_row(self, conversation: Conversation, pictures: bool = True) -> _Row:
        """One sequence that supervises every generated image of a conversation, or without pictures every reply."""
        row = _Row([], [], [], [], [], [], [], [], [], [])
        last = len(conversation) - 1
        for index in range(len(conversation)):
            self._add_round(row, conversation, index, query=True, history=index < last, pictures=pictures)
        return row

    def prefix_row(self, conversation: Conversation, index: int) -> _Row:
        """One sequence that supervises the image of one round, with everything before it as history."""
        row = _Row([], [], [], [], [], [], [], [], [], [])
        for earlier in range(index):
            self._add_round(row, conversation, earlier, query=False, history=True)
        self._add_round(row, conversation, index, query=True, history=False)
        return row

    def packed(self, conversations: Sequence[Conversation], pictures: bool = True) -> Layout:
        """The batch of `packed` supervision; without pictures their places stay empty, and words keep theirs."""
        rows = [self.packed_row(conversation, pictures) for conversation in conversations]
        return self._collate(rows, list(range(len(rows))))

    def spoken(self, dialogues: Sequence[Sequence[tuple[str, str]]]) -> Layout:
        """The batch of dialogues without pictures, (what is said, the reply) for each round: every reply is learned."""
        rows = []
        for dialogue in dialogues:
            row = _Row([], [], [], [], [], [], [], [], [], [])
            for index, (said, answer) in enumerate(dialogue):
                row.round = index
                row.add(self.encode(f"{BOS + ' ' if index == 0 else ''}{INST} {said} {END_INST}"))
                reply = self.encode(f"{answer} {BOI}")
                row.labels[-1] = reply[0]
                row.add(reply, labels=[*reply[1:], IGNORE])
                row.position += self.tokens_per_image
                row.add([self.eoi])
            rows.append(row)
        return self._collate(rows, list(range(len(rows))))

    def prefix(self, conversations: Sequence[Conversation], rounds: Sequence[int] | None = None) -> Layout:
        """The batch of `prefix` supervision.

        Args:
            conversations: B conversations; batch rows in `queries` and `history` count these.
            rounds: one round to supervise for each conversation; None takes every generated round of each.
        """
        rows, owners = [], []
        for owner, conversation in enumerate(conversations):
            wanted = range(len(conversation)) if rounds is None else [rounds[owner]]
            for index in wanted:
                if not conversation.rounds[index].is_brought:
                    rows.append(self.prefix_row(conversation, index))
                    owners.append(owner)
        return self._collate(rows, owners)

    def _collate(self, rows: Sequence[_Row], owners: Sequence[int]) -> Layout:
        length = max(len(row.ids) for row in rows)
        pad = int(self.tokenizer.pad_token_id)

        def stack(lists: Sequence[Sequence[int]], fill: int) -> Tensor:
            filled = np.full((len(lists), length), fill, np.int64)  # (B, T)
            for row, values in zip(filled, lists, strict=True):
                row[: len(values)] = values
            return torch.from_numpy(filled)

        segments = stack([row.segments for row in rows], PADDING)
        queries = [(owner, index) for owner, row in zip(owners, rows, strict=True) for index in row.queries]
        history = [(owner, index) for owner, row in zip(owners, rows, strict=True) for index in row.history]
        bases, before = [], 0
        for row in rows:
            bases += [before + row.history.index(base) if base >= 0 else -1 for base in row.bases]
            before += len(row.history)
        return Layout(
            input_ids=stack([row.ids for row in rows], pad),
            position_ids=stack([row.positions for row in rows], 0),
            segments=segments,
            rounds=stack([row.rounds for row in rows], 0),
            labels=stack([row.labels for row in rows], IGNORE),
            query_slots=segments > MAIN,
            history_slots=stack([row.in_history for row in rows], 0).bool(),
            queries=torch.tensor(queries, dtype=torch.int64).reshape(-1, 2),
            history=torch.tensor(history, dtype=torch.int64).reshape(-1, 2),
            bases=torch.tensor(bases, dtype=torch.int64),
            block_start=stack([row.starts for row in rows], 0),
        )
