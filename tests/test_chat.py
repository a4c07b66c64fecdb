"""Talking with the model: many conversations at once, one session with undo and branches, and what can go wrong."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from toy import FEATURES, MAX_ROUNDS, SOURCE, TOKENS, conversations, draw, raised, random_features, random_tree, system

from nmlib import answer as answering
from nmlib.answer import MAX_REPLY, Choose, answer, foresee
from nmlib.cache import CacheError, TokenCache
from nmlib.chat import HELP, ChatSession, history_policy, repl, rollout
from nmlib.conversation import Conversation, ConversationError, from_picture, to_picture
from nmlib.layout import BOI
from nmlib.prefix_cache import PrefixCache

SYSTEM = system()
MODEL, TEMPLATE = SYSTEM.model, SYSTEM.template
BANNED = [*TEMPLATE.image_ids, TEMPLATE.eoi, int(TEMPLATE.tokenizer.pad_token_id)]
WORDS = len(TEMPLATE.tokenizer)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def picture(index: int = 1) -> Image.Image:
    """A picture of the toy source, larger than the system's."""
    drawn = draw(conversations()[0]).images
    assert drawn is not None
    return to_picture(drawn[index]).resize((40, 24))


def batch(rounds: int = 5, uploads: bool = True) -> tuple[list[Conversation], Tensor]:
    told = [random_tree(seed, rounds, uploads) for seed in range(3)]
    return told, random_features(3, rounds)


# ---------------------------------------------------------------------------------------------------------
# replies


