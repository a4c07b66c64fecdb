"""SEED-X at full size on the meta device, and its parts at a small size against the facts of SEEDX.md."""

import re
from typing import Any

import pytest
import seedx_toy
import torch
import torch.nn.functional as F
from PIL import Image
from toy import raised
from transformers import LlamaConfig, LlamaForCausalLM

from nmlib import seedx_vision
from nmlib.config import SeedXConfig
from nmlib.layout import IGNORE
from nmlib.seedx import SeedX, added_words, check_tokenizer, count_parameters, grow_vocabulary
from nmlib.seedx_adapter import AdapterResampler, SDXLAdapter
from nmlib.seedx_layout import MADE, READ, SampleError
from nmlib.seedx_vision import QwenViT, pool_tokens, repeat_tokens, select_grid

FULL = SeedXConfig()
LINEARS = {"self_attn.q_proj": (5120, 5120), "self_attn.k_proj": (5120, 5120), "self_attn.v_proj": (5120, 5120),
           "self_attn.o_proj": (5120, 5120), "mlp.gate_proj": (13824, 5120), "mlp.up_proj": (13824, 5120),
           "mlp.down_proj": (5120, 13824)}  # fmt: skip


def resampler_keys(name: str, queries: int, dim: int, kv_dim: int) -> dict[str, tuple[int, ...]]:
    """SEEDX.md section 7, written down by hand."""
    leaves = {"pos_embed": (queries, dim), "query": (queries, dim), "kv_proj.weight": (dim, kv_dim)}
    leaves |= {"attn.in_proj_weight": (3 * dim, dim), "attn.in_proj_bias": (3 * dim,)}
    leaves |= {"attn.out_proj.weight": (dim, dim), "attn.out_proj.bias": (dim,)}
    leaves |= {f"{norm}.{leaf}": (dim,) for norm in ("ln_q", "ln_kv") for leaf in ("weight", "bias")}
    return {f"{name}.{leaf}": shape for leaf, shape in leaves.items()}  # type: ignore[misc]


