"""What the benchmark measures: fixed conversations, the fast way and the plain way in the same run, and the limit.

The weights are fresh: what a forward pass costs does not depend on what was learned. A fresh model would say anything,
so that replies are forced: every round has the same words. Only ratios carry over from one machine to another.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nmlib import data
from nmlib.answer import answer
from nmlib.bench_setup import Bench, forced, talk_to, tokens_of
from nmlib.chat import ChatSession, System
from nmlib.config import SeedXConfig, SourceConfig
from nmlib.conversation import Conversation
from nmlib.layout import Layout
from nmlib.mllm import HistoryMLLM
from nmlib.packing import buckets, pack
from nmlib.prefix_cache import PrefixCache
from nmlib.timing import Result, Task, exponent, summary

SOURCE_DRAWS = 7


# ---------------------------------------------------------------------------------------------------------
# training


def training(bench: Bench) -> None:
    """Forward and backward pass of a batch: one packed sequence a conversation against one sequence a picture.

    The sequences of the plain way are as good as they can be: those of one length go together, nothing is padded.
    """
    model, template = bench.model()
    for rounds in bench.sizes.training_rounds:
        talks = [bench.talk(rounds)] * bench.sizes.conversations
        features = torch.randn(len(talks), rounds, template.tokens_per_image, model.feature_dim)
        packed = [template.packed(talks)]
        prefix = [template.prefix(talks, [index] * len(talks)) for index in range(1, rounds)]
        limit = sum(map(tokens_of, prefix)) / tokens_of(packed[0])
        found = bench.measure(packed=Task(learn(model, packed, features)), prefix=Task(learn(model, prefix, features)))
        pictures = len(talks) * (rounds - 1)
        for name, seconds in found.items():
            speed = summary(pictures / seconds)
            bench.results.append(
                Result(
                    id=f"training.{name}{rounds}",
                    unit="images/s",
                    meaning=f"images supervised, {rounds} rounds",
                    **speed,
                )
            )
        meaning = f"images supervised a second, packed over prefix, {rounds} rounds; limit: ratio of token counts"
        bench.ratio(f"training.ratio{rounds}", found["prefix"], found["packed"], limit, meaning)


def learn(model: HistoryMLLM, batches: Sequence[Layout], features: Tensor) -> Callable[[], None]:
    """A call that computes the gradients of batches, which lie where the model does."""
    placed, pictures = [batch.to(model.device) for batch in batches], features.to(model.device)

    def step() -> None:
        model.train()
        for batch in placed:
            model(batch, pictures).total.backward()
        model.zero_grad(set_to_none=True)
        model.eval()

    return step


def packing(bench: Bench) -> None:
    """Forward and backward pass of conversations of several lengths: padded, in batches of like length, and packed."""
    model, template = bench.model()
    talks = [bench.talk(rounds) for rounds in bench.sizes.mixed_rounds] * bench.sizes.conversations
    features = torch.randn(len(talks), max(bench.sizes.mixed_rounds), template.tokens_per_image, model.feature_dim)
    rows = [len(template.packed_row(talk).ids) for talk in talks]
    padded, packed = template.packed(talks), pack(template, talks, max(rows) + min(rows))
    alike = [
        template.packed([talks[place] for place in batch]) for batch in buckets(rows, padded.input_ids.numel() // 3)
    ]
    found = bench.measure(
        padded=Task(learn(model, [padded], features)),
        buckets=Task(learn(model, alike, features)),
        packed=Task(learn(model, [packed], features)),
    )
    limit = padded.input_ids.numel() / tokens_of(padded)
    lengths = ", ".join(map(str, bench.sizes.mixed_rounds))
    for name, way in (("packed", "in shared sequences"), ("buckets", "in batches of like length")):
        meaning = f"conversations of {lengths} rounds, padded over {way}; limit: ratio of tokens"
        bench.ratio(f"packing.{name}", found["padded"], found[name], limit, meaning)


# ---------------------------------------------------------------------------------------------------------
# rounds


def say(session: ChatSession, index: int) -> Task:
    """A new round of that index; before it the picture before was just made, and nothing more was read."""
    path = session.tokens.path()
    words = path[1].instruction

    def prepare() -> None:
        if index < 2:
            session.go_to(path[0].id)
        else:
            session.branch(path[index - 2].id, words)

    return Task(lambda: session.say(words), prepare)


def latency(bench: Bench) -> None:
    """A late round against an early one, with keys and values kept: reply, picture tokens, reading them."""
    early, late = bench.sizes.early, bench.sizes.late
    session = bench.session(bench.system(), late)
    found = bench.measure(early=say(session, early - 1), late=say(session, late - 1))
    bench.milliseconds("latency.early", found["early"], f"round {early}, cached")
    bench.milliseconds("latency.late", found["late"], f"round {late}, cached")
    meaning = f"round {late} over round {early}, cached; limit: ratio of new tokens"
    bench.ratio("latency.ratio", found["late"], found["early"], 1.0, meaning)


class Recompute:
    """A round without memory: stored pictures are encoded again, and the whole history is read again in one pass.

    The answer saves the same forward passes as with memory.

    Args:
        system: of the session.
        talk: the conversation.
        index: the round.
    """

    def __init__(self, system: System, talk: Conversation, index: int) -> None:
        self.system, self.talk, self.index = system, talk_to(talk, index), index
        template = system.template
        self.batch = template.prefix([self.talk], [index]).to(system.model.device)
        reply = template.reply(self.talk, index)
        self.start = self.batch.input_ids.shape[1] - template.tokens_per_image - len(reply)
        self.choose = forced(self.talk, template)

    def answer(self, features: Tensor) -> Tensor:
        """Tokens (1, N, D_feature) of the round's picture, from features (R, N, D_feature) of those before."""
        model, template = self.system.model, self.system.template
        features = features.to(model.device)
        embeds = model.embed(self.batch, features)[:, : self.start]  # (1, T, D)
        cache = PrefixCache(model, template.image_ids)
        hidden_states = cache.read(embeds, None, keep=True)  # (1, T, D)
        base = self.talk.rounds[self.index].base
        if base is not None:
            cache.pictures[base] = features[[base]]  # (1, N, D_feature)
        logits = model.base_llm.lm_head(hidden_states[:, -1])  # (1, V)
        return answer(cache, logits, template, self.index, self.choose).images

    def task(self, pictures: Tensor) -> Task:
        """Everything that the round costs, from stored pictures (R, 3, H, W) to the new one, uint8."""

        def run() -> Tensor:
            tokens = self.answer(self.system.encode(pictures))
            return (self.system.decode(tokens) * 255).round().to(torch.uint8)

        return Task(run)