class Script:
    """Stands in for a cache: answers with logits from a script and writes down what it is given to read."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.batch = logits, logits.shape[1]
        self.read: list[list[int]] = [[] for _ in range(self.batch)]
        self.step = 0

    def add_text(self, ids: Sequence[Sequence[int]], index: int) -> None:
        assert index == 1
        assert max(len(row) for row in ids) > 0, "nothing is read"
        for read, row in zip(self.read, ids, strict=True):
            read += row

    def read_text(self, ids: Sequence[Sequence[int]], index: int) -> Tensor:
        self.add_text(ids, index)
        self.step += 1
        return self.logits[self.step]

    def read_and_query(self, ids: Sequence[int], index: int, base: int | None) -> tuple[Tensor, Tensor]:
        self.add_text([ids], index)
        self.step += len(ids)
        return self.query([base]), self.logits[self.step - len(ids) + 1 : self.step + 1, 0]

    def cut(self, count: int) -> None:
        self.step -= count
        del self.read[0][-count:]

    def query(self, bases: Sequence[int | None]) -> Tensor:
        assert len(bases) == self.batch
        return torch.zeros(self.batch, TOKENS, FEATURES)


def word_by_word(logits: Tensor) -> list[int]:
    """The words of one row, each the likeliest that may be said."""
    allowed, words = logits.clone(), list[int]()
    allowed[:, BANNED] = -torch.inf
    while len(words) < MAX_REPLY and int(allowed[len(words)].argmax()) != TEMPLATE.boi:
        words.append(int(allowed[len(words)].argmax()))
    return words


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    eager=st.sampled_from([0.0, 1.0, 3.0]),
    rows=st.sampled_from([1, 3]),
    grounded=st.sampled_from([0.0, 2.0, 4.0]),
)
def test_a_reply_has_no_banned_word_and_ends_in_an_image(seed: int, eager: float, rows: int, grounded: float) -> None:
    """Also where it names a picture, so that its end is foreseen, rightly or wrongly."""
    logits = torch.randn(MAX_REPLY + 4, rows, WORDS, generator=torch.Generator().manual_seed(seed))
    logits[:, :, BANNED] += 9.0  # what is banned is what the model would like to say
    logits[:, :, TEMPLATE.boi] += eager
    for place, word in enumerate(["#1", "to", "#2"] * 6):
        logits[place, :, TEMPLATE.word_id(word)] += grounded
    script = Script(logits)
    replies = answer(script, logits[0], TEMPLATE, 1).replies  # type: ignore[arg-type]
    for row, (read, reply) in enumerate(zip(script.read, replies, strict=True)):
        assert read == [*TEMPLATE.encode(reply), TEMPLATE.boi] == [*word_by_word(logits[:, row]), TEMPLATE.boi]
        assert len(read) <= MAX_REPLY + 1 and read.count(TEMPLATE.boi) == 1
        assert not set(read) & set(BANNED)


def test_rows_that_are_done_wait_for_the_others() -> None:
    """Row 0 opens its image at once, row 1 says three words first; both say what they would say alone."""
    said = [["<img>"], ["#1", "to", "#2", "<img>"]]
    logits = torch.zeros(6, 2, WORDS)
    for row, words in enumerate(said):
        for step in range(6):
            logits[step, row, TEMPLATE.word_id(words[min(step, len(words) - 1)])] = 9.0
    logits[1:, 0, TEMPLATE.word_id("red")] = 99.0  # what comes after its image must not matter
    script = Script(logits)
    assert answer(script, logits[0], TEMPLATE, 1).replies == ["", "#1 to #2"]  # type: ignore[arg-type]
    assert script.read[0] == [TEMPLATE.boi]


def saying(words: str) -> Choose:
    """Say the same words in every round, whatever the model would say."""
    ids = TEMPLATE.encode(f"{words} {BOI}")
    return lambda logits, said, index: [ids[len(reply)] for reply in said]


def test_what_can_be_foreseen_by_hand() -> None:
    def words(said: str, index: int) -> str:
        return str(TEMPLATE.tokenizer.decode(foresee(TEMPLATE, TEMPLATE.encode(said), index)))

    assert words("red square #2", 3) == "to #4 <img>" and words("#1", 1) == "to #2 <img>"
    assert words("red square", 3) == words("red square #4", 3) == words("#2 to", 3) == ""
    assert (
        words("red " * (MAX_REPLY - 3) + "#1", 1) == "to #2 <img>" and words("red " * (MAX_REPLY - 2) + "#1", 1) == ""
    )


@pytest.mark.parametrize(
    ("reply", "passes"),
    [
        ("red square #2 to #3", 3),  # red, square, all the rest
        ("#2 to #3", 1),
        ("red", 2),  # red, <img> with the queries
        ("", 1),
        ("#2 then red square to #3", 7),  # #2 and more than was said, then one by one
        ("#2 to #3 red", 3),
        ("#2 to #1 to #3", 2),
        ("#2", 2),
    ],
)
def test_foreseeing_saves_passes_and_changes_nothing(reply: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told, caches, answers, counts = random_features(1, 2), [], [], []
    calls: list[int] = []
    hook = MODEL.base_llm.model.register_forward_hook(lambda *_: calls.append(1))
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(answering, "foresee", lambda *_: [])
        cache = PrefixCache(MODEL, TEMPLATE.image_ids)
        for index in range(2):
            cache.add_text([TEMPLATE.encode("[INST] #1 <img>")], index)
            cache.add_images(told[:, index], index)
        logits = cache.read_text([TEMPLATE.encode("[INST] make the square red [/INST]")], 2)
        calls.clear()
        answers.append(answer(cache, logits, TEMPLATE, 2, saying(reply)))
        caches.append(cache)
        counts.append(len(calls))
    hook.remove()
    assert counts == [passes, len(reply.split()) + 1]
    assert answers[0].replies == answers[1].replies == [reply]
    torch.testing.assert_close(answers[0].images, answers[1].images, **CLOSE)
    assert caches[0].length == caches[1].length and caches[0].position.tolist() == caches[1].position.tolist()
    torch.testing.assert_close(caches[0].query([1]), caches[1].query([1]), **CLOSE)


def test_a_round_takes_a_pass_for_every_surprise() -> None:
    """The picture before and the instruction in one; `red`; `square`; the end of the reply with the queries."""
    talk = ChatSession(SYSTEM, choose=saying("red square #1 to #2"))
    talk.upload(picture())
    calls: list[int] = []
    hook = MODEL.base_llm.model.register_forward_hook(lambda *_: calls.append(1))
    talk.say("make the square red")
    assert len(calls) == 4
    talk.undo()
    assert len(calls) == 4
    talk.say("make the square red")
    assert len(calls) == 8
    hook.remove()


def test_the_history_holds_the_reply_that_was_said() -> None:
    prompt = TEMPLATE.encode("<s> [INST] make the square red [/INST]")
    spoken = PrefixCache(MODEL, TEMPLATE.image_ids)
    [reply], images = answer(spoken, spoken.read_text([prompt], 1), TEMPLATE, 1)
    read = PrefixCache(MODEL, TEMPLATE.image_ids)
    read.read_text([[*prompt, *TEMPLATE.encode(f"{reply} {BOI}")]], 1)
    torch.testing.assert_close(spoken.query(), read.query(), **CLOSE)
    torch.testing.assert_close(images, read.query(), **CLOSE)


# ---------------------------------------------------------------------------------------------------------
# many at once


@pytest.mark.parametrize("uploads", [True, False])
def test_recomputing_changes_nothing(uploads: bool) -> None:
    told, features = batch(uploads=uploads)
    cached = rollout(MODEL, TEMPLATE, told, features)
    again = rollout(MODEL, TEMPLATE, told, features, recompute=True)
    torch.testing.assert_close(again.predictions, cached.predictions, **CLOSE)
    assert again.replies == cached.replies and len(cached.replies) == 5


def test_recomputing_changes_nothing_where_a_reply_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def terse(logits: Tensor, said: Sequence[Sequence[int]], index: int) -> list[int]:
        texts = ["", *["#1 to #2"] * (len(said) - 1)]
        words = [[*TEMPLATE.encode(text), TEMPLATE.boi] for text in texts]
        return [ids[min(len(reply), len(ids) - 1)] for ids, reply in zip(words, said, strict=True)]

    monkeypatch.setattr(answering, "likeliest", lambda template: terse)
    told, features = batch()
    cached, again = (rollout(MODEL, TEMPLATE, told, features, recompute=flag) for flag in (False, True))
    torch.testing.assert_close(again.predictions, cached.predictions, **CLOSE)
    assert cached.bases(2) == [None, 0, 0] and cached.bases(0) == [None, None, None]


def test_a_batch_equals_one_by_one() -> None:
    told, features = batch()
    together = rollout(MODEL, TEMPLATE, told, features)
    for row, conversation in enumerate(told):
        alone = rollout(MODEL, TEMPLATE, [conversation], features[[row]])
        torch.testing.assert_close(alone.predictions[0], together.predictions[row], **CLOSE)
        assert [reply[0] for reply in alone.replies] == [reply[row] for reply in together.replies]


def test_only_uploads_and_the_history_policy_look_at_the_truth() -> None:
    told, features = batch()
    other = features.clone()
    other[:, 1:] = random_features(3, 4, seed=9)
    own, same = rollout(MODEL, TEMPLATE, told, features), rollout(MODEL, TEMPLATE, told, other)
    assert torch.equal(own.predictions, same.predictions)
    assert torch.equal(own.predictions[:, 0], features[:, 0]), "an upload is what it is"
    oracle = history_policy(SYSTEM, "oracle")
    first, second = (rollout(MODEL, TEMPLATE, told, truth, oracle).predictions for truth in (features, other))
    assert torch.equal(first[:, 1], second[:, 1]) and not torch.allclose(first[:, 2], second[:, 2], **CLOSE)


def test_every_policy_remembers_what_it_says() -> None:
    predicted, true = random_features(2, 3)
    assert history_policy(SYSTEM, "tokens") is None and history_policy(SYSTEM, "prefix") is None
    oracle, again = history_policy(SYSTEM, "oracle"), history_policy(SYSTEM, "reencode")
    assert oracle is not None and again is not None
    assert torch.equal(oracle(predicted, true), true)
    pixels = torch.stack([from_picture(to_picture(image), "x") for image in SYSTEM.decode(predicted)])
    assert torch.equal(again(predicted, true), SYSTEM.encode(pixels))


def test_the_remembered_picture_is_what_later_rounds_see() -> None:
    told, features = batch()
    seen = []

    def noted(predicted: Tensor, true: Tensor) -> Tensor:
        seen.append(predicted.clone())
        return torch.zeros_like(predicted)

    forgotten = rollout(MODEL, TEMPLATE, told, features, noted)
    kept = rollout(MODEL, TEMPLATE, told, features)
    assert torch.equal(forgotten.predictions[:, 1], kept.predictions[:, 1]) and len(seen) == 4
    assert torch.equal(torch.stack(seen, 1), forgotten.predictions[:, 1:]), "what is shown is what was predicted"
    assert not torch.allclose(forgotten.predictions[:, 2], kept.predictions[:, 2], **CLOSE)


def test_conversations_that_cannot_go_side_by_side() -> None:
    told, features = batch()
    uneven = [told[0], told[1].prefix(3)]
    assert "unequal length" in raised(lambda: rollout(MODEL, TEMPLATE, uneven, features), ConversationError)
    mixed = [told[0], random_tree(1, 5, upload=False)]
    text = raised(lambda: rollout(MODEL, TEMPLATE, mixed, features[:2]), ConversationError)
    assert text == "rollout: round 0 is an upload in some conversations and not in others"
    long, many = [random_tree(0, MAX_ROUNDS + 1)], random_features(1, MAX_ROUNDS + 1)
    text = raised(lambda: rollout(MODEL, TEMPLATE, long, many), ConversationError)
    assert text == f"rollout: {MAX_ROUNDS + 1} rounds; the model was made for {MAX_ROUNDS}"


def test_pictures_are_encoded_alike_in_whole_numbers_and_fractions() -> None:
    image = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(SYSTEM.encode(image), SYSTEM.encode(image / 255))
    assert SYSTEM.encode(image).shape == (5, TOKENS, FEATURES)
    assert SYSTEM.decode(random_features(1, 3)[0]).shape == (3, 3, 16, 16)


# ---------------------------------------------------------------------------------------------------------
# one session


def session(*said: str) -> ChatSession:
    talk = ChatSession(SYSTEM, seed=5)
    talk.upload(picture())
    for instruction in said:
        talk.say(instruction)
    return talk


def test_saying_something_makes_the_next_picture() -> None:
    talk = session("Make the square RED!", "undo that")
    assert [node.id for node in talk.tokens.path()] == [0, 1, 2] and talk.current.id == 2
    assert [node.kind for node in talk.tokens.nodes] == ["upload", "edit", "edit"]
    assert talk.current.instruction == "undo that" and talk.tokens.node(1).instruction == "make the square red"
    assert talk.picture().size == (16, 16)


def test_a_session_is_a_rollout_of_one() -> None:
    talk = session("make the square red", "undo that and then paint the ground dark")
    told = talk._conversation(talk.tokens.path())
    features = torch.stack([talk.tokens.tokens(0)] * 3)[None]
    result = rollout(MODEL, TEMPLATE, [told], features)
    for index in range(3):
        torch.testing.assert_close(talk.tokens.tokens(index), result.predictions[0, index], **CLOSE)
    assert [node.response for node in talk.tokens.path()] == [reply[0] for reply in result.replies]


def test_undo_gives_back_the_same_tokens_and_pixels_bit_for_bit() -> None:
    talk = session("make the square red")
    tokens, pixels = talk.tokens.tokens(1).clone(), talk.picture().tobytes()
    talk.say("paint the ground dark")
    assert talk.picture().tobytes() != pixels
    assert talk.undo().id == 1
    assert torch.equal(talk.tokens.tokens(talk.current.id), tokens) and talk.picture().tobytes() == pixels
    talk.go_to(2)
    talk.go_to(1)
    assert talk.picture().tobytes() == pixels and talk.picture(1).tobytes() == pixels


def test_a_branch_sees_its_own_path_only() -> None:
    talk = session("make the square red", "paint the ground dark", "undo that")
    node = talk.branch(1, "make the edge white")
    assert node.parent == 1 and [step.id for step in talk.tokens.path()] == [0, 1, 4]
    straight = session("make the square red", "make the edge white")
    torch.testing.assert_close(talk.tokens.tokens(4), straight.tokens.tokens(2), **CLOSE)
    assert node.response == straight.current.response
    for each in (talk, straight):
        each.say("turn the shape blue")
    torch.testing.assert_close(talk.tokens.tokens(5), straight.tokens.tokens(3), **CLOSE)
    # and what was said before on the other branch goes on as if nothing had happened
    talk.go_to(3)
    other = session("make the square red", "paint the ground dark", "undo that", "start over")
    torch.testing.assert_close(talk.tokens.tokens(talk.say("start over").id), other.tokens.tokens(4), **CLOSE)


def test_a_stored_session_goes_on_as_if_it_had_never_ended(tmp_path: Path) -> None:
    talk = session("make the square red", "paint the ground dark")
    talk.undo()
    talk.tokens.save(tmp_path / "talk.safetensors")
    other = ChatSession(SYSTEM, seed=5)
    other.tokens = TokenCache.load(tmp_path / "talk.safetensors")
    assert other.picture().tobytes() == talk.picture().tobytes()
    first, second = (each.say("make the edge white") for each in (talk, other))
    assert first == second
    torch.testing.assert_close(other.tokens.tokens(3), talk.tokens.tokens(3), **CLOSE)


def test_the_base_is_the_node_that_the_model_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def says(reply: str) -> None:
        monkeypatch.setattr(answering, "likeliest", lambda template: saying(reply))

    talk = session("make the square red", "paint the ground dark")
    talk.go_to(0)
    says("#1 to #2")
    assert talk.say("make the edge white").base == 0
    says("red square #2 to #3")  # picture 2 of this branch is node 3
    assert talk.say("make the edge none").base == 3
    says("#9 to #4")
    assert talk.say("make the edge none").base is None


def test_a_session_may_begin_with_words() -> None:
    talk = ChatSession(SYSTEM)
    assert talk.say("a picture with the red square").kind == "describe"
    assert talk.say("make the ground dark").kind == "edit"
    told = talk._conversation(talk.tokens.path())
    result = rollout(MODEL, TEMPLATE, [told], random_features(1, 2))
    torch.testing.assert_close(talk.tokens.tokens(1), result.predictions[0, 1], **CLOSE)


def test_pictures_come_as_file_picture_or_tensor(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    picture().convert("RGBA").save(tmp_path / "b.png")
    given_ = [picture(), tmp_path / "a.png", tmp_path / "b.png", from_picture(picture().resize((16, 16)), "x")]
    tokens = []
    for each in given_:
        talk = ChatSession(SYSTEM)
        tokens.append(talk.tokens.tokens(talk.upload(each).id))
    assert all(torch.equal(each, tokens[0]) for each in tokens)


def test_a_picture_that_was_taken_sideways_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter before it is looked at
    picture().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways.png", exif=exif)
    talks = [ChatSession(SYSTEM) for _ in range(2)]
    for talk, given_ in zip(talks, (picture(), tmp_path / "sideways.png"), strict=True):
        talk.upload(given_)
    assert torch.equal(*(talk.tokens.tokens(0) for talk in talks))


def test_a_huge_picture_that_was_taken_sideways_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(path := tmp_path / "sideways.png", exif=exif)
    monkeypatch.setattr("nmlib.conversation.MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    text = raised(lambda: ChatSession(SYSTEM).upload(path), ConversationError)
    assert text == f"{path}: image is {picture().width} x {picture().height}; at most 100 pixels"


def test_seeds_change_the_pixels_and_not_the_tokens() -> None:
    first, second = ChatSession(SYSTEM, seed=1), ChatSession(SYSTEM, seed=2)
    for talk in (first, second):
        talk.upload(picture())
    assert torch.equal(first.tokens.tokens(0), second.tokens.tokens(0))
    assert first.picture().tobytes() != second.picture().tobytes()


def test_what_a_session_refuses(tmp_path: Path) -> None:
    empty = ChatSession(SYSTEM)
    for call in (lambda: empty.current, empty.picture):
        assert raised(call, ConversationError) == "this session is empty; begin with upload(picture)"
    assert "nothing to undo" in raised(empty.undo, CacheError)
    talk = session("make the square red")
    text = raised(lambda: talk.upload(picture()), ConversationError)
    assert text == "this session has a first picture already; start a new one for another"
    for words in ("", "  ", "?!"):
        assert raised(lambda w=words: talk.say(w), ConversationError) == (  # type: ignore[misc]
            f"instruction {words!r} has no words; say what to change"
        )
    assert raised(lambda: talk.branch(7, "x"), CacheError) == "no picture 7 in this session; it has 0 to 1"
    assert "has no words" in raised(lambda: talk.branch(0, "?!"), ConversationError)
    assert len(talk.tokens) == 2 and talk.current.id == 1, "nothing was added, and nobody moved"
    while len(talk.tokens) < MAX_ROUNDS:
        talk.say("undo that")
    text = raised(lambda: talk.say("undo that"), ConversationError)
    assert text == f"this branch has {MAX_ROUNDS} pictures, the most the model can count; go back to one"
    assert len(talk.tokens) == MAX_ROUNDS and talk.branch(2, "undo that").parent == 2


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    empty = ChatSession(SYSTEM)
    (tmp_path / "text.png").write_text("no picture")
    picture().save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    raw = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "header.png").write_bytes(raw[:11] + b"\x00" + raw[12:])
    for name in ("none.png", "text.png", "half.png", "header.png"):
        text = raised(lambda n=name: empty.upload(tmp_path / n), ConversationError)  # type: ignore[misc]
        assert text.startswith(f"{tmp_path / name}: cannot be read as a picture (")
    Image.new("1", (8000, 8001)).save(tmp_path / "huge.png")
    text = raised(lambda: empty.upload(tmp_path / "huge.png"), ConversationError)
    assert text == f"{tmp_path / 'huge.png'}: image is 8000 x 8001; at most 64000000 pixels"
    assert len(empty.tokens) == 0 and SOURCE.image_size == SYSTEM.image_size


# ---------------------------------------------------------------------------------------------------------
# the terminal


@pytest.mark.parametrize("end", ["/quit", None], ids=["quit", "end of input"])
def test_a_talk_on_the_terminal(
    end: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line is answered with the current picture, a wrong one also with its error; after the end none is read."""
    talk = ChatSession(SYSTEM, choose=saying("red square #1 to #2"))
    talk.upload(picture())
    lines = ["make it red", " /undo ", "/go 9", "/branch 0 make it round", "/tree", "/help", end, "never said"]
    coming = iter(lines)

    def typed(_: str) -> str:
        line = next(coming)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    repl(talk, tmp_path / "drawn")
    assert list(coming) == ["never said"]
    out = capsys.readouterr().out.splitlines()
    shown = [int(line[1]) for line in out if line.startswith("[")]
    assert shown == [0, 1, 0, 0, 2, 2, 2]
    assert out[0] == out[-2] == HELP and sum("9" in line and not line.startswith("[") for line in out) == 1
    assert [line[:11] for line in out if " after " in line] == ["  0 after N", "  1 after 0", "  2 after 0"]
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["000.png", "001.png", "002.png"]
