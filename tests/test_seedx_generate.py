"""Generation: one pass equals SEED-X's loop, batches equal single ones, and the history is what the setting says."""

from typing import Any

import pytest
import seedx_toy
import torch
from torch import Tensor
from toy import raised

from nmlib.cache import CacheError
from nmlib.seedx import SeedX
from nmlib.seedx_generate import Reply, SeedXChat, Shown, compare_speed
from nmlib.seedx_layout import READ, Sample, SampleError, SeedXTemplate

TEXTS = ["make the hat red", "go back to what it was before undo that", "blue"]


def willing(seed: int = 0, **changes: Any) -> tuple[SeedX, SeedXTemplate]:
    """An agent that likes to open pictures, so that replies have words and pictures."""
    agent, template = seedx_toy.agent(seed, **changes), seedx_toy.template(**changes)
    with torch.no_grad():
        agent.llm.lm_head.weight[template.boi] = 2 * agent.llm.lm_head.weight.abs().mean(0).neg()
    return agent, template


def shown(seed: int, count: int = 1) -> Shown:
    places = ((0.25, 0.5), (0.5, 0.5))[2 - count :]
    return Shown(torch.randn(count, 16, 32, generator=torch.Generator().manual_seed(seed)), places)


@torch.no_grad()
def seedx_loop(
    agent: SeedX, template: SeedXTemplate, embeds: Tensor, count: int, never: float
) -> tuple[list[int], Tensor]:
    """SEED-X's generation restated: token by token, no cache, the chain forced, features cut before each `</img>`."""
    chain = [template.boi, *template.image_ids, template.eoi]
    ids: list[int] = []
    for _ in range(count):
        states = agent.llm.model(inputs_embeds=embeds).last_hidden_state  # (1, T, D)
        scores = agent.llm.lm_head(states[0, -1])
        if ids and ids[-1] in chain[:-1]:
            word = chain[chain.index(ids[-1]) + 1]
        else:
            scores[chain[1:]] = never
            word = int(scores.argmax())
        ids.append(word)
        if word == template.eos:
            break
        embeds = torch.cat([embeds, agent.llm.get_input_embeddings()(torch.tensor([[word]]))], 1)
    states = agent.llm.model(inputs_embeds=embeds).last_hidden_state[0]
    start = len(states) - len([id_ for id_ in ids if id_ != template.eos])
    images = [states[start + end - 4 : start + end] for end, id_ in enumerate(ids) if id_ == template.eoi]
    return ids, agent.output_resampler(torch.stack(images)) if images else torch.zeros(0, 4, 32)


