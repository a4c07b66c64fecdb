"""A session's keys and values: each round once, equal to recomputing whatever was evicted, bounded in bytes."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import FEATURES, MAX_ROUNDS, TOKENS, make_round, random_features, system

from nmlib.cache import TokenCache
from nmlib.chat import ChatSession
from nmlib.conversation import Conversation
from nmlib.prefix_cache import PrefixCache
from nmlib.prefix_tree import PrefixTree

SYSTEM = system()
MODEL, TEMPLATE = SYSTEM.model, SYSTEM.template
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LAYERS, WIDTH = MODEL.settings.layers, MODEL.settings.hidden_size
SAID = ("make the square red", "undo that", "paint the ground dark", "start over", "turn the shape blue please")


def session(max_bytes: int = 2**30) -> ChatSession:
    talk = ChatSession(SYSTEM, max_bytes=max_bytes)
    talk.upload(torch.full((3, 16, 16), 0.3))
    return talk


def recomputed(talk: ChatSession, folder: Path) -> ChatSession:
    """The session as it was before its last node, stored, loaded again, and told the same."""
    talk.tokens.save(folder / "talk.safetensors")
    other = ChatSession(SYSTEM)
    other.tokens = TokenCache.load(folder / "talk.safetensors")
    other.undo()
    other.say(talk.current.instruction)
    return other


def check(tree: PrefixTree) -> None:
    """What holds at all times: within the bound, and no round is kept whose earlier rounds are not."""
    assert tree.nbytes <= tree.max_bytes
    assert all(part.parent is None or part.parent in tree.segments for part in tree.segments.values())


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rounds_kept=st.sampled_from([0, 1, 3, 99]),
    steps=st.lists(st.sampled_from(["say", "undo", "go_to", "branch", "load"]), min_size=2, max_size=8),
)
def test_a_session_equals_recomputing_over_any_tree(
    seed: int, rounds_kept: int, steps: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, rng, talk = tmp_path_factory.mktemp("tree"), random.Random(seed), session(9000 * rounds_kept)
    for step in steps:
        node = rng.randrange(len(talk.tokens))
        if step == "undo" and talk.current.parent is not None:
            talk.undo()
        elif step == "go_to":
            talk.go_to(node)
        elif step == "load":
            talk.tokens.save(folder / "other.safetensors")
            talk = session(9000 * rounds_kept)
            talk.tokens = TokenCache.load(folder / "other.safetensors")
        elif step in ("say", "branch") and len(talk.tokens.path()) < MAX_ROUNDS:
            talk.go_to(node if step == "branch" and len(talk.tokens.path(node)) < MAX_ROUNDS else talk.current.id)
            made = talk.say(rng.choice(SAID))
            other = recomputed(talk, folder)
            assert other.current.response == made.response
            torch.testing.assert_close(talk.tokens.tokens(made.id), other.tokens.tokens(other.current.id), **CLOSE)
        check(talk.prefixes)


# ---------------------------------------------------------------------------------------------------------
# the tree alone


def empty() -> PrefixCache:
    return PrefixCache(MODEL, TEMPLATE.image_ids)


class Counted:
    """A tree of rounds that are made from their node's number, and how many of them were read."""

    def __init__(self, max_bytes: int = 2**30) -> None:
        self.tree, self.read = PrefixTree(empty, max_bytes), 0

    def visit(self, *path: int) -> PrefixCache:
        cache, known = self.tree.resume(path)
        for index, node in enumerate(path[known:], known):
            words = " ".join(["red"] * (node % 3 + 1))
            talk = Conversation("x", "toy", (*[make_round("edit", "x", 0)] * index, make_round("edit", words, 0)))
            cache.read_text([TEMPLATE.prompt(talk, index)], index)
            cache.read_images(random_features(2, 1, node)[:1, 0], index)  # a part of a larger storage
            self.tree.keep(node, cache)
            self.read += 1
        check(self.tree)
        return cache


def size(tokens: int) -> int:
    """Bytes of a round of so many tokens, counted by hand."""
    return 2 * LAYERS * tokens * WIDTH * 4 + TOKENS * FEATURES * 4 + tokens + 8


def test_bytes_by_hand() -> None:
    """`[INST] red red [/INST]` and a picture of 4 tokens are 8 tokens; the first round also has `<s>`."""
    counted = Counted()
    counted.visit(3)  # <s> [INST] red [/INST] and 4
    assert counted.tree.nbytes == size(8)
    counted.visit(3, 1)
    assert counted.tree.nbytes == size(8) + size(8)
    counted.visit(3, 2)  # a branch: three words
    assert counted.tree.nbytes == size(8) + size(8) + size(9)
    assert size(8) == 2 * 2 * 8 * 24 * 4 + 4 * 20 * 4 + 8 + 8


def test_a_stored_round_holds_on_to_nothing_else() -> None:
    counted = Counted()
    counted.visit(0, 1, 2)
    for segment in counted.tree.segments.values():
        for part in (segment.states, segment.visible, segment.position, segment.picture):
            assert part.untyped_storage().nbytes() == part.nbytes