def agent_keys() -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {"patch_pos_embed": (4, 5120)}
    keys |= resampler_keys("input_resampler", 64, 5120, 4096) | resampler_keys("output_resampler", 64, 4096, 5120)
    keys |= {"llm.model.embed_tokens.weight": (32330, 5120), "llm.lm_head.weight": (32330, 5120)}
    keys["llm.model.norm.weight"] = (5120,)
    for layer in range(40):
        place = f"llm.model.layers.{layer}."
        keys |= {f"{place}{name}.weight": shape for name, shape in LINEARS.items()}
        keys |= {f"{place}{norm}.weight": (5120,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return keys


def vit_keys() -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {"conv1.weight": (1664, 3, 14, 14), "positional_embedding": (256, 1664)}
    keys |= {"proj": (4096, 4096)} | resampler_keys("attn_pool", 256, 4096, 1664)
    keys |= {f"ln_pre.{leaf}": (1664,) for leaf in ("weight", "bias")}
    keys |= {f"ln_post.{leaf}": (4096,) for leaf in ("weight", "bias")}
    linears = {"attn.in_proj": (4992, 1664), "attn.out_proj": (1664, 1664), "mlp.c_fc": (8192, 1664)}
    linears |= {"mlp.c_proj": (1664, 8192)}
    for layer in range(48):
        place = f"transformer.resblocks.{layer}."
        for name, shape in linears.items():
            keys |= {f"{place}{name}.weight": shape, f"{place}{name}.bias": shape[:1]}
        keys |= {f"{place}{norm}.{leaf}": (1664,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
    return keys


@pytest.fixture(scope="module")
def full() -> tuple[SeedX, QwenViT, SDXLAdapter]:
    """Everything at full size, without a byte of weights."""
    with torch.device("meta"):
        return SeedX(FULL), QwenViT(FULL.vision), SDXLAdapter()


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_full_size_counts(full: tuple[SeedX, QwenViT, SDXLAdapter]) -> None:
    agent, vit, adapter = full
    assert FULL.vocabulary == 32330 and len(added_words(FULL)) == 330
    assert count_parameters(vit) == 1_935_610_624
    assert count_parameters(agent.llm) == 13_019_243_520
    assert count_parameters(agent.input_resampler) == 126_525_440
    assert count_parameters(agent.output_resampler) == 88_637_440
    assert agent.patch_pos_embed.numel() == 20_480
    assert count_parameters(adapter.resampler) == 61_245_696
    assert count_parameters(adapter.unet) == 2_567_463_684
    total = sum(count_parameters(module) for module in full)
    assert total == 17_798_746_884
    own = count_parameters(agent) - count_parameters(agent.llm)
    assert round(4 * own / 1e6) == 861, "megabytes of agent/pytorch_model.bin in float32"


def test_full_size_keys_and_shapes(full: tuple[SeedX, QwenViT, SDXLAdapter]) -> None:
    agent, vit, _ = full
    assert shapes(agent) == agent_keys() and len(agent_keys()) == 363 + 23
    assert shapes(vit) == vit_keys()


def test_full_size_adapter_keys(full: tuple[SeedX, QwenViT, SDXLAdapter]) -> None:
    found = shapes(full[2].resampler)
    keys: dict[str, tuple[int, ...]] = {"latents": (1, 64, 1024)}
    linears = {"proj_in": (1024, 4096), "unet_proj_1": (768, 1024), "unet_proj_2": (1280, 1024)}
    linears |= {f"unet_attnpool.{name}_proj": (1024, 1024) for name in "qkv"} | {"unet_attnpool.c_proj": (1280, 1024)}
    for name, shape in linears.items():
        keys |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    keys["unet_attnpool.positional_embedding"] = (65, 1024)
    norms = ["norm_out"]
    for layer in range(4):
        place = f"layers.{layer}."
        keys |= {f"{place}0.to_q.weight": (1024, 1024), f"{place}0.to_kv.weight": (2048, 1024)}
        keys |= {f"{place}0.to_out.weight": (1024, 1024), f"{place}1.1.weight": (4096, 1024)}
        keys[f"{place}1.3.weight"] = (1024, 4096)
        norms += [f"{place}0.norm1", f"{place}0.norm2", f"{place}1.0"]
    keys |= {f"{norm}.{leaf}": (1024,) for norm in norms for leaf in ("weight", "bias")}
    assert found == keys
    with torch.device("meta"):
        assert SDXLAdapter(condition_image=True).unet.conv_in.weight.shape == (320, 8, 3, 3)
    assert full[2].unet.conv_in.weight.shape == (320, 4, 3, 3)


def test_full_size_lora() -> None:
    """125.2 M numbers on seven linear maps a layer; norms, embeddings, head and resamplers train beside them."""
    with torch.device("meta"):
        agent = SeedX(FULL)
        agent.add_lora()
    assert count_parameters(agent.llm, ["lora_"]) == 125_173_760
    norms = [name for name, p in agent.named_parameters() if "modules_to_save" in name and p.requires_grad]
    assert len(norms) == 81
    owners = {re.sub(r"^.*layers\.\d+\.(.*)\.lora_A.*$", r"\1", n) for n in agent.llm.state_dict() if "lora_A" in n}
    assert owners == LINEARS.keys()
    trained = {n for n, p in agent.named_parameters() if p.requires_grad and "lora_" not in n and n not in norms}
    assert {n for n in trained if "layers." in n} == set(), "nothing else inside the layers trains"
    assert sum(p.numel() for p in agent.parameters() if p.requires_grad) == 671_241_216


# ---------------------------------------------------------------------------------------------------------
# the encoder


@torch.no_grad()
def test_encoder_by_a_restatement() -> None:
    """Patches in raster order, positions resized from the pooled grid, [q, k, v] per head, LayerNorms of 1e-6."""
    vit, images = seedx_toy.vit(), torch.randn(2, 3, seedx_toy.SIDE, seedx_toy.SIDE)
    for parameter in vit.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    patches = F.unfold(images, 4, stride=4).transpose(1, 2) @ vit.conv1.weight.flatten(1).T  # (B, 49, D)
    grid = vit.positional_embedding.T.reshape(1, 24, 4, 4)
    positions = F.interpolate(grid, (7, 7), mode="bicubic", align_corners=False).flatten(2)[0].T
    x = F.layer_norm(patches + positions, (24,), vit.ln_pre.weight, vit.ln_pre.bias, 1e-6)
    for block in vit.transformer.resblocks:
        mixed = block.attn.in_proj(block.ln_1(x)).reshape(2, 49, 3, 3, 8)  # heads, then q k v, then numbers
        q, k, v = (mixed[:, :, :, part].transpose(1, 2) for part in range(3))
        weights = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)
        x = x + block.attn.out_proj((weights @ v).transpose(1, 2).reshape(2, 49, 24))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    expected = F.layer_norm(vit.attn_pool(x), (32,), vit.ln_post.weight, vit.ln_post.bias, 1e-6) @ vit.proj
    torch.testing.assert_close(vit(images), expected, rtol=1e-5, atol=1e-5)
    assert vit(images).shape == (2, 16, 32) and vit.attn_pool.ln_q.eps == 1e-6


def test_pooling_joins_four_of_a_row() -> None:
    """Cell k of 256 -> 64 is row k // 4, columns 4 * (k % 4) to 4 * (k % 4) + 3: runs, not squares."""
    tokens = torch.arange(256.0).reshape(1, 256, 1)
    pooled = pool_tokens(tokens, 64)[0, :, 0]
    for cell in range(64):
        row, column = cell // 4, 4 * (cell % 4)
        assert pooled[cell] == torch.tensor([16.0 * row + column + step for step in range(4)]).mean()
    predicted = torch.randn(3, 64, 5)
    assert torch.equal(pool_tokens(repeat_tokens(predicted, 256), 64), predicted), "repeating undoes no pooling"


def test_pixels_are_normalised_as_clip_does() -> None:
    picture = Image.new("RGB", (50, 20), (255, 0, 51))
    pixels = seedx_vision.to_pixels(picture, 28)
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (0.2 - 0.40821073) / 0.27577711]
    assert pixels.shape == (3, 28, 28)
    torch.testing.assert_close(pixels.mean((1, 2)), torch.tensor(expected))


@pytest.mark.parametrize(
    ("size", "grids", "expected"),
    [
        ((448, 448), ["1x1", "2x2"], (448, 448)),
        ((900, 900), ["1x1", "2x2"], (896, 896)),
        ((1000, 400), ["1x1", "2x1", "1x2"], (896, 448)),
        ((400, 1000), ["1x1", "2x1", "1x2"], (448, 896)),
        ((600, 500), ["1x1", "2x2", "3x1"], (448, 448)),  # by area 2x2 keeps all; by shape 1x1 or 2x2, 1x1 is smaller
        ((1400, 100), ["1x1", "4x1"], (1792, 448)),
    ],
)
def test_grid_of_a_picture(size: tuple[int, int], grids: list[str], expected: tuple[int, int]) -> None:
    assert select_grid(size, grids, 448) == expected


def test_tiles_in_raster_order_and_the_whole_last() -> None:
    picture = Image.new("RGB", (56, 28), (255, 0, 0))
    picture.paste((0, 0, 255), (28, 0, 56, 28))
    tiles = seedx_vision.tile(picture, ["1x1", "2x1"], 28)
    assert tiles.pixels.shape == (3, 3, 28, 28)
    assert tiles.positions.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.5]]
    red, blue = tiles.pixels[:, 0].mean((1, 2)), tiles.pixels[:, 2].mean((1, 2))
    assert red[0] > red[2] > red[1] and blue[1] > blue[2] > blue[0]
    assert len(seedx_vision.tile(picture, ["1x1"], 28).pixels) == 2, "even one cell gives the tile and the whole"


