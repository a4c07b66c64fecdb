"""SEED-X in a conversation of its own: what it reads of its pictures under every policy."""

from dataclasses import replace
from typing import Any

import pytest
import seedx_toy
import torch
from test_seedx_generate import willing
from toy import raised

from nmlib.conversation import Conversation, Round
from nmlib.seedx_checkpoint import System
from nmlib.seedx_evaluation import COLUMNS, nearest_picture
from nmlib.seedx_generate import Reply
from nmlib.seedx_talk import encode, talk, talk_table
from nmlib.seedx_vision import QwenViT

ROUNDS = (
    Round("here is a picture of her", "upload"),
    Round("make the wall blue", "edit", 0),
    Round("undo that", "rollback", 0),
    Round("make the hat red", "edit", 2),
)


def system(**changes: Any) -> System:
    agent, template = willing(0, **changes)
    torch.manual_seed(3)
    return System(agent, QwenViT(agent.config.vision).eval().requires_grad_(False), template)


def told(*rounds: Round) -> Conversation:
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(256, (len(rounds), 3, seedx_toy.SIDE, seedx_toy.SIDE), generator=generator).byte()
    return Conversation("one", "toy", rounds, images)


class Painter:
    """Draws tokens as flat pictures whose grey says what the tokens are."""

    def decode(self, tokens: torch.Tensor, **_: Any) -> torch.Tensor:
        grey = tokens.mean((1, 2)).sigmoid()[:, None, None, None]
        return grey.expand(-1, 3, seedx_toy.SIDE, seedx_toy.SIDE)


def pictures(replies: list[Reply]) -> torch.Tensor:
    return torch.stack([reply.images[0] for reply in replies])


def test_every_picture_that_is_asked_for_gets_a_reply_that_ends_with_it() -> None:
    made = system()
    replies = talk(made, told(*ROUNDS), max_new_tokens=40)
    assert len(replies) == 3 and all(len(reply.images) == 1 for reply in replies)
    assert all(reply.ids[-1] == made.template.eoi for reply in replies)
    assert pictures(replies).isfinite().all()


def test_a_model_that_only_talks_is_made_to_draw() -> None:
    made = system()
    with torch.no_grad():
        made.agent.llm.lm_head.weight[made.template.boi] = -made.agent.llm.lm_head.weight[made.template.boi]
    replies = talk(made, told(*ROUNDS), "reencode", Painter(), max_new_tokens=9)
    assert all(reply.ids[0] == made.template.boi and len(reply.images) == 1 for reply in replies)


def test_pictures_of_another_size_are_resized_for_the_encoder() -> None:
    vit = system().vit
    assert vit is not None
    small = torch.randint(256, (2, 3, 14, 14), generator=torch.Generator().manual_seed(1)).byte()
    large = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert encode(vit, large).shape == (2, 16, 32)
    flat = torch.full((1, 3, 56, 56), 90).byte()
    torch.testing.assert_close(encode(vit, flat), encode(vit, flat[:, :, :28, :28]))


def test_the_prompt_is_laid_out_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made to draw at once, it draws what it predicts in one pass over the sequence that it was trained on."""
    made, conversation = system(), told(*ROUNDS[:2])
    with torch.no_grad():
        made.agent.llm.lm_head.weight[made.template.boi] = -made.agent.llm.lm_head.weight[made.template.boi]
    assert made.vit is not None and conversation.images is not None
    features = encode(made.vit, conversation.images)[None]  # (1, R, M, D_feature)
    monkeypatch.setattr(made.template, "reply", lambda *_: [made.template.boi])  # no words before the picture
    layout = made.template.prefix([conversation], [1])
    with torch.no_grad():
        expected = made.agent.predict(layout, features[layout.history[:, 0], layout.history[:, 1]]).images
    torch.testing.assert_close(pictures(talk(made, conversation, max_new_tokens=6)), expected, rtol=1e-4, atol=1e-4)


def test_pictures_can_be_brought_in_any_round() -> None:
    """And that very picture is read: another one in round 3 changes what comes after it, and only that."""
    made, conversation = system(), told(ROUNDS[0], ROUNDS[0], ROUNDS[1], ROUNDS[0], ROUNDS[2])
    assert conversation.images is not None
    images = conversation.images.clone()
    images[3] = 255 - images[3]
    one, other = (
        pictures(talk(made, each, max_new_tokens=20)) for each in (conversation, replace(conversation, images=images))
    )
    assert len(one) == 2 and torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1], atol=1e-4)


def test_what_is_read_of_a_picture_is_decided_by_the_policy() -> None:
    """The first picture is the same under all; the second reads the first as tokens, drawn and encoded, or true."""
    made, conversation = system(), told(*ROUNDS)
    found = {
        policy: pictures(talk(made, conversation, policy, Painter(), max_new_tokens=20))  # type: ignore[arg-type]
        for policy in ("tokens", "reencode", "oracle")
    }
    first = found["tokens"][0]
    assert all(torch.equal(images[0], first) for images in found.values())
    assert not torch.allclose(found["tokens"][1], found["reencode"][1], atol=1e-4)
    assert not torch.allclose(found["reencode"][1], found["oracle"][1], atol=1e-4)
    assert made.vit is not None and conversation.images is not None
    drawn = (Painter().decode(first[None]) * 255).round().byte()
    swapped = replace(conversation, images=torch.cat([conversation.images[:1], drawn, conversation.images[2:]]))
    oracle = pictures(talk(made, swapped, "oracle", max_new_tokens=20))
    torch.testing.assert_close(found["reencode"][1], oracle[1])


@pytest.mark.parametrize(
    ("conversation", "policy", "text"),
    [
        (replace(told(*ROUNDS), images=None), "tokens", "conversation 'one': talking needs its pictures, and the"),
        (told(*ROUNDS), "reencode", "reencode: pictures are drawn and encoded again, which needs a decoder"),
    ],
)
def test_what_cannot_be_said(conversation: Conversation, policy: Any, text: str) -> None:
    assert raised(lambda: talk(system(), conversation, policy), ValueError).startswith(text)


@pytest.mark.parametrize("history", ["repeat", "direct", "states"])
def test_ways_back_are_asked_of_every_kind_of_history(history: Any) -> None:
    """One row for every round that only goes back; the rule and the names are those of the other table."""
    conversation = told(*ROUNDS)
    assert conversation.images is not None
    images = conversation.images.clone()
    images[2] = images[0]
    made = system(history=history)
    table = talk_table(made, [replace(conversation, images=images)], max_new_tokens=20)
    assert list(table.columns) == list(COLUMNS) and list(table["history"]) == ["tokens", "oracle"]
    assert set(table["round"]) == {2} and set(table["base"]) == {0} and set(table["chance"]) == {0.5}
    assert made.vit is not None
    replies = talk(made, replace(conversation, images=images), max_new_tokens=20)
    targets = made.agent.to_target(encode(made.vit, images))
    assert table["nearest"][0] == nearest_picture(replies[1].images[0], targets[:2])
    assert table["right"][0] == (table["nearest"][0] == 0)
    assert talk_table(made, [told(*ROUNDS)]).empty, "another picture than that of the base is a branch"
