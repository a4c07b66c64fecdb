"""How the model answers: it speaks word by word, then draws in one forward pass.

A pass over a few tokens takes nearly as long as one over many, so passes are saved where the answer stays the same.
`<img>` is read together with the query tokens. And once a reply names the picture that it starts from, its end can be
foreseen, `to #n <img>`: these words and the query tokens are read at once, and what the model would have said
otherwise is taken back and said word by word (speculative decoding: Leviathan et al., arXiv 2211.17192).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nmlib import phrases
from nmlib.layout import Template
from nmlib.prefix_cache import PrefixCache

MAX_REPLY = 16
Choose = Callable[[Tensor, Sequence[Sequence[int]], int], list[int]]
"""Logits (B, V), the words of each reply so far, the round -> the next word of each reply."""


class Answer(NamedTuple):
    """What the model answers to a batch of histories.

    Args:
        replies: texts, without `<img>`.
        images: (B, N, D_feature).
    """

    replies: list[str]
    images: Tensor


def likeliest(template: Template) -> Choose:
    """The choice of the likeliest word; those of a picture, its end and padding are never said."""
    banned = [*template.image_ids, template.eoi, int(template.tokenizer.pad_token_id)]

    def choose(logits: Tensor, said: Sequence[Sequence[int]], index: int) -> list[int]:
        scores = logits.clone()
        scores[:, banned] = -torch.inf
        words: list[int] = scores.argmax(1).tolist()
        return words

    return choose


def foresee(template: Template, said: Sequence[int], index: int) -> list[int]:
    """The words up to `<img>` that end a reply which has just named an earlier picture; none where it has not."""
    last = template.tokenizer.convert_ids_to_tokens(said[-1])
    if len(said) + 2 > MAX_REPLY or last not in {phrases.marker(earlier) for earlier in range(index)}:
        return []
    return [template.word_id("to"), template.marker_id(index), template.boi]


def answer(cache: PrefixCache, logits: Tensor, template: Template, index: int, choose: Choose | None = None) -> Answer:
    """Let the model speak until it opens an image, which is forced after a few words, and predict that image.

    Args:
        cache: histories that end in `[/INST]`; they are extended by the reply and `<img>`.
        logits: (B, V) after the last token.
        template: knows the special tokens.
        index: the round.
        choose: picks the words; the likeliest by default.
    """
    choose = choose or likeliest(template)
    replies: list[list[int]] = [[] for _ in range(cache.batch)]
    open_ = [True] * cache.batch
    while max(map(len, replies)) < MAX_REPLY:
        words = choose(logits, replies, index)
        open_ = [is_open and word != template.boi for is_open, word in zip(open_, words, strict=True)]
        if not any(open_):
            break
        fresh = [[word] if is_open else [] for word, is_open in zip(words, open_, strict=True)]
        for reply, word in zip(replies, fresh, strict=True):
            reply += word
        rest = foresee(template, replies[0], index) if cache.batch == 1 else []
        if rest:
            images, logits = _draw_ahead(cache, template, replies[0], rest, index, choose)
            if images is not None:
                return Answer(_texts(template, replies), images)
            continue
        step = cache.read_text(fresh, index)
        keep = torch.tensor(open_, device=logits.device)[:, None]
        logits = torch.where(keep, step, logits)
    cache.add_text([[template.boi]] * cache.batch, index)
    texts = _texts(template, replies)
    return Answer(texts, cache.query([phrases.base_of_response(text, index) for text in texts]))


def _texts(template: Template, replies: Sequence[Sequence[int]]) -> list[str]:
    return [str(template.tokenizer.decode(list(reply))) for reply in replies]


def _draw_ahead(
    cache: PrefixCache, template: Template, reply: list[int], rest: Sequence[int], index: int, choose: Choose
) -> tuple[Tensor | None, Tensor]:
    """Read the last word of a reply, its foreseen end and the queries in one pass; extend the reply by what holds.

    Returns:
        The picture (1, N, D_feature), None where the model says something else; logits (1, V) after the reply.
    """
    [text] = _texts(template, [[*reply, *rest[:-1]]])
    read = [reply[-1], *rest]
    images, logits = cache.read_and_query(read, index, phrases.base_of_response(text, index))  # (1, N, D), (t, V)
    for place, word in enumerate(rest):
        if choose(logits[[place]], [reply], index) != [word]:
            cache.cut(len(rest) - place)
            return None, logits[[place]]
        if word != template.boi:
            reply.append(word)
    return images, logits[[-1]]