# ---------------------------------------------------------------------------------------------------------
# the agent


@torch.no_grad()
def test_patch_positions_by_hand() -> None:
    """(x, y, 1 - x, 1 - y) / 2 times the table, the same for all tokens of a block, after the resampler."""
    agent, features = seedx_toy.agent(), torch.randn(2, 16, 32)
    positions = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    blocks = agent.embed_images(features, torch.zeros(2), positions) - agent.input_resampler(features)
    table = agent.patch_pos_embed
    expected = (0.25 * table[0] + 0.75 * table[1] + 0.75 * table[2] + 0.25 * table[3]) / 2
    torch.testing.assert_close(blocks[0], expected.expand(4, -1), rtol=1e-4, atol=1e-5)
    whole = agent.embed_images(features, torch.zeros(2))
    torch.testing.assert_close(whole[1] - agent.input_resampler(features)[1], blocks[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["repeat", "direct"])
@torch.no_grad()
def test_predicted_tokens_are_read_as_the_setting_says(policy: Any) -> None:
    agent, predicted = seedx_toy.agent(history=policy), torch.randn(2, 4, 32)
    read = predicted.repeat_interleave(4, dim=1) if policy == "repeat" else predicted
    expected = agent.input_resampler(read) + agent.patch_pos_embed.sum(0) / 4
    torch.testing.assert_close(agent.embed_images(predicted, torch.zeros(2)), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_grown_vocabulary() -> None:
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                                       num_attention_heads=2, tie_word_embeddings=False))  # fmt: skip
    inputs, outputs = llm.get_input_embeddings().weight.clone(), llm.lm_head.weight.clone()
    grow_vocabulary(llm, 14)
    grown, head = llm.get_input_embeddings().weight, llm.lm_head.weight
    assert torch.equal(grown[:11], inputs) and torch.equal(head[:11], outputs)
    torch.testing.assert_close(grown[11:], inputs.mean(0).expand(3, -1))
    torch.testing.assert_close(head[11:], 3 * outputs.mean(0).expand(3, -1))


