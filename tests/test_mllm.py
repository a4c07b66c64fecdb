"""The history-conditioned model: what reaches what, and that both kinds of supervision are one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from toy import FEATURES, TOKENS, conversations, make_model, random_features, random_tree

from nmlib import attention
from nmlib.conversation import Conversation
from nmlib.layout import IGNORE, Layout, Template
from nmlib.mllm import HistoryMLLM
from nmlib.train import repeat_forward_passes

Case = tuple[HistoryMLLM, Template, list[Conversation], Tensor]
PLAIN: dict[str, Any] = {"markers": False, "response": "polite"}


@pytest.fixture(scope="module", params=[{}, PLAIN], ids=["markers", "plain"])
def case(request: pytest.FixtureRequest) -> Case:
    """A model, its template, three conversations of four rounds, and features."""
    model, template = make_model(3, **request.param)
    return model, template, [*conversations(), random_tree(1, 4, upload=False)], random_features(3, 4)


def predict(model: HistoryMLLM, batch: Layout, features: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted images in the order of `queries`, and logits at the labels."""
    return model.predict(batch, features[batch.history[:, 0], batch.history[:, 1]])[:2]


def image_loss(model: HistoryMLLM, batch: Layout, shown: Tensor, features: Tensor) -> Tensor:
    """The feature loss of predictions from a history of pictures `shown`: of the drawn and of what the gate makes."""
    output = model.predict(batch, shown[batch.history[:, 0], batch.history[:, 1]])
    targets = features[batch.queries[:, 0], batch.queries[:, 1]]
    drawn = (output.drawn - targets).square().mean()
    return drawn if model.copy_gate is None else (drawn + (output.images - targets).square().mean()) / 2


def round_of_label(batch: Layout) -> Tensor:
    """The round whose reply each label belongs to, in the order of the logits."""
    blocks = batch.query_slots & ~batch.query_slots.roll(1, 1)  # (B, T) first slot of each query block
    ahead = blocks.flip(1).cumsum(1).flip(1)  # (B, T) blocks still to come
    last = batch.queries[:, 1].max()
    return (last + 1 - ahead)[batch.labels != IGNORE]


# ---------------------------------------------------------------------------------------------------------
# nothing from later rounds, nothing from other query blocks


@torch.no_grad()
@pytest.mark.parametrize("changed", range(4))
def test_features_of_a_round_reach_later_predictions_only(case: Case, changed: int) -> None:
    model, template, pair, features = case
    batch = template.packed(pair)
    other = features.clone()
    other[:, changed] = random_features(3, 4, seed=1)[:, changed]
    images, logits = predict(model, batch, features)
    new_images, new_logits = predict(model, batch, other)
    for index, before, after in zip(batch.queries[:, 1].tolist(), images, new_images, strict=True):
        assert torch.equal(before, after) == (index <= changed)
    for index, before, after in zip(round_of_label(batch).tolist(), logits, new_logits, strict=True):
        assert torch.equal(before, after) == (index <= changed)


@torch.no_grad()
@pytest.mark.parametrize("changed", range(1, 4))
def test_a_query_block_is_a_dead_end(case: Case, changed: int) -> None:
    model, template, pair, features = case
    batch = template.packed(pair)
    images, logits = predict(model, batch, features)
    batch.input_ids[batch.segments == changed + 1] = template.boi
    new_images, new_logits = predict(model, batch, features)
    for index, before, after in zip(batch.queries[:, 1].tolist(), images, new_images, strict=True):
        assert torch.equal(before, after) == (index != changed)
    assert torch.equal(logits, new_logits)


@torch.no_grad()
def test_words_of_a_round_reach_this_and_later_rounds_only(case: Case) -> None:
    model, template, pair, features = case
    batch = template.packed(pair)
    images, _ = predict(model, batch, features)
    row, index = 1, 2
    block = int((batch.segments[row] == index + 1).nonzero()[0])
    batch.input_ids[row, block - 6] = template.encode("the")[0]  # within the instruction of round 2 or its reply
    new_images, _ = predict(model, batch, features)
    for (owner, other), before, after in zip(batch.queries.tolist(), images, new_images, strict=True):
        assert torch.equal(before, after) == (owner != row or other < index)


