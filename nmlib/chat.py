"""Conversations with the model: one session a person can have, and many at once for evaluation.

`ChatSession` offers `say`, `undo`, `go_to` and `branch`; notebooks, command line and demos all use it. `rollout`
runs whole conversations in a batch, the model reading its own pictures under a history policy.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nmlib import phrases
from nmlib.answer import Choose, answer
from nmlib.cache import CacheError, Node, TokenCache
from nmlib.conversation import PICTURE_ERRORS, Conversation, ConversationError, Round, from_picture, to_picture
from nmlib.detokenizer import Detokenizer
from nmlib.layout import BOI, Template
from nmlib.mllm import HistoryMLLM
from nmlib.prefix_cache import PrefixCache
from nmlib.prefix_tree import MAX_BYTES, PrefixTree
from nmlib.vision import VisionTransformer

Policy = Literal["tokens", "prefix", "reencode", "oracle"]
POLICIES: tuple[Policy, ...] = ("reencode", "tokens", "prefix", "oracle")


@dataclass(frozen=True)
class System:
    """Everything that a conversation needs: encoder, model, template and detokenizer."""

    encoder: VisionTransformer
    detokenizer: Detokenizer
    model: HistoryMLLM
    template: Template
    image_size: int

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 or float, to features (B, N, D_feature)."""
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images
        return torch.cat([self.encoder(part) for part in scaled.split(256)])

    def decode(self, tokens: Tensor, seed: int = 0) -> Tensor:
        """Features (B, N, D_feature) to pictures (B, 3, H, W) in [0, 1]."""
        return torch.cat([self.detokenizer.decode(part, seed=seed) for part in tokens.split(256)])


class Rollout(NamedTuple):
    """What the model made of a batch of conversations.

    Args:
        predictions: (B, R, N, D_feature); uploads hold their true features.
        replies: for each round, the texts said before its pictures.
    """

    predictions: Tensor
    replies: list[list[str]]

    def bases(self, index: int) -> list[int | None]:
        """The base that each reply of a round names."""
        return [phrases.base_of_response(text, index) for text in self.replies[index]]


@torch.no_grad()
def rollout(
    model: HistoryMLLM,
    template: Template,
    conversations: Sequence[Conversation],
    features: Tensor,
    history: Callable[[Tensor, Tensor], Tensor] | None = None,
    recompute: bool = False,
) -> Rollout:
    """Run conversations of equal length side by side, the model speaking and reading its own pictures.

    Args:
        model: in evaluation mode.
        template: of the model.
        conversations: B conversations of R rounds; only their instructions and uploads are used.
        features: (B, R, N, D_feature) true features, used for uploads and by the oracle.
        history: (predicted, true) -> tokens (B, N, D_feature) to remember; None remembers what was predicted.
        recompute: read the whole history again at every round instead of keeping keys and values.
    """
    length = len(conversations[0])
    if any(len(conversation) != length for conversation in conversations):
        raise ConversationError("rollout: conversations of unequal length; group them by `len(conversation)`")
    if length > model.settings.max_rounds:
        raise ConversationError(f"rollout: {length} rounds; the model was made for {model.settings.max_rounds}")
    cache = PrefixCache(model, template.image_ids, len(conversations))
    predictions, remembered = features.clone(), features.clone()  # (B, R, N, D_feature)
    replies: list[list[str]] = []
    for index in range(length):
        if recompute:
            cache = PrefixCache(model, template.image_ids, len(conversations))
            for earlier in range(index):
                cache.add_text([template.prompt(conversation, earlier) for conversation in conversations], earlier)
                if not _is_upload(conversations, earlier):
                    cache.add_text([template.encode(f"{reply} {BOI}") for reply in replies[earlier]], earlier)
                _close_round(cache, template, conversations, remembered[:, earlier], earlier)
        prompts = [template.prompt(conversation, index) for conversation in conversations]
        if _is_upload(conversations, index):
            cache.add_text(prompts, index)
            replies.append([""] * len(conversations))
        else:
            said, own = answer(cache, cache.read_text(prompts, index), template, index)
            replies.append(said)
            predictions[:, index] = own
            remembered[:, index] = own if history is None else history(own, features[:, index])
        if index < length - 1:
            _close_round(cache, template, conversations, remembered[:, index], index)
    return Rollout(predictions, replies)