def test_tokenizer_of_other_weights_is_refused() -> None:
    text = raised(lambda: check_tokenizer(seedx_toy.tokenizer(), seedx_toy.settings(image_words=9), "t"), ValueError)
    assert text.startswith("t: tokenizer has 348 words, the model has 350; it lacks <img_00007>, <img_00008>; take")


# ---------------------------------------------------------------------------------------------------------
# sequences and losses


def learned(template: Any, sample: Any) -> str:
    return str(template.tokenizer.decode([label for label in sample.labels if label != IGNORE]))


def test_label_masks() -> None:
    """SEEDX.md section 3: what counts in an edit, a caption and answers."""
    template = seedx_toy.template()
    edit = template.edit("make the hat red", "here it is")
    assert learned(template, edit) == "here it is<img></s>"
    caption = template.text_to_image("make", "a hat", "here it is")
    assert learned(template, caption) == "<img></s>"
    answers = template.answer([("what is it", "a hat"), ("and the wall", "blue")], ((0.5, 0.5),))
    assert learned(template, answers) == "a hat blue</s>"
    for sample in (edit, caption, answers):
        assert sample.ids[0] == template.bos and sample.ids[-1] == template.eos
        assert all(label in (IGNORE, id_) for label, id_ in zip(sample.labels, sample.ids, strict=True))
        assert all(label == IGNORE for label, kind in zip(sample.labels, sample.kinds, strict=True) if kind)
    assert edit.kinds.count(READ) == edit.kinds.count(MADE) == 4 and caption.kinds.count(READ) == 0


def test_strings() -> None:
    template = seedx_toy.template()
    slots = "<img_00000><img_00001><img_00002><img_00003>"
    assert template.picture() == f"<img>{slots}</img>"
    assert template.picture(((0.2, 0.5), (0.5, 0.5))) == f"<patch>{slots}</patch><img>{slots}</img>"
    text = str(template.tokenizer.decode(template.edit("make the hat red", "here it is").ids)).replace(" ", "")
    assert text == f"<s>[INST]<img>{slots}</img>makethehatred[/INST]\nhereitis<img>{slots}</img></s>"
    behind = str(template.tokenizer.decode(template.edit("red", "ok", picture_first=False).ids)).replace(" ", "")
    assert behind.startswith(f"<s>[INST]red<img>{slots}</img>[/INST]\n")


def test_rounds_are_history_or_queries_as_the_setting_says() -> None:
    turns = [("make the hat red", "here it is"), ("go back", "yes")]
    for policy, read in (("repeat", 8), ("states", 4)):
        template = seedx_toy.template(history=policy)
        sample = template.rounds(turns)
        assert sample.kinds.count(READ) == read and sample.kinds.count(MADE) == 12 - read
        assert learned(template, sample) == "yes<img></s>", "the last round alone is learned"


def test_samples_that_cannot_be_used() -> None:
    template = seedx_toy.template(max_length=20)
    sample = template.edit("make the hat red", "here it is")
    text = raised(lambda: template.batch([sample]), SampleError)
    assert text == f"sample 0 has {len(sample.ids)} tokens; expected fewer than 20"
    text = raised(lambda: template.edit("make <img_00002> red", "here"), SampleError)
    assert text.startswith("text holds image words such as <img_00000>; expected plain words, found '[INST] <img>")
    text = raised(lambda: template.batch([template.ask(template.begin(), "hat")]), SampleError)
    assert text == "sample 0 supervises no token; expected a reply or a picture to learn"