def stored(bench: Bench, count: int) -> Tensor:
    """Pictures (R, 3, H, W) as a file would hold them; what they show does not matter."""
    size = bench.params.source.image_size
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def recompute(bench: Bench) -> None:
    """A late round, kept keys and values against pictures encoded again and a history read again.

    Without memory the new picture must be decoded, since pixels are what is remembered. With it, it may be: both are
    given, the round alone and the round with its picture shown.
    """
    system, late = bench.system(), bench.sizes.late
    session = bench.session(system, late)
    cached = say(session, late - 1)
    plain = Recompute(system, bench.talk(late), late - 1)

    def shown() -> None:
        cached.run()
        session.picture()

    found = bench.measure(cached=cached, shown=Task(shown, cached.prepare), plain=plain.task(stored(bench, late - 1)))
    limit = tokens_of(plain.batch) / (tokens_of(plain.batch) - plain_history(plain))
    bench.milliseconds("recompute.plain", found["plain"], f"round {late}, everything encoded and read again")
    meaning = f"round {late}, plain over cached; limit: tokens read, all over new ones"
    bench.ratio("recompute.ratio", found["plain"], found["cached"], limit, meaning)
    meaning = f"round {late}, plain over cached with its picture decoded; limit as before"
    bench.ratio("recompute.ratio_shown", found["plain"], found["shown"], limit, meaning)