@pytest.mark.parametrize("index", [1, 2, 3])
def test_loss_of_a_round_reaches_the_images_before_it_and_no_others(case: Case, index: int) -> None:
    model, template, pair, features = case
    batch = template.packed(pair)
    inputs = features.clone().requires_grad_(True)
    images, _ = predict(model, batch, inputs)
    chosen = batch.queries[:, 1] == index
    targets = features[batch.queries[chosen, 0], index]
    (gradient,) = torch.autograd.grad((images[chosen] - targets).square().mean(), inputs)
    reach = gradient.abs().amax((0, 2, 3))  # (R,)
    assert (reach[:index] > 0).all(), "every earlier image matters, that of round r-1 first of all"
    assert (reach[index:] == 0).all(), "neither its own clean image nor a later one"


def test_every_word_and_image_before_a_query_block_matters(case: Case) -> None:
    """The other half of the mask: what should be seen is seen, in every row and by every query."""
    model, template, pair, features = case
    batch = template.packed(pair)
    embeds = model.embed(batch, features[batch.history[:, 0], batch.history[:, 1]]).detach().requires_grad_(True)
    result = model.base_llm.model(
        inputs_embeds=embeds, attention_mask=batch.attention_mask(), position_ids=batch.position_ids, use_cache=False
    )
    last = {row: int(batch.query_slots[row].nonzero()[-1]) for row in range(len(pair))}
    (gradient,) = torch.autograd.grad(
        sum(result.last_hidden_state[row, slot].sum() for row, slot in last.items()), embeds
    )
    mask = batch.attention_mask()[:, 0]
    for row, slot in last.items():
        assert torch.equal(gradient[row].abs().sum(1) > 0, mask[row, slot])


# ---------------------------------------------------------------------------------------------------------
# prefix and packed are one


