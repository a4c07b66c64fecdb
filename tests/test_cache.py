"""What is remembered: tokens bit for bit in a tree, keys and values equal to recomputing."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import FEATURES, MAX_ROUNDS, TOKENS, make_model, make_round, raised, random_features, system

from nmlib import checkpoint
from nmlib.cache import CacheError, TokenCache
from nmlib.checkpoint import CheckpointError
from nmlib.conversation import Conversation
from nmlib.layout import BOI
from nmlib.prefix_cache import PrefixCache

MODEL, TEMPLATE = system().model, system().template
WORDS = "make the square red paint ground dark undo that and then".split()
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# ---------------------------------------------------------------------------------------------------------
# keys and values


class Told:
    """Histories side by side as the cache has read them, and as conversations from which all can be recomputed."""

    def __init__(self, batch: int, features: Tensor) -> None:
        self.cache = PrefixCache(MODEL, TEMPLATE.image_ids, batch)
        self.conversations = [Conversation(str(row), "toy", ()) for row in range(batch)]
        self.features = features  # (B, R, N, D_feature), filled as rounds are told

    def tell(self, rng: random.Random) -> "Told":
        """A fork with one more round, whose pictures are given; what the model would have drawn is compared."""
        other = Told.__new__(Told)
        other.cache, other.features, other.conversations = self.cache.fork(), self.features.clone(), []
        index = len(self.conversations[0])
        for conversation in self.conversations:
            text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 9)))
            kind = "edit" if index else "describe"
            item = make_round(kind, text, rng.randrange(index) if index else None)
            other.conversations.append(Conversation(conversation.id, "toy", (*conversation.rounds, item)))
        other.features[:, index] = random_features(len(self.conversations), 1, rng.randrange(999))[:, 0]
        logits = other.cache.read_text([TEMPLATE.prompt(c, index) for c in other.conversations], index)
        other.cache.read_text([TEMPLATE.reply(c, index) for c in other.conversations], index)
        images, expected = other.recomputed(index)
        bases = [c.rounds[index].base for c in other.conversations]
        torch.testing.assert_close(other.cache.query(bases), images, **CLOSE)
        torch.testing.assert_close(logits, expected, **CLOSE)
        other.cache.read_images(other.features[:, index], index)
        other.cache.read_text([TEMPLATE.closing(c, index) for c in other.conversations], index)
        return other

    @torch.no_grad()
    def recomputed(self, index: int) -> tuple[Tensor, Tensor]:
        """Images of a round and logits after its instruction, from one pass over the whole sequence."""
        batch = TEMPLATE.prefix(self.conversations, [index] * len(self.conversations))
        images, logits, *_ = MODEL.predict(batch, self.features[batch.history[:, 0], batch.history[:, 1]])
        firsts, offset = [], 0
        for row in batch.labels:
            firsts.append(logits[offset])
            offset += int((row != -100).sum())
        return images, torch.stack(firsts)


@settings(max_examples=25, deadline=None)
@given(batch=st.sampled_from([1, 3]), seed=st.integers(0, 10**6), choices=st.lists(st.integers(0, 99), max_size=8))
def test_cached_equals_recomputed_over_trees_of_histories(batch: int, seed: int, choices: list[int]) -> None:
    """Every choice forks any earlier history and goes on there; no fork changes what another one predicts."""
    rng = random.Random(seed)
    blank = torch.zeros(batch, MAX_ROUNDS, TOKENS, FEATURES)
    histories = [Told(batch, blank).tell(rng)]
    answers = [histories[0].cache.query()]
    for choice in choices:
        origin = histories[choice % len(histories)]
        if len(origin.conversations[0]) < MAX_ROUNDS:
            histories.append(origin.tell(rng))
            answers.append(histories[-1].cache.query())
    for history, answer in zip(histories, answers, strict=True):
        assert torch.equal(history.cache.query(), answer)


def told(rounds: int = 2, batch: int = 2) -> Told:
    history, rng = Told(batch, torch.zeros(batch, MAX_ROUNDS, TOKENS, FEATURES)), random.Random(5)
    for _ in range(rounds):
        history = history.tell(rng)
    return history


def storage(cache: PrefixCache) -> list[int]:
    """Addresses of all keys and values, without making any."""
    return [tensor.data_ptr() for layer in cache.states.layers for tensor in (layer.keys, layer.values)]


def test_query_leaves_the_history_as_it_was() -> None:
    cache = told().cache
    length, position, visible = cache.states.get_seq_length(), cache.position.clone(), cache.visible.clone()
    first = cache.query()
    assert cache.states.get_seq_length() == length
    assert torch.equal(cache.position, position) and torch.equal(cache.visible, visible)
    assert torch.equal(cache.query(), first)


def test_what_is_added_is_read_in_the_pass_of_what_comes_next() -> None:
    """Texts of unequal length and pictures, added or read one by one: the same history, in one pass."""
    texts = [[TEMPLATE.encode("<s> [INST] undo"), TEMPLATE.encode("<s> [INST] make the square red")]] * 2
    features, caches = random_features(2, 2), [PrefixCache(MODEL, TEMPLATE.image_ids, 2) for _ in range(2)]
    passes: list[int] = []
    hook = MODEL.base_llm.model.register_forward_hook(lambda *_: passes.append(1))
    logits = []
    for cache, at_once in zip(caches, (False, True), strict=True):
        for index in range(2):
            (cache.add_text if at_once else cache.read_text)(texts[index], index)
            (cache.add_images if at_once else cache.read_images)(features[:, index], index)
        logits.append(cache.read_text(texts[0], 2))
    hook.remove()
    assert len(passes) == 5 + 1
    assert caches[0].length == caches[1].length == caches[1].length_read
    assert torch.equal(caches[0].visible, caches[1].visible) and torch.equal(caches[0].position, caches[1].position)
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)
    torch.testing.assert_close(caches[1].query([0, None]), caches[0].query([0, None]), **CLOSE)


def test_what_was_not_read_yet_is_forked_asked_and_forgotten_alike() -> None:
    cache, read = (PrefixCache(MODEL, TEMPLATE.image_ids) for _ in range(2))
    for each in (cache, read):
        each.read_text([TEMPLATE.encode("<s> [INST] undo [/INST]")], 0)
        each.add_images(random_features(1, 1)[0], 0)
        each.end_round(0)
    read.settle()
    fork, short = cache.fork(), cache.fork()
    assert cache.length == read.length == 4 + TOKENS and cache.length_read == 4 and fork.length_read == 4
    torch.testing.assert_close(cache.query(), read.query(), **CLOSE)
    assert cache.length_read == 4 + TOKENS and fork.length_read == 4, "a fork reads on its own"
    fork.add_text([TEMPLATE.encode("make the square red")], 1)
    fork.back_to(1)
    torch.testing.assert_close(fork.query(), read.query(), **CLOSE)
    short.cut(TOKENS)
    assert short.length == short.length_read == 4 and short.position.tolist() == [4] and not short.unread
    fork.cut(TOKENS + 1)
    assert fork.length == fork.length_read == 3 and fork.position.tolist() == [3]
    fork.read_text([TEMPLATE.encode("[/INST]")], 0)
    torch.testing.assert_close(fork.query(), short.query(), **CLOSE)


def test_an_empty_history_can_be_asked() -> None:
    cache = PrefixCache(MODEL, TEMPLATE.image_ids)
    assert torch.equal(cache.query(), cache.query())


@torch.no_grad()
def test_one_pass_over_the_query_tokens_equals_one_by_one() -> None:
    cache = told().cache
    cache.read_text([TEMPLATE.encode(f"[INST] make the square red [/INST] red colour #2 to #3 {BOI}")] * 2, 2)
    expected, stepwise = cache.query(), cache.fork()
    hidden = []
    for word in TEMPLATE.image_ids:
        embeds = MODEL.base_llm.get_input_embeddings()(torch.tensor([[word]] * 2))
        hidden.append(stepwise.read(embeds, torch.ones(2, 1, dtype=torch.bool), keep=True))
    torch.testing.assert_close(MODEL.output_resampler(torch.cat(hidden, dim=1)), expected, **CLOSE)


def test_a_fork_shares_every_tensor_and_grows_on_its_own() -> None:
    origin = told().cache
    fork, sibling = origin.fork(), origin.fork()
    assert storage(fork) == storage(origin) == storage(sibling)
    assert fork.visible.data_ptr() == origin.visible.data_ptr()
    before, length = origin.query(), origin.states.get_seq_length()
    fork.read_text([TEMPLATE.encode("make the square red")] * 2, 2)
    sibling.read_text([TEMPLATE.encode("undo that")] * 2, 2)
    assert origin.states.get_seq_length() == length
    assert fork.states.get_seq_length() == length + 4 and sibling.states.get_seq_length() == length + 2
    assert torch.equal(origin.query(), before)
    assert not torch.equal(fork.query(), sibling.query())


def test_a_history_that_nobody_shares_grows_in_place() -> None:
    cache = PrefixCache(MODEL, TEMPLATE.image_ids)
    cache.read_text([TEMPLATE.encode("<s> [INST] undo [/INST]")], 0)
    place = storage(cache)
    for _ in range(9):
        cache.read_text([TEMPLATE.encode("make the square red")], 0)
        cache.query()
    assert cache.length == 40 and storage(cache) == place
    fork = cache.fork()
    fork.read_text([TEMPLATE.encode("undo")], 0)
    assert storage(cache) == place, "the fork moved"
    assert not set(storage(fork)) & set(place)
    held = [(layer.keys, layer.values) for layer in cache.states.layers]  # so that their places are not given away
    for _ in range(30):
        cache.read_text([TEMPLATE.encode("make the square red")], 0)
    assert len(held) == 2 and cache.states.get_seq_length() == 160 and not set(storage(cache)) & set(place)


def test_texts_of_unequal_length_do_not_disturb_each_other() -> None:
    texts = [TEMPLATE.encode("<s> [INST] make the square red [/INST]"), TEMPLATE.encode("<s> [INST] undo [/INST]")]
    together = PrefixCache(MODEL, TEMPLATE.image_ids, 2)
    logits = together.read_text(texts, 0)
    for row, text in enumerate(texts):
        alone = PrefixCache(MODEL, TEMPLATE.image_ids)
        torch.testing.assert_close(alone.read_text([text], 0)[0], logits[row], **CLOSE)
        torch.testing.assert_close(alone.query()[0], together.query()[row], **CLOSE)
    assert together.position.tolist() == [len(text) for text in texts]


def test_a_row_without_words_stays_where_it_is() -> None:
    both = PrefixCache(MODEL, TEMPLATE.image_ids, 2)
    both.read_text([TEMPLATE.encode("<s> [INST] undo [/INST]")] * 2, 0)
    before = both.query()
    both.read_text([[], TEMPLATE.encode("#1 to #2")], 0)
    torch.testing.assert_close(both.query()[0], before[0], **CLOSE)
    assert not torch.allclose(both.query()[1], before[1], **CLOSE)


def test_history_carries_the_marker_of_its_round() -> None:
    first, third = (PrefixCache(MODEL, TEMPLATE.image_ids) for _ in range(2))
    feature = random_features(1, 1)[0]
    first.read_images(feature, 0)
    third.read_images(feature, 2)
    assert not torch.allclose(first.query(), third.query(), **CLOSE)


def test_the_cache_works_with_lora_attached() -> None:
    model, template = make_model(1)
    plain = PrefixCache(model, template.image_ids)
    plain.read_text([template.encode("<s> [INST] undo [/INST]")], 0)
    model.add_lora()
    cache = PrefixCache(model, template.image_ids)
    cache.read_text([template.encode("<s> [INST] undo [/INST]")], 0)
    torch.testing.assert_close(cache.query(), plain.query(), **CLOSE)


# ---------------------------------------------------------------------------------------------------------
# tokens


def grown() -> TokenCache:
    """0 - 1 - 2 and a branch 0 - 1 - 3, the pointer at 3."""
    cache = TokenCache()
    for index, words in enumerate(("here is a picture", "make it red", "make it blue")):
        kind, base = ("say", index - 1) if index else ("upload", None)
        tokens = random_features(1, 1, index)[0, 0]
        cache.append(tokens, kind=kind, instruction=words, response="", base=base, seed=index)
    cache.go_to(1)
    tokens = random_features(1, 1, 3)[0, 0]
    cache.append(tokens, kind="say", instruction="wer ist das? ü", response="#3 from #2", base=1, seed=7)
    return cache


def test_tokens_are_kept_bit_for_bit_and_are_a_copy() -> None:
    cache, tokens = TokenCache(), random_features(1, 1)[0, 0] * 1e-30
    kept = tokens.clone()
    cache.append(tokens, kind="upload", instruction="x", response="", base=None, seed=0)
    tokens.zero_()
    assert torch.equal(cache.tokens(0), kept)


def test_tree_path_children_undo_and_go_to() -> None:
    cache = grown()
    assert len(cache) == 4 and cache.current == 3
    assert [node.id for node in cache.path()] == [0, 1, 3] and [node.id for node in cache.path(2)] == [0, 1, 2]
    assert [node.id for node in cache.children(1)] == [2, 3] and cache.children(3) == []
    assert cache.undo().id == 1 and cache.undo().id == 0 and cache.current == 0
    assert cache.go_to(2).instruction == "make it blue" and cache.current == 2
    assert cache.node(3).parent == 1


def test_save_and_load_is_bit_for_bit(tmp_path: Path) -> None:
    cache = grown()
    cache.undo()
    cache.save(tmp_path / "session.safetensors")
    loaded = TokenCache.load(tmp_path / "session.safetensors")
    assert loaded.nodes == cache.nodes and loaded.current == cache.current == 1
    for id_ in range(4):
        assert torch.equal(loaded.tokens(id_), cache.tokens(id_)) and loaded.tokens(id_).dtype == torch.float32
    loaded.append(loaded.tokens(0), kind="say", instruction="on", response="", base=0, seed=0)
    assert loaded.node(4).parent == 1


def test_an_empty_session_can_be_saved(tmp_path: Path) -> None:
    TokenCache().save(tmp_path / "empty.safetensors")
    loaded = TokenCache.load(tmp_path / "empty.safetensors")
    assert len(loaded) == 0 and loaded.current is None


def test_errors_say_what_is_there() -> None:
    cache = grown()
    assert raised(lambda: cache.go_to(4), CacheError) == "no picture 4 in this session; it has 0 to 3"
    assert raised(lambda: cache.tokens(-1), CacheError) == "no picture -1 in this session; it has 0 to 3"
    cache.go_to(0)
    assert raised(cache.undo, CacheError) == "nothing to undo: this is the first picture of the session"
    assert cache.current == 0, "a failed undo leaves the pointer"
    empty = TokenCache()
    assert "nothing to undo" in raised(empty.undo, CacheError)
    assert raised(lambda: empty.go_to(0), CacheError) == "no picture 0 in this session; it is empty"


def test_a_file_that_is_no_session_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    checkpoint.save(path, {"weight": torch.zeros(3)}, {"settings": {}})
    assert "other.safetensors: holds no session" in raised(lambda: TokenCache.load(path), CheckpointError)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        TokenCache.load(tmp_path / "none.safetensors")