def plain_history(plain: Recompute) -> int:
    """Tokens of the rounds before the last."""
    return int((plain.batch.rounds < plain.index).sum())


def queries(bench: Bench) -> None:
    """All query tokens of a picture in one forward pass, against one pass for each."""
    count = bench.sizes.queries
    model, template = bench.model(count)
    model.requires_grad_(False)
    cache = PrefixCache(model, template.image_ids)
    cache.read_text([template.prompt(bench.talk(1), 0)], 0)
    cache.read_images(torch.randn(1, count, model.feature_dim), 0)
    found = bench.measure(together=Task(cache.query), one_by_one=Task(lambda: one_by_one(cache)))
    meaning = f"{count} queries, token by token over one pass; limit: number of passes"
    bench.ratio("queries.ratio", found["one_by_one"], found["together"], float(count), meaning)


@torch.no_grad()
def one_by_one(cache: PrefixCache) -> Tensor:
    """What `query` gives (B, N, D_feature), with a forward pass for each query token; the history stays as it was."""
    fork, model = cache.fork(), cache.model
    ids = torch.tensor(cache.image_ids, device=cache.device).expand(cache.batch, -1)  # (B, N)
    embeds = model.embed_queries(ids, ids.new_zeros(0), ids.new_full((cache.batch,), -1))  # (B, N, D)
    hidden_states = torch.cat([fork.read(part, None, keep=True) for part in embeds.split(1, dim=1)], dim=1)
    return model.draw(hidden_states, ids.new_zeros(0), ids.new_full((cache.batch,), -1)).float()  # (B, N, D_feature)


# ---------------------------------------------------------------------------------------------------------
# undo, branches, memory


def undo(bench: Bench) -> None:
    """Going back, until the next instruction could be read: deep against shallow, and against a new round."""
    depth = bench.sizes.depth
    session = bench.session(bench.system(), depth + 1)
    path = session.tokens.path()

    def stand(id_: int) -> None:
        session.go_to(id_)
        session.prefix()

    def forward() -> None:
        stand(path[-1].id)
        session.prefixes.settle()

    def back(steps: int) -> Task:
        return Task(lambda: stand(path[-1 - steps].id), forward)

    def say_after_undo() -> None:
        stand(path[-2].id)
        session.say(path[1].instruction)

    found = bench.measure(
        shallow=back(1), deep=back(depth), round=say(session, depth), after=Task(say_after_undo, back(1).prepare)
    )
    bench.milliseconds("undo.shallow", found["shallow"], "undo of one round")
    meaning = f"undo of {depth} rounds over one; limit: both move a pointer"
    bench.ratio("undo.depth", found["deep"], found["shallow"], 1.0, meaning)
    bench.ratio("undo.share", found["shallow"], found["round"], 0.0, "undo over a new round; limit: no tokens are read")
    meaning = "undo and a new round over a new round; limit: the same tokens are read"
    bench.ratio("undo.then_round", found["after"], found["round"], 1.0, meaning)


def bytes_of_round(bench: Bench, system: System, tokens: int) -> int:
    """Bytes of a round of so many tokens: keys, values, features of its picture, which are padding, the position."""
    model = bench.params.model
    states = 2 * model.layers * model.hidden_size * tokens * 4
    return states + system.template.tokens_per_image * system.model.feature_dim * 4 + tokens + 8