def test_losses_by_hand_in_a_padded_batch() -> None:
    """Cross-entropy over all labels once, six times the squared error of the pooled target, tiles and all."""
    agent, template = seedx_toy.agent(), seedx_toy.template()
    tiles = ((0.25, 0.5), (0.75, 0.5), (0.5, 0.5))
    samples = [template.edit("make the hat red", "here it is", tiles), template.text_to_image("make", "a hat", "so")]
    batch, features = template.batch(samples), torch.randn(1, 5, 16, 32)
    assert batch.history.tolist() == [[0, 0], [0, 1], [0, 2]] and batch.queries.tolist() == [[0, 3], [0, 4]]
    losses = agent(batch, features)
    nll, images = [], []
    for sample, own in zip(samples, ([0, 1, 2], []), strict=True):
        embeds = agent.llm.get_input_embeddings()(torch.tensor(sample.ids))
        if own:
            blocks = agent.embed_images(features[0, own], torch.zeros(3), torch.tensor(tiles))
            embeds = embeds.masked_scatter((torch.tensor(sample.kinds) == READ)[:, None], blocks)
        states = agent.llm.model(inputs_embeds=embeds[None]).last_hidden_state[0]
        logits = agent.llm.lm_head(states).log_softmax(-1)
        nll += [-logits[at - 1, label] for at, label in enumerate(sample.labels) if label != IGNORE]
        images.append(agent.output_resampler(states[torch.tensor(sample.kinds) == MADE][None])[0])
    targets = features[0, 3:].reshape(2, 4, 4, 32).mean(2)
    image, text = (torch.stack(images) - targets).square().mean(), torch.stack(nll).mean()
    torch.testing.assert_close(losses.image, image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.text, text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.total, text + 6 * image, rtol=1e-4, atol=1e-4)


def test_own_predictions_can_stand_in_the_history() -> None:
    agent, template = seedx_toy.agent(), seedx_toy.template()
    batch, features = template.batch([template.rounds([("hat", "yes"), ("back", "so")])]), torch.randn(1, 3, 16, 32)
    assert batch.history.tolist() == [[0, 0], [0, 1]] and batch.queries.tolist() == [[0, 2]]
    own = agent(batch, features, replaced=torch.tensor([[False, True, False]]))
    assert torch.equal(own.total, agent(batch, features).total), "a picture without queries has no prediction"
    replaced = agent(batch, features, replaced=torch.tensor([[False, False, True]]))
    assert torch.isfinite(replaced.total)


@torch.no_grad()
def test_adapter_by_torch_attention() -> None:
    torch.manual_seed(0)
    adapter = AdapterResampler(token_dim=12, width=32, depth=2, heads=4, latents=5, widths=(7, 9)).eval()
    tokens = torch.randn(3, 11, 12)
    context, pooled = adapter(tokens)
    assert context.shape == (3, 5, 16) and pooled.shape == (3, 9)
    pool = adapter.unet_attnpool
    latents = adapter.latents.expand(3, -1, -1)
    for attend, feed in adapter.layers:
        both = torch.cat([attend.norm1(adapter.proj_in(tokens)), attend.norm2(latents)], 1)
        k, v = attend.to_kv(both).chunk(2, -1)
        split = [part.reshape(3, -1, 4, 8).transpose(1, 2) for part in (attend.to_q(attend.norm2(latents)), k, v)]
        mixed = (split[0] @ split[1].transpose(2, 3) / 8**0.5).softmax(-1) @ split[2]
        latents = latents + attend.to_out(mixed.transpose(1, 2).reshape(3, 5, 32))
        latents = latents + feed(latents)
    states = adapter.norm_out(latents)
    torch.testing.assert_close(context, torch.cat([adapter.unet_proj_1(states), adapter.unet_proj_2(states)], -1))
    x = (torch.cat([states.mean(1, keepdim=True), states], 1) + pool.positional_embedding).transpose(0, 1)
    bias = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    expected, _ = F.multi_head_attention_forward(
        x[:1], x, x, 32, 4, None, bias, None, None, False, 0.0, pool.c_proj.weight, pool.c_proj.bias, training=False,
        use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
    )  # fmt: skip
    torch.testing.assert_close(pooled, expected[0], rtol=1e-4, atol=1e-5)