def test_the_longest_beginning_is_used_and_going_back_copies_nothing() -> None:
    counted = Counted()
    cache = counted.visit(0, 1, 2, 3)
    place, there = cache.states.layers[0].keys.data_ptr(), cache.query()
    assert counted.visit(0, 1).states.layers[0].keys.data_ptr() == place and counted.read == 4
    torch.testing.assert_close(counted.visit(0, 1).query(), Counted().visit(0, 1).query(), **CLOSE)
    torch.testing.assert_close(counted.visit(0, 1, 2, 3).query(), there, **CLOSE)
    assert counted.read == 4, "everything was there"
    counted.visit(0, 1, 5)
    assert counted.read == 5
    torch.testing.assert_close(counted.visit(0, 1, 2, 3).query(), there, **CLOSE)
    counted.visit(9)
    assert counted.read == 6 and counted.tree.resume([])[1] == 0


def test_every_picture_of_a_branch_is_one_to_start_from() -> None:
    """Read, kept by the working copy, or brought back from the tree: round r has the picture of its node."""
    counted = Counted()
    counted.visit(0, 1, 2, 3)
    counted.visit(0, 4)
    for path in ((0, 4), (0, 1), (0, 1, 2, 3), (0, 1), (0, 4)):
        cache, fresh = counted.visit(*path), Counted().visit(*path)
        assert list(cache.pictures) == list(range(len(path)))
        for index, node in enumerate(path):
            assert torch.equal(cache.pictures[index], random_features(2, 1, node)[:1, 0])
            torch.testing.assert_close(cache.query([index]), fresh.query([index]), **CLOSE)
    assert counted.read == 5, "everything was there"


def test_words_that_were_read_and_not_kept_are_forgotten() -> None:
    counted = Counted()
    expected = counted.visit(0, 1).query()
    counted.visit(0, 1).read_text([TEMPLATE.encode("undo that")], 2)
    torch.testing.assert_close(counted.visit(0, 1).query(), expected, **CLOSE)


def test_the_leaf_used_least_recently_goes_first_and_comes_back_equal() -> None:
    counted = Counted(3 * size(9))
    counted.visit(0, 1)
    counted.visit(0, 2)
    counted.visit(0, 1)
    counted.visit(0, 4)  # room for three: 2 was used less recently than 1
    assert set(counted.tree.segments) == {0, 1, 4} and counted.read == 4
    torch.testing.assert_close(counted.visit(0, 2).query(), Counted().visit(0, 2).query(), **CLOSE)
    assert counted.read == 5 and set(counted.tree.segments) == {0, 4, 2}


def test_a_bound_below_one_round_stores_nothing_and_still_goes_on() -> None:
    counted = Counted(1)
    counted.visit(0, 1)
    counted.visit(0, 1, 2)
    assert counted.tree.nbytes == 0 and counted.read == 3, "the working copy goes on"
    counted.visit(7)
    counted.visit(0, 1, 2)
    assert counted.read == 7, "what has gone is read again"


def test_padding_and_batches_survive_the_tree() -> None:
    tree = PrefixTree(lambda: PrefixCache(MODEL, TEMPLATE.image_ids, 2))
    cache, _ = tree.resume([])
    texts = [TEMPLATE.encode("[INST] undo [/INST]"), TEMPLATE.encode("[INST] make the square red [/INST]")]
    for node in (0, 1):
        cache.read_text(texts, node)
        cache.read_images(torch.zeros(2, TOKENS, FEATURES), node)
        tree.keep(node, cache)
    expected = cache.query()
    tree.resume([])
    again, known = tree.resume([0, 1])
    assert known == 2 and again is not cache
    assert again.position.tolist() == [2 * (3 + TOKENS), 2 * (6 + TOKENS)]
    torch.testing.assert_close(again.query(), expected, **CLOSE)


def test_a_round_is_stored_when_its_picture_was_read_and_comes_back_equal_before(tmp_path: Path) -> None:
    """Nothing is read before it is needed: a round that nobody went on from is read again with what follows it."""
    talk = session()
    first = talk.say(SAID[0])
    assert set(talk.prefixes.segments) == {0}, "its own picture was read by nobody yet"
    talk.say(SAID[1])
    assert set(talk.prefixes.segments) == {0, 1}
    talk.branch(0, SAID[2])
    talk.go_to(first.id)
    assert set(talk.prefixes.segments) == {0, 1}
    talk.go_to(2)
    after = talk.say(SAID[3])
    other = recomputed(talk, tmp_path)
    torch.testing.assert_close(talk.tokens.tokens(after.id), other.tokens.tokens(other.current.id), **CLOSE)
    assert set(talk.prefixes.segments) == {0, 1, 2}
    talk.prefixes.settle()
    assert set(talk.prefixes.segments) == {0, 1, 2, after.id}
    talk.prefixes.settle()
    PrefixTree(empty).settle()