@pytest.mark.parametrize("changes", [{}, PLAIN, {"markers": False}], ids=["markers", "plain", "grounded"])
def test_prefix_equals_packed_in_losses_and_gradients(changes: dict[str, Any]) -> None:
    model, template = make_model(4, excitement=3.0, **changes)
    pair = [*conversations(), random_tree(2, 4), random_tree(3, 4, upload=False)]
    assert len({len(template.packed_row(conversation).ids) for conversation in pair}) == len(pair), "unequal lengths"
    features = random_features(4, 4)
    results = []
    for batch in (template.packed(pair), template.prefix(pair)):
        model.zero_grad()
        losses = model(batch, features)
        losses.total.backward()
        results.append((losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (packed, ours), (prefix, theirs) = results
    assert abs(packed.text - prefix.text) < 1e-5 and abs(packed.image - prefix.image) < 1e-5
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0 or "k_proj" in name, f"{name} gets no gradient: nothing is compared"
        torch.testing.assert_close(
            gradient, theirs[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@torch.no_grad()
def test_prefix_equals_packed_for_each_image_alone(case: Case) -> None:
    model, template, pair, features = case
    packed = template.packed(pair)
    images = dict(zip(map(tuple, packed.queries.tolist()), predict(model, packed, features)[0], strict=True))
    for (owner, index), expected in images.items():
        row = template.prefix([pair[owner]], rounds=[index])
        alone, _ = predict(model, row, features[[owner]])
        torch.testing.assert_close(alone[0], expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# what is embedded where


@torch.no_grad()
def test_history_slots_hold_the_image_of_their_round(case: Case) -> None:
    """The masked_scatter contract: each block of slots gets the features of its own conversation and round."""
    model, template, pair, features = case
    for batch in (template.packed(pair), template.prefix(pair), template.prefix(pair, rounds=[3, 2, 1])):
        embeds = model.embed(batch, features[batch.history[:, 0], batch.history[:, 1]])
        found = embeds[batch.history_slots].unflatten(0, (-1, TOKENS))
        opened = (batch.input_ids == template.boi).cumsum(1) - 1  # the round of what follows the n-th <img>
        rounds = opened[batch.history_slots].reshape(-1, TOKENS)[:, 0]
        owners = batch.history[:, 0]
        for block, owner, index in zip(found, owners, rounds, strict=True):
            torch.testing.assert_close(block, model.embed_images(features[owner, index][None], index[None])[0])
        words, text = model.base_llm.get_input_embeddings(), ~(batch.history_slots | batch.query_slots)
        expected = words(batch.input_ids)
        if len(model.marker_ids):
            expected = expected + words(model.marker_ids[batch.rounds])
        assert torch.equal(embeds[text], expected[text])


@torch.no_grad()
def test_markers_are_the_embeddings_of_picture_and_slot() -> None:
    model, template = make_model(5)
    feature = random_features(1, 1)[0]
    first, third = (model.embed_images(feature, torch.tensor([index]))[0] for index in (0, 2))
    table = model.base_llm.get_input_embeddings().weight
    shift = table[template.encode("#3")[0]] - table[template.encode("#1")[0]]
    torch.testing.assert_close(third - first, shift.expand(TOKENS, -1))
    slots = table[template.image_ids] + table[template.encode("#1")[0]]
    torch.testing.assert_close(first, model.input_resampler(feature)[0] + slots)
    plain, _ = make_model(5, **PLAIN)
    assert torch.equal(plain.embed_images(feature, torch.tensor([0])), plain.embed_images(feature, torch.tensor([2])))


@torch.no_grad()
def test_query_tokens_start_from_the_picture_that_the_text_names() -> None:
    model, template = make_model(5)
    batch, features = template.packed(conversations()), random_features(2, 4)
    embeds = model.embed(batch, features[batch.history[:, 0], batch.history[:, 1]])
    words = model.base_llm.get_input_embeddings().weight[template.image_ids]
    bases = [(0, 0), (0, 0), (0, 2), None, (1, 0), (1, 1), (1, 0)]  # by hand: row and round, none for the description
    for block, base in zip(embeds[batch.query_slots].unflatten(0, (-1, TOKENS)), bases, strict=True):
        start = 0 if base is None else model.embed_images(features[base][None], torch.tensor([base[1]]))[0]
        torch.testing.assert_close(block, words + start)
    plain, _ = make_model(5, **PLAIN)
    embeds = plain.embed(batch, features[batch.history[:, 0], batch.history[:, 1]])
    own = plain.base_llm.get_input_embeddings().weight[template.image_ids]
    torch.testing.assert_close(embeds[batch.query_slots].unflatten(0, (-1, TOKENS)), own.expand(7, -1, -1))


@torch.no_grad()
def test_loss_is_the_weighted_sum_of_its_parts_in_units_of_the_feature_scale() -> None:
    model, template = make_model(6, text_loss_weight=0.3, feature_loss_weight=5.0)
    pair, features = conversations(), random_features(2, 4)
    batch = template.packed(pair)
    plain = model(batch, features)
    torch.testing.assert_close(plain.total, 0.3 * plain.text + 5.0 * plain.image)
    _, logits = predict(model, batch, features)
    torch.testing.assert_close(plain.image, image_loss(model, batch, features, features))
    chosen = batch.labels[batch.labels != IGNORE]
    torch.testing.assert_close(plain.text, -logits.log_softmax(1)[torch.arange(len(chosen)), chosen].mean())
    model.feature_scale.fill_(2.0)
    torch.testing.assert_close(model(batch, features).image, plain.image / 4)


@torch.no_grad()
def test_attentions_on_request_follow_the_mask_and_change_nothing() -> None:
    model, template = make_model(7)
    batch = template.packed(conversations())
    features = random_features(2, 4)
    history = features[batch.history[:, 0], batch.history[:, 1]]
    before = model.predict(batch, history)
    output = model.predict(batch, history, output_attentions=True)
    torch.testing.assert_close(output[:2], before[:2], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.predict(batch, history).images, before.images), "the fast path is back"
    model.base_llm.set_attn_implementation("sdpa")
    model.predict(batch, history, output_attentions=True)
    assert model.base_llm.config._attn_implementation == "sdpa", "what was set before is set again"
    assert output.attentions is not None and len(output.attentions) == 2
    hidden = ~batch.attention_mask().expand_as(output.attentions[0])
    assert all((layer[hidden] == 0).all() for layer in output.attentions)


# ---------------------------------------------------------------------------------------------------------
# the copy gate


@torch.no_grad()
def test_gate_mixes_each_token_with_that_of_the_picture_named() -> None:
    model, template = make_model(12)
    pair, features = conversations(), random_features(2, 4)
    batch = template.packed(pair)
    history = features[batch.history[:, 0], batch.history[:, 1]]
    assert model.copy_gate is not None
    torch.nn.init.normal_(model.copy_gate.weight)
    output = model.predict(batch, history)
    for (row, index), image, drawn in zip(batch.queries.tolist(), output.images, output.drawn, strict=True):
        base = pair[row].rounds[index].base
        if base is None:
            assert torch.equal(image, drawn), "nothing to keep from"
            continue
        start = features[row, base]
        shares = (image - drawn) / (start - drawn)  # the same number for all features of a token
        torch.testing.assert_close(shares, shares[:, :1].expand_as(shares), rtol=1e-2, atol=1e-3)
        assert (shares > 0).all() and (shares < 1).all() and shares[:, 0].unique().numel() == TOKENS
    for bias, expected in ((1e4, features), (-1e4, None)):
        model.copy_gate.bias.fill_(bias)
        output = model.predict(batch, history)
        for (row, index), image, drawn in zip(batch.queries.tolist(), output.images, output.drawn, strict=True):
            base = pair[row].rounds[index].base
            assert torch.equal(image, drawn if expected is None or base is None else expected[row, base])


def test_a_kept_picture_reaches_only_the_gate_and_the_drawing_learns_all_the_same() -> None:
    """With everything kept the mixed error teaches the drawing nothing; its own error does."""
    model, template = make_model(13)
    batch, features = template.packed(conversations()), random_features(2, 4)
    assert model.copy_gate is not None
    with torch.no_grad():
        model.copy_gate.bias.fill_(1e4)
    history = features[batch.history[:, 0], batch.history[:, 1]]
    asked = batch.bases >= 0
    model.predict(batch, history).images[asked].square().sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.output_resampler.parameters())
    model(batch, features).image.backward()
    assert model.output_resampler.query.grad is not None and model.output_resampler.query.grad.any()


@torch.no_grad()
def test_a_model_without_a_gate_says_so() -> None:
    model, template = make_model(14, copy_gate=False)
    batch, features = template.packed(conversations()), random_features(2, 4)
    output = model.predict(batch, features[batch.history[:, 0], batch.history[:, 1]])
    assert torch.equal(output.images, output.drawn)
    with pytest.raises(ValueError, match="copy_gate: false"):
        model.kept(torch.zeros(1, TOKENS, 24))


# ---------------------------------------------------------------------------------------------------------
# the model's own predictions in the history


@torch.no_grad()
@pytest.mark.parametrize("kind", ["packed", "prefix"])
def test_exactly_the_chosen_history_is_replaced_by_predictions(case: Case, kind: str) -> None:
    model, template, pair, features = case
    batch: Layout = getattr(template, kind)(pair)
    replaced = torch.tensor([[True, True, False, True], [False, False, True, False], [True, False, False, False]])
    own, _ = predict(model, batch, features)
    mixed = features.clone()
    mixed[0, 1] = own[(batch.queries == torch.tensor([0, 1])).all(1)][0]  # round 0 of row 0 is an upload: it stays
    mixed[1, 2] = own[(batch.queries == torch.tensor([1, 2])).all(1)][0]
    mixed[2, 0] = own[(batch.queries == torch.tensor([2, 0])).all(1)][0]
    expected = image_loss(model, batch, mixed, features)
    torch.testing.assert_close(model(batch, features, replaced).image, expected)
    assert model(batch, features, replaced).image != model(batch, features).image
    assert model(batch, features, torch.zeros_like(replaced)).image == model(batch, features).image


def test_no_gradient_goes_through_the_predictions_in_the_history() -> None:
    model, template = make_model(8)
    pair, features = conversations(), random_features(2, 4)
    batch = template.packed(pair)
    with torch.no_grad():
        own, _ = predict(model, batch, features)
        mixed = features.clone()
        mixed[batch.queries[:, 0], batch.queries[:, 1]] = own
    by_hand = image_loss(model, batch, mixed, features)
    model(batch, features, torch.ones(2, 4, dtype=torch.bool)).image.backward()
    weights = list(model.input_resampler.parameters())[1:]
    for weight, expected in zip(weights, torch.autograd.grad(by_hand, weights), strict=True):
        torch.testing.assert_close(weight.grad, expected)


@torch.no_grad()
def test_noise_goes_into_the_history_and_not_into_the_targets() -> None:
    model, template = make_model(9)
    pair, features = conversations(), random_features(2, 4)
    told = [conversation.prefix(1) for conversation in pair[1:]]  # a description has no history
    assert model(template.packed(told), features[1:, :1], history_noise=9.0) == model(
        template.packed(told), features[1:, :1]
    )
    batch = template.packed(pair)
    assert model(batch, features, history_noise=0.5).image != model(batch, features).image


# ---------------------------------------------------------------------------------------------------------
# the attention of training


@pytest.mark.parametrize("repeated", [False, True], ids=["kept", "repeated"])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_a_step_with_products_is_a_step_with_the_fused_kernel(bfloat16: bool, repeated: bool) -> None:
    """Losses and every gradient, with LoRA that folds, also where layers repeat their forward pass."""
    found = {}
    for name in (attention.LANGUAGE, "sdpa"):
        model, template = make_model(10, lora_rank=19)
        torch.manual_seed(2)
        model.add_lora()
        with torch.no_grad():  # B starts at zero, and A would have no gradient
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.base_llm.set_attn_implementation(name)
        if repeated:
            repeat_forward_passes(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model.train()(template.packed(conversations()), random_features(2, 4)).total
        loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found[name] = {"loss": loss.detach()} | gradients
    for key, expected in found["sdpa"].items():
        difference = (found[attention.LANGUAGE][key] - expected).norm() / expected.norm().clamp_min(1e-3)
        assert difference < (0.15 if bfloat16 else 1e-4), key  # bfloat16 rounds both, each in its own way
    assert any("lora_A" in name for name in found["sdpa"])


# ---------------------------------------------------------------------------------------------------------
# LoRA


def intended(name: str) -> bool:
    """Whether a parameter may train beside a frozen language model."""
    if name.startswith(("input_resampler.", "output_resampler.", "copy_gate.")):
        return not name.endswith("pos_embed")
    parts = ("lora_A", "lora_B", "modules_to_save", "embed_tokens", "lm_head")
    return any(part in name for part in parts)


def test_lora_trains_what_it_should_and_nothing_else() -> None:
    model, template = make_model(10)
    pair, features = conversations(), random_features(2, 4)
    batch = template.packed(pair)
    with torch.no_grad():
        before = predict(model, batch, features)
    model.add_lora()
    with torch.no_grad():
        torch.testing.assert_close(predict(model, batch, features), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if intended(name)}
    kinds = {part for name in trainable for part in name.split(".") if part.endswith("_proj")}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "kv_proj", "out_proj"}

    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # LoRA's B starts at zero, so A moves in the second step only
        model(batch, features).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, old[name]) != intended(name), name


@torch.no_grad()
def test_merging_lora_keeps_the_outputs_and_gives_back_a_plain_model() -> None:
    model, template = make_model(11)
    keys = {name: value.shape for name, value in model.state_dict().items()}
    model.add_lora()
    assert model.has_lora
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith("pos_embed"):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    batch, features = template.packed(conversations()), random_features(2, 4)
    before = predict(model, batch, features)
    model.merge_lora()
    assert not model.has_lora
    assert {name: value.shape for name, value in model.state_dict().items()} == keys
    torch.testing.assert_close(predict(model, batch, features), before, rtol=1e-4, atol=1e-4)


def test_sizes_of_what_comes_out() -> None:
    model, template = make_model()
    batch = template.packed(conversations())
    output = model.predict(batch, random_features(1, len(batch.history))[0])
    assert output.images.shape == (3 + 4, TOKENS, FEATURES)
    assert output.logits.shape == (int((batch.labels != IGNORE).sum()), len(template.tokenizer))


# ---------------------------------------------------------------------------------------------------------
# words without pictures, and how a fresh model starts


def test_words_without_pictures_are_learned_beside_them(case: Case) -> None:
    """They add their own cross-entropy, with the weight of words, and nothing else."""
    model, template, told, features = case
    batch, spoken = template.packed(told), template.packed(told[::-1], pictures=False)
    alone, both = model(batch, features), model(batch, features, words=spoken)
    assert alone.words == 0 and torch.equal(both.text, alone.text) and torch.equal(both.image, alone.image)
    assert torch.equal(both.words, model.text_loss(spoken)) and both.words > 0
    weight = model.settings.text_loss_weight
    torch.testing.assert_close(both.total - alone.total, weight * both.words, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(both.total - alone.total, model.base_llm.lm_head.weight)
    assert gradient.abs().max() > 0


def test_a_fresh_model_looks_for_tokens_like_itself() -> None:
    """Queries and keys of a token are the same in every layer and head, before its position turns them."""
    model, _ = make_model(0)
    embeds = torch.nn.functional.normalize(torch.randn(7, model.settings.hidden_size), dim=1)
    for layer in model.base_llm.model.layers:
        query, key = (
            map_(embeds).unflatten(1, (model.settings.heads, -1)).transpose(0, 1)  # (heads, 7, head width)
            for map_ in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        torch.testing.assert_close(query, key)
        assert (query @ key.mT).diagonal(dim1=1, dim2=2).min() > 0