def memory(bench: Bench) -> None:
    """Bytes of a branch, counted, against those of its own new tokens; and of a round at the sizes of SEED-X."""
    system, depth = bench.system(), bench.sizes.depth
    session = bench.session(system, depth)
    session.prefixes.settle()
    node, before = session.tokens.path()[-2], session.prefixes.nbytes
    made = session.branch(node.id, node.instruction)
    session.prefixes.settle()
    branch = session.prefixes.nbytes - before
    tokens = session.prefixes.segments[made.id].states.shape[4]
    own, whole = (
        bytes_of_round(bench, system, tokens),
        sum(session.prefixes.segments[n.id].nbytes for n in session.tokens.path()),
    )
    bench.number("memory.branch", branch / own, "x", "bytes of a branch over those of its own new tokens", 1.0)
    meaning = f"bytes of a branch of a round over a copy of its {len(session.tokens.path())} rounds; limit: own tokens"
    bench.number("memory.of_copy", branch / whole, "x", meaning, own / whole)
    bench.number("memory.round", branch / 2**20, "MiB", f"a cached round of {tokens} tokens, float32", own / 2**20)
    seedx = SeedXConfig()
    tokens += seedx.queries - system.template.tokens_per_image
    paper = 2 * seedx.model.layers * seedx.model.hidden_size * tokens * 2
    meaning = f"arithmetic: a cached round of {tokens} tokens at SEED-X's size, bfloat16"
    bench.number("memory.round_paper", paper / 2**20, "MiB", meaning)


# ---------------------------------------------------------------------------------------------------------
# pictures, growth


def world(bench: Bench) -> None:
    """Pictures drawn a second, in a batch."""
    sizes = bench.sizes
    source = data.open_source(SourceConfig(kind=bench.params.source.kind, image_size=sizes.image_size))
    generator = data.step_generator(SOURCE_DRAWS, 0)
    subjects = source.sample_subjects(sizes.pictures, "train", generator)  # (B, S)
    values = data.sample_values(source, sizes.pictures, generator)  # (B, A)
    found = bench.measure(render=Task(lambda: source.render(subjects, values)))
    speed, meaning = summary(sizes.pictures / found["render"]), f"drawn at {sizes.image_size} px"
    bench.results.append(Result(id="world.render", unit="pictures/s", meaning=meaning, **speed))


def growth(bench: Bench) -> None:
    """Cost of a round against its number, cached and recomputed, and of branches against how many there are."""
    system, sizes = bench.system(), bench.sizes
    session = bench.session(system, max(sizes.growth))
    last, rows = session.current, []
    for number in sizes.growth:
        session.go_to(last.id)
        plain = Recompute(system, bench.talk(number), number - 1)
        found = bench.measure(cached=say(session, number - 1), plain=plain.task(stored(bench, number - 1)))
        medians = {name: float(np.median(seconds)) for name, seconds in found.items()}
        rows.append({"rounds": float(number), **medians, "tokens": float(tokens_of(plain.batch))})
    bench.series["rounds"] = rows
    numbers, read = ([row[key] for row in rows] for key in ("rounds", "tokens"))
    for name, limit in (("cached", 0.0), ("plain", exponent(numbers, read))):
        meaning = f"exponent of a round's cost against its number, {name}; limit: that of the tokens read"
        bench.number(f"growth.{name}", exponent(numbers, [row[name] for row in rows]), "exponent", meaning, limit)
    forks(bench, system)


def forks(bench: Bench, system: System) -> None:
    """Grow branches of one round each from a picture, their pictures read as well; time and bytes of all of them."""
    rows = []
    for count in bench.sizes.forks:
        session = bench.session(system, bench.sizes.depth)
        session.prefixes.settle()
        root, before = session.current, session.prefixes.nbytes

        def grow(session: ChatSession = session, root: int = root.id, count: int = count) -> None:
            for _ in range(count):
                session.branch(root, "make it so")
                session.prefixes.settle()

        found = bench.measure(grow=Task(grow))["grow"]
        grown = (session.prefixes.nbytes - before) / (bench.repeats + bench.warmup)
        rows.append({"forks": float(count), "seconds": float(np.median(found)), "bytes": float(grown)})
    bench.series["forks"] = rows
    numbers = [row["forks"] for row in rows]
    for name in ("seconds", "bytes"):
        meaning = f"exponent of the {name} of branches against how many there are; limit: each costs its own tokens"
        bench.number(f"growth.forks_{name}", exponent(numbers, [row[name] for row in rows]), "exponent", meaning, 1.0)
