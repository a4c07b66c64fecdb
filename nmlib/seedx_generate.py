"""Talking to SEED-X: greedy replies in a batch, each picture's query tokens read in one forward pass.

SEED-X generates the 64 query tokens one after the other, although all of them are known beforehand: a causal pass over
them together gives the same hidden states. The rule that words of a picture never stand alone is kept here with
minus infinity; SEED-X sets their scores to 0, which wins where all others are negative.
Source: SEED-X `seed_x.py` and `generation.py` (restated in our own words).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nmlib.cache import CacheError
from nmlib.prefix_cache import PrefixCache
from nmlib.seedx import SeedX
from nmlib.seedx_layout import READ, WORD, Positions, Sample, SampleError, SeedXTemplate
from nmlib.seedx_vision import WHOLE

MAX_NEW_TOKENS = 512
Remember = Callable[[int, Tensor], Tensor]


@dataclass
class Reply:
    """What the model said.

    Args:
        ids: all tokens, query tokens and the end of the text among them.
        text: the words.
        images: (n, N, D_feature), one for each picture of the reply.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    images: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class Shown:
    """A picture that a person shows: features (n, M, D_feature) of its tiles and of the whole, and their places."""

    features: Tensor
    positions: Positions = (WHOLE,)


class SeedXCache(PrefixCache):
    """Keys and values of a batch of SEED-X conversations.

    Args:
        agent: reads them.
        template: knows the words.
        batch: conversations side by side.
    """

    def __init__(self, agent: SeedX, template: SeedXTemplate, batch: int = 1) -> None:
        super().__init__(agent, template.image_ids, batch)
        self.agent, self.template = agent, template

    def embed(self, sample: Sample, features: Tensor | None) -> Tensor:
        """Embeddings (T, D) of a text whose READ slots are `features` (n, M, D_feature), one for each position."""
        ids = torch.tensor(sample.ids, dtype=torch.int64, device=self.device)  # (T,)
        embeds = self.agent.embed_text(ids[None], torch.zeros_like(ids)[None])[0]  # (T, D)
        if features is not None and len(features):
            positions = torch.tensor(sample.positions, device=self.device)  # (n, 2)
            rounds = torch.zeros(len(features), dtype=torch.int64)
            blocks = self.agent.embed_images(features.to(self.device), rounds, positions)  # (n, N, D)
            slots = torch.tensor(sample.kinds, device=self.device) == READ  # (T,)
            embeds = embeds.masked_scatter(slots[:, None], blocks.to(embeds.dtype))
        return embeds

    @torch.no_grad()
    def read_samples(self, samples: Sequence[Sample], features: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Append texts of any lengths, padded on the left; returns states (B, t, D) and logits (B, V) after each."""
        longest = max(len(sample.ids) for sample in samples)
        rows = [self.embed(sample, own) for sample, own in zip(samples, features, strict=True)]
        embeds = torch.stack([torch.cat([row.new_zeros(longest - len(row), row.shape[1]), row]) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        valid = torch.arange(longest, device=self.device) >= longest - lengths[:, None]  # (B, t)
        states = self.read(embeds, valid, keep=True)  # (B, t, D)
        return states, self.agent.base_llm.lm_head(states[:, -1]).float()  # (B, V)

    def read_ids(self, ids: Sequence[Sequence[int]], together: bool = True) -> tuple[Tensor, Tensor]:
        """Append plain tokens, all of them in one pass or one after the other (as SEED-X does)."""
        longest = max(len(row) for row in ids)
        if together or longest == 1:
            return self.read_samples([Sample(list(row), [], [WORD] * len(row)) for row in ids], [None] * len(ids))
        states = []
        for ahead in range(longest, 0, -1):
            state, logits = self.read_ids([row[-ahead:][:1] if ahead <= len(row) else [] for row in ids])
            states.append(state)
        return torch.cat(states, dim=1), logits  # (B, t, D), (B, V)


def generate(
    cache: SeedXCache,
    logits: Tensor,
    *,
    force_image: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_images: int | None = None,
    one_shot: bool = True,
) -> list[Reply]:
    """Let the model speak, word by word the likeliest, until every reply has ended.

    Args:
        cache: histories that end where the reply begins; they are extended by it, without the end of the text.
        logits: (B, V) after the last token.
        force_image: begin with a picture, whatever the model would say.
        max_new_tokens: of each reply; a picture that would not fit is not begun.
        max_images: of each reply, which ends behind the last of them.
        one_shot: read a picture's query tokens in one pass; False one by one, to compare.
    """
    template = cache.template
    chain = [template.boi, *template.image_ids, template.eoi]
    replies = [Reply() for _ in range(cache.batch)]
    made: list[list[Tensor]] = [[] for _ in replies]
    is_open = [True] * cache.batch
    forced = force_image
    while True:
        words = _likeliest(logits, template, forced)
        forced = False
        fed: list[list[int]] = []
        for row, (reply, word) in enumerate(zip(replies, words, strict=True)):
            step = chain if word == template.boi else [word]
            is_open[row] &= len(reply.ids) + len(step) <= max_new_tokens
            is_open[row] &= max_images is None or len(made[row]) < max_images
            reply.ids += step if is_open[row] else []
            is_open[row] &= word != template.eos
            fed.append(step if is_open[row] else [])
        if not any(is_open):
            break
        states, logits = cache.read_ids(fed, one_shot)
        for row in (row for row, step in enumerate(fed) if len(step) > 1):
            queries = states[row, -len(chain) + 1 : -1]  # (N, D)
            made[row].append(cache.agent.output_resampler(queries[None])[0].detach())  # (N, D_feature)
    return [_finish(reply, images, template, cache) for reply, images in zip(replies, made, strict=True)]


def _likeliest(logits: Tensor, template: SeedXTemplate, forced: bool) -> list[int]:
    """The next word of each reply; those of a picture come only behind its `<img>`, so never here."""
    if forced:
        return [template.boi] * len(logits)
    scores = logits.clone()
    scores[:, [*template.image_ids, template.eoi]] = -torch.inf
    return [int(word) for word in scores.argmax(1)]


def _finish(reply: Reply, images: list[Tensor], template: SeedXTemplate, cache: SeedXCache) -> Reply:
    hidden = {*template.image_ids, template.boi, template.eoi, template.eos}
    reply.text = str(template.tokenizer.decode([id_ for id_ in reply.ids if id_ not in hidden])).strip()
    empty = torch.zeros(0, template.tokens_per_image, cache.agent.feature_dim, device=cache.device)
    reply.images = torch.stack(images).float() if images else empty  # (n, N, D_feature)
    return reply


class SeedXChat:
    """Conversations of many rounds with SEED-X, side by side; each can be undone.

    What a later round reads of a predicted picture is the settings' `history` (SEEDX.md section 4), or what
    `remember` makes of it: decoded and encoded again, or the true features.

    Args:
        agent: in evaluation mode.
        template: knows the words.
        batch: conversations side by side.
        remember: conversation and its predicted pictures (n, N, D_feature) to (n, M, D_feature).
    """

    def __init__(self, agent: SeedX, template: SeedXTemplate, batch: int = 1, remember: Remember | None = None) -> None:
        self.agent, self.template, self.remember = agent, template, remember
        self.cache = SeedXCache(agent, template, batch)
        self._starts: list[int] = []  # tokens before each round

    def say(
        self,
        instructions: Sequence[str],
        pictures: Sequence[Shown | None] | None = None,
        *,
        force_image: bool = False,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_images: int | None = None,
        one_shot: bool = True,
    ) -> list[Reply]:
        """One round: an instruction for each conversation, with a picture or without, and the replies to them."""
        shown = list(pictures or [None] * len(instructions))
        prompts = [self._prompt(text, picture) for text, picture in zip(instructions, shown, strict=True)]
        self._begin(prompts)
        _, logits = self.cache.read_samples(
            prompts, [None if picture is None else picture.features for picture in shown]
        )
        before = self.cache.length
        replies = generate(
            self.cache,
            logits,
            force_image=force_image,
            max_new_tokens=max_new_tokens,
            max_images=max_images,
            one_shot=one_shot,
        )
        if self.remember is not None or self.agent.config.history != "states":
            self.cache.cut(self.cache.length - before)
            self._read_again(replies)
        return replies

    @torch.no_grad()
    def show(self, texts: Sequence[str], pictures: Sequence[Shown]) -> None:
        """One round in which every person brings a picture with a text, to which nothing is replied, as in training."""
        prompts = [self._prompt(text, picture) for text, picture in zip(texts, pictures, strict=True)]
        self._begin(prompts)
        self.cache.read_samples(prompts, [picture.features for picture in pictures])

    def undo(self) -> None:
        """Forget the last round.

        Raises:
            CacheError: there is none.
        """
        if not self._starts:
            raise CacheError("nothing to undo: nothing was said yet")
        self.cache.cut(self.cache.length - self._starts.pop())

    def _begin(self, prompts: Sequence[Sample]) -> None:
        """Note where a round begins; raises SampleError where its prompt and a picture find no place any more."""
        longest, limit = max(len(prompt.ids) for prompt in prompts), self.agent.config.max_positions
        needed = self.cache.length + longest + self.template.tokens_per_image + 2
        if needed > limit:
            raise SampleError(f"this round makes {needed} tokens of at most {limit}; undo, or begin a new conversation")
        self._starts.append(self.cache.length)

    def _prompt(self, text: str, picture: Shown | None) -> Sample:
        sample = Sample() if self._starts else self.template.begin()
        if self._starts:
            sample.add(self.template.encode("\n"))
        return self.template.ask(sample, text, () if picture is None else picture.positions)

    def _read_again(self, replies: Sequence[Reply]) -> None:
        """Append replies with their pictures as history instead of queries."""
        samples, features = [], []
        for row, reply in enumerate(replies):
            ids = [id_ for id_ in reply.ids if id_ != self.template.eos]
            kinds = [READ if id_ in self.template.image_ids else WORD for id_ in ids]
            samples.append(Sample(ids, [], kinds, [WHOLE] * len(reply.images)))
            features.append(self.remember(row, reply.images) if self.remember else reply.images)
        if any(sample.ids for sample in samples):
            self.cache.read_samples(samples, features)


def compare_speed(agent: SeedX, template: SeedXTemplate, instruction: str = "make a picture") -> str:
    """Make one picture both ways and say in one line how long each took and how far apart they are."""
    seconds, images = [], []
    for one_shot in (True, False):
        chat = SeedXChat(agent, template)
        start = time.perf_counter()
        count = template.tokens_per_image + 2
        replies = chat.say([instruction], force_image=True, max_new_tokens=count, one_shot=one_shot)
        seconds.append(time.perf_counter() - start)
        images.append(replies[0].images)
    apart = float((images[0] - images[1]).abs().max())
    return (
        f"{template.tokens_per_image} query tokens: one pass {seconds[0]:.3f} s, one by one {seconds[1]:.3f} s, "
        f"{seconds[1] / seconds[0]:.1f} times as long; largest difference {apart:.1e}"
    )