def _is_upload(conversations: Sequence[Conversation], index: int) -> bool:
    kinds = {conversation.rounds[index].is_brought for conversation in conversations}
    if len(kinds) != 1:
        raise ConversationError(f"rollout: round {index} is an upload in some conversations and not in others")
    return kinds.pop()


def _close_round(
    cache: PrefixCache, template: Template, conversations: Sequence[Conversation], tokens: Tensor, index: int
) -> None:
    cache.add_images(tokens, index)
    cache.add_text([template.closing(conversation, index) for conversation in conversations], index)


def history_policy(system: System, policy: Policy) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What each policy remembers of a predicted picture.

    Args:
        system: decodes and encodes.
        policy: `reencode` decodes to 8-bit pixels and encodes again; `tokens` and `prefix` keep the prediction (as
            tokens, or as keys and values); `oracle` takes the true features.
    """
    if policy == "reencode":
        return lambda predicted, true: system.encode((system.decode(predicted) * 255).round().to(torch.uint8))
    if policy == "oracle":
        return lambda predicted, true: true
    return None


class ChatSession:
    """A conversation with the model that can be undone and branched.

    Args:
        system: encoder, model and detokenizer.
        seed: of the detokenizer's noise.
        max_bytes: largest size of the keys and values that are kept, see `PrefixTree`.
        choose: picks the words of replies; the likeliest by default.
    """

    def __init__(self, system: System, seed: int = 0, max_bytes: int = MAX_BYTES, choose: Choose | None = None) -> None:
        self.system, self.seed, self._choose = system, seed, choose
        self.tokens = TokenCache()
        self.prefixes = PrefixTree(lambda: PrefixCache(system.model, system.template.image_ids), max_bytes)

    @property
    def current(self) -> Node:
        """The node that is shown now."""
        if self.tokens.current is None:
            raise ConversationError("this session is empty; begin with upload(picture)")
        return self.tokens.node(self.tokens.current)

    def upload(self, picture: Image.Image | Tensor | Path, instruction: str = "here is a picture") -> Node:
        """Begin with a picture of one's own.

        Args:
            picture: a PIL picture, a file, or a tensor (3, H, W).
            instruction: what is said with it.

        Raises:
            ConversationError: the file is no picture, or the session has begun already.
        """
        if self.tokens.current is not None:
            raise ConversationError("this session has a first picture already; start a new one for another")
        features = self.system.encode(self._load(picture)[None])[0]  # (N, D_feature)
        return self._remember(features, "upload", phrases.clean(instruction), "", None)

    def _load(self, picture: Image.Image | Tensor | Path) -> Tensor:
        if isinstance(picture, Tensor):
            return picture
        if isinstance(picture, Path):
            try:
                with Image.open(picture) as opened:
                    return from_picture(opened, str(picture), self.system.image_size)
            except ConversationError:
                raise
            except PICTURE_ERRORS as error:
                raise ConversationError(f"{picture}: cannot be read as a picture ({error})") from None
        return from_picture(picture, "upload", self.system.image_size)

    def say(self, instruction: str) -> Node:
        """Ask for the next picture; the answer becomes the current node.

        Args:
            instruction: anything; words that the model never saw are read as unknown.
        """
        text = phrases.clean(instruction)
        if not text:
            raise ConversationError(f"instruction {instruction!r} has no words; say what to change")
        index, most = len(self.tokens.path()), self.system.model.settings.max_rounds
        if index >= most:
            raise ConversationError(f"this branch has {index} pictures, the most the model can count; go back to one")
        kind = "edit" if index else "describe"
        cache = self.prefix()
        conversation = self._conversation([*self.tokens.path(), Node(-1, None, kind, text, "", None, self.seed)])
        logits = cache.read_text([self.system.template.prompt(conversation, index)], index)
        [response], features = answer(cache, logits, self.system.template, index, self._choose)
        return self._remember(features[0], kind, text, response, self._base(response), cache)

    def _base(self, response: str) -> int | None:
        path = self.tokens.path() if self.tokens.current is not None else []
        named = phrases.base_of_response(response, len(path))
        return None if named is None else path[named].id

    def _remember(
        self, features: Tensor, kind: str, text: str, response: str, base: int | None, cache: PrefixCache | None = None
    ) -> Node:
        node = self.tokens.append(features, kind=kind, instruction=text, response=response, base=base, seed=self.seed)
        if cache is not None:
            self._close(cache, len(self.tokens.path()) - 1)
            self.prefixes.keep(node.id, cache)
        return node

    def _conversation(self, nodes: Sequence[Node]) -> Conversation:
        rounds = tuple(
            Round(node.instruction, node.kind if node.kind in ("upload", "describe") else "edit", None)  # type: ignore[arg-type]
            for node in nodes
        )
        return Conversation("session", "chat", rounds)

    def _close(self, cache: PrefixCache, index: int) -> None:
        """Add the history block of the node at `index` of the current path to a cache."""
        path = self.tokens.path()
        cache.add_images(self.tokens.tokens(path[index].id)[None], index)
        cache.add_text([self.system.template.closing(self._conversation(path), index)], index)

    def prefix(self) -> PrefixCache:
        """The history up to the current node, good until the next call; what is not stored is read with what comes."""
        path = self.tokens.path() if self.tokens.current is not None else []
        cache, known = self.prefixes.resume([node.id for node in path])
        for index in range(known, len(path)):
            conversation = self._conversation(path[: index + 1])
            cache.add_text([self.system.template.prompt(conversation, index)], index)
            if path[index].kind != "upload":
                cache.add_text([self.system.template.encode(f"{path[index].response} {BOI}")], index)
            self._close(cache, index)
            self.prefixes.keep(path[index].id, cache)
        return cache

    def undo(self) -> Node:
        """Go back to the node before the current one: the same tokens and pixels, bit for bit."""
        return self.tokens.undo()

    def go_to(self, id_: int) -> Node:
        """Go to any node of the session."""
        return self.tokens.go_to(id_)

    def branch(self, id_: int, instruction: str) -> Node:
        """Go to a node and ask for something else from there; where that fails, stay at the current node."""
        before = self.tokens.current
        self.go_to(id_)
        try:
            return self.say(instruction)
        except BaseException:
            self.tokens.current = before
            raise

    def picture(self, id_: int | None = None) -> Image.Image:
        """The picture of a node, the current one by default; a function of its tokens and seed alone."""
        node = self.current if id_ is None else self.tokens.node(id_)
        return to_picture(self.system.decode(self.tokens.tokens(node.id)[None], seed=node.seed)[0])


HELP = "say anything; /undo, /go N, /branch N WORDS, /tree, /quit; N as /tree counts, from 0"


def repl(session: ChatSession, folder: Path) -> None:
    """Talk on the terminal; every picture is written to `folder` as `NNN.png`.

    Args:
        session: a session that has a first picture.
        folder: takes the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    print(HELP)
    _show(session, folder)
    for line in lines_typed():
        try:
            _obey(session, line)
        except (ConversationError, CacheError, ValueError) as error:
            print(error)
        _show(session, folder)


def lines_typed() -> Iterator[str]:
    """Lines from the terminal, until it ends or one says `/quit`."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        yield line


def _show(session: ChatSession, folder: Path) -> None:
    """Write the current picture, and say where."""
    node = session.current
    path = folder / f"{node.id:03d}.png"
    session.picture().save(path)
    came = "" if node.base is None else f", from picture {node.base}"
    print(f"[{node.id}] {path}{came}")


def _obey(session: ChatSession, line: str) -> None:
    """Carry out one line of the terminal."""
    word, _, rest = line.partition(" ")
    if word == "/undo":
        session.undo()
    elif word == "/go":
        session.go_to(int(rest))
    elif word == "/branch":
        number, _, instruction = rest.partition(" ")
        session.branch(int(number), instruction)
    elif word == "/tree":
        for node in session.tokens.nodes:
            print(f"{node.id:3d} after {node.parent}: {node.instruction}")
    elif word.startswith("/"):
        print(HELP)
    else:
        session.say(line)