def prompt(agent: SeedX, template: SeedXTemplate, text: str, picture: Shown | None) -> Tensor:
    sample = template.ask(template.begin(), text, picture.positions if picture else ())
    embeds = agent.llm.get_input_embeddings()(torch.tensor([sample.ids]))
    if picture is None:
        return embeds
    blocks = agent.embed_images(picture.features, torch.zeros(1), torch.tensor(picture.positions))
    return embeds.masked_scatter((torch.tensor([sample.kinds]) == READ)[..., None], blocks)


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_one_pass_equals_the_loop_token_by_token(seed: int) -> None:
    agent, template = willing(seed)
    picture = shown(seed, 2)
    ids, images = seedx_loop(agent, template, prompt(agent, template, TEXTS[0], picture), 40, -torch.inf)
    for one_shot in (True, False):
        (reply,) = SeedXChat(agent, template).say([TEXTS[0]], [picture], max_new_tokens=40, one_shot=one_shot)
        assert reply.ids == ids[: len(reply.ids)] and len(reply.ids) >= 40 - 6, (
            "only a picture that had no room is left"
        )
        torch.testing.assert_close(reply.images, images[: len(reply.images)], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_replies_hold_several_pictures() -> None:
    """Otherwise the comparison above would compare nothing."""
    counts = []
    for seed in range(3):
        (reply,) = SeedXChat(*willing(seed)).say([TEXTS[0]], [shown(seed, 2)], max_new_tokens=40)
        counts.append(len(reply.images))
        assert reply.ids.count(seedx_toy.template().boi) == len(reply.images)
    assert max(counts) >= 2


@torch.no_grad()
def test_a_forced_picture_comes_first_and_at_once() -> None:
    agent, template = seedx_toy.agent(), seedx_toy.template()
    agent.llm.lm_head.weight[template.boi] = 0.0
    chain = [template.boi, *template.image_ids, template.eoi]
    (reply,) = SeedXChat(agent, template).say([TEXTS[0]], force_image=True, max_new_tokens=len(chain))
    assert reply.ids == chain and reply.images.shape == (1, 4, 32) and reply.text == ""
    embeds = torch.cat(
        [prompt(agent, template, TEXTS[0], None), agent.llm.get_input_embeddings()(torch.tensor([chain]))], 1
    )
    states = agent.llm.model(inputs_embeds=embeds).last_hidden_state[:, -5:-1]
    torch.testing.assert_close(reply.images, agent.output_resampler(states), rtol=1e-5, atol=1e-5)
    (none,) = SeedXChat(agent, template).say([TEXTS[0]], force_image=True, max_new_tokens=len(chain) - 1)
    assert none.ids == [] and none.images.shape == (0, 4, 32), "a picture that would not fit is not begun"


@torch.no_grad()
def test_words_of_a_picture_never_stand_alone() -> None:
    """With all scores negative, SEED-X's 0.0 lets a query token win; minus infinity does not."""
    agent, template = seedx_toy.agent(), seedx_toy.template()
    embeds = prompt(agent, template, TEXTS[0], None)
    state = agent.llm.model(inputs_embeds=embeds).last_hidden_state[0, -1]
    agent.llm.lm_head.weight[:] = -state * torch.linspace(1, 2, len(agent.llm.lm_head.weight))[:, None]
    bug, _ = seedx_loop(agent, template, embeds, 1, 0.0)
    assert bug[0] in template.image_ids, "the case shows the fault"
    (reply,) = SeedXChat(agent, template).say([TEXTS[0]], max_new_tokens=1)
    assert reply.ids == [0]


@pytest.mark.parametrize("policy", ["repeat", "direct", "states"])
@torch.no_grad()
def test_a_padded_batch_of_two_rounds_equals_each_alone(policy: Any) -> None:
    agent, template = willing(1, history=policy)
    agent.double()  # two rounds of rounding errors would hide a small leak
    pictures = [shown(0), None, shown(1, 2)]
    batch = SeedXChat(agent, template, batch=3)
    together = [
        batch.say(TEXTS, pictures, max_new_tokens=20),
        batch.say(TEXTS[::-1], force_image=True, max_new_tokens=12),
    ]
    for row in range(3):
        alone = SeedXChat(agent, template)
        for index, text in enumerate((TEXTS[row], TEXTS[::-1][row])):
            (reply,) = alone.say([text], [pictures[row]] if index == 0 else None, force_image=bool(index),
                                 max_new_tokens=(20, 12)[index])  # fmt: skip
            assert reply.ids == together[index][row].ids and reply.text == together[index][row].text
            torch.testing.assert_close(reply.images, together[index][row].images, rtol=1e-5, atol=1e-5)


def second_round(policy: Any, **options: Any) -> tuple[Reply, Reply, SeedX, SeedXTemplate]:
    agent, template = seedx_toy.agent(2, history=policy), seedx_toy.template(history=policy)
    chat = SeedXChat(agent, template, **options)
    (first,) = chat.say([TEXTS[0]], [shown(0)], force_image=True, max_new_tokens=6)
    (second,) = chat.say([TEXTS[2]], force_image=True, max_new_tokens=6)
    return first, second, agent, template


@pytest.mark.parametrize("policy", ["repeat", "direct", "states"])
@torch.no_grad()
def test_history_of_each_kind_equals_reading_it_all_again(policy: Any) -> None:
    first, second, agent, template = second_round(policy)
    table, chain = agent.llm.get_input_embeddings(), [template.boi, *template.image_ids, template.eoi]
    block = table(torch.tensor([chain]))
    if policy != "states":
        read = first.images.repeat_interleave(4, 1) if policy == "repeat" else first.images
        block[:, 1:-1] = agent.input_resampler(read) + agent.patch_pos_embed.sum(0) / 4
    sample = template.ask(Sample(), TEXTS[2])
    after = table(torch.tensor([[*template.encode("\n"), *sample.ids, *chain]]))
    embeds = torch.cat([prompt(agent, template, TEXTS[0], shown(0)), block, after], 1)
    states = agent.llm.model(inputs_embeds=embeds).last_hidden_state[:, -5:-1]
    torch.testing.assert_close(second.images, agent.output_resampler(states), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_kinds_of_history_differ_and_can_be_replaced() -> None:
    """`remember` takes what was decoded and encoded again, or the true features, in the place of the prediction."""
    by_policy = [second_round(policy)[1].images for policy in ("repeat", "direct", "states")]
    assert all(
        not torch.allclose(a, b, atol=1e-3) for a, b in zip(by_policy, by_policy[1:] + by_policy[:1], strict=True)
    )
    same = second_round("states", remember=lambda row, predicted: predicted.repeat_interleave(4, 1))[1].images
    torch.testing.assert_close(same, by_policy[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_undo_forgets_a_round() -> None:
    agent, template = willing(0)
    chat, fresh = SeedXChat(agent, template), SeedXChat(agent, template)
    for text in (TEXTS[0], TEXTS[1]):
        chat.say([text], max_new_tokens=9)
    chat.undo()
    fresh.say([TEXTS[0]], max_new_tokens=9)
    (one,), (other,) = chat.say([TEXTS[2]], max_new_tokens=20), fresh.say([TEXTS[2]], max_new_tokens=20)
    assert one.ids == other.ids and torch.equal(one.images, other.images)
    assert raised(lambda: SeedXChat(agent, template).undo(), CacheError) == "nothing to undo: nothing was said yet"


@torch.no_grad()
def test_rounds_that_were_undone_take_no_memory_and_a_full_conversation_is_refused() -> None:
    agent, template = willing(0, max_positions=90)
    chat = SeedXChat(agent, template)
    chat.say([TEXTS[0]], max_new_tokens=9)
    length = chat.cache.length
    for _ in range(3):
        chat.say([TEXTS[1]], max_new_tokens=9)
        chat.undo()
    assert chat.cache.length == length == chat.cache.length_read

    def fill() -> None:
        for _ in range(90):
            chat.show([TEXTS[1]], [Shown(torch.zeros(1, agent.config.vision.tokens, agent.config.vision.feature_dim))])

    assert "tokens of at most 90; undo, or begin a new conversation" in raised(fill, SampleError)


def test_comparison_of_speed_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = compare_speed(*willing(0))
    assert line.startswith("4 query tokens: one pass ") and "times as long; largest difference" in line
