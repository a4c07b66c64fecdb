"""Figures show what the tables say, in the same colours everywhere, and never touch global state."""

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Annotation, Text
from PIL import Image
from toy import conversations, make_model, random_features

from nmlib import diagrams, plots
from nmlib.config import DataConfig
from nmlib.layout import Template, build_tokenizer
from nmlib.rollback import build_conversations, with_images
from nmlib.world import WorldSource


def pictures(count: int) -> list[torch.Tensor]:
    return [torch.full((3, 8, 8), index / count) for index in range(count)]


def answers() -> pd.DataFrame:
    """Two stages, three depths, ten conversations: accuracy falls with depth, and is known."""
    rows = [
        {"stage": stage, "depth": depth, "accuracy": float(index < hits - depth), "ceiling": 0.2, "chance": 0.25}
        for stage, hits in (("markov", 4), ("rollback", 10))
        for depth in (1, 2, 3)
        for index in range(10)
    ]
    return pd.DataFrame(rows)


def test_figures_are_white_pngs(tmp_path: Path) -> None:
    figure = plots.film_strip(pictures(3), ["one", "two", "three"])
    path = tmp_path / "strip.png"
    assert figure.save(path) is figure
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert figure._repr_png_() == path.read_bytes()


def test_colours_are_fixed_for_known_names_and_distinct_for_others() -> None:
    found = plots.colours(["markov", "new", "rollback", "newer"])
    assert found["markov"] == plots.FIXED["markov"]
    assert found["rollback"] == plots.FIXED["rollback"]
    assert len(set(found.values())) == 4
    assert plots.colours(["rollback"])["rollback"] == found["rollback"]


def test_film_strip_breaks_into_even_rows_and_wraps_captions() -> None:
    figure = plots.film_strip(pictures(10), ["a long instruction that needs more than one line"] * 10, columns=8)
    assert len(figure.axes) == 10
    assert "\n" in figure.axes[0].get_xlabel()


def test_picture_grid_takes_rows_of_unequal_length() -> None:
    figure = plots.picture_grid({"a": pictures(4), "b": pictures(2)}, ["one", "two", "three", "four"])
    shown = [bool(axes.images) for axes in figure.axes]
    assert shown == [True] * 6 + [False] * 2
    assert figure.axes[3].get_title() == "four"


def test_state_graph_gives_each_branch_its_row() -> None:
    bases = [None, 0, 1, 0, 3, 1]
    assert diagrams._lanes(bases) == [0, 0, 0, 1, 1, 2]
    figure = diagrams.state_graph(pictures(6), ["say"] * 6, bases)
    arrows = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    back = [arrow for arrow in arrows if to_hex(arrow.get_edgecolor()) == plots.ACCENT]
    assert (len(arrows), len(back)) == (5, 2)


def test_conversation_graph_needs_pictures() -> None:
    source = WorldSource(16)
    [talk] = build_conversations(source, DataConfig(conversations=1, rounds=(4,)), seed=0, split="train")
    with pytest.raises(ValueError, match=r"has no images; draw them with `rollback\.with_images`"):
        diagrams.conversation_graph(talk)
    [talk] = with_images(source, [talk])
    assert len(diagrams.conversation_graph(talk).axes[0].images) == 4


def test_accuracy_by_depth_shows_the_means() -> None:
    figure = plots.accuracy_by_depth(answers(), trained_depth=2)
    drawn = [line for line in figure.axes[0].lines if line.get_linestyle() != "None"]  # not the caps of error bars
    lines = {to_hex(line.get_color()): np.asarray(line.get_ydata()) for line in drawn}
    assert np.allclose(lines[plots.FIXED["rollback"]], [0.9, 0.8, 0.7])
    assert np.allclose(lines[plots.FIXED["markov"]], [0.3, 0.2, 0.1])
    assert np.allclose(lines[plots.INK], 0.2)
    assert "deeper than counted in training" in [text.get_text() for text in figure.axes[0].texts]
    assert len(plots.accuracy_by_depth(answers()).axes[0].texts) == 0


def test_bars_show_the_means_and_leave_out_what_was_not_measured() -> None:
    table = answers()
    table = table[(table["stage"] == "rollback") | (table["depth"] == 1)]
    axes = plots.bars(table, "depth", "accuracy", by="stage", lines="chance").axes[0]
    found: list[Any] = [box for box in axes.containers if isinstance(box, BarContainer)]
    assert [[round(bar.get_height(), 6) for bar in box] for box in found] == [[0.3], [0.9, 0.8, 0.7]]
    assert axes.get_ylim() == (-0.03, 1.03)


def test_curves_have_a_panel_for_each_column() -> None:
    table = answers().rename(columns={"stage": "policy", "depth": "round"}).assign(psnr=20.0)
    figure = plots.curves(table, "round", {"accuracy": "right", "psnr": "dB"}, by="policy")
    assert [axes.get_title() for axes in figure.axes] == ["right", "dB"]
    assert np.allclose(figure.axes[0].lines[1].get_ydata(), [0.9, 0.8, 0.7])


def test_names_of_neighbouring_points_do_not_cover_each_other() -> None:
    crowd = ("joint", "skip1", "skip2", "paired", "stage123")
    rows = [{"stage": name, "compliance": 0.5 + 0.001 * place, "identity": 0.5} for place, name in enumerate(crowd)]
    others = [
        {"stage": "far", "compliance": 0.1, "identity": 0.9},
        {"stage": "apart", "compliance": 0.9, "identity": 0.5},
    ]
    figure = plots.frontier(pd.DataFrame([*rows, *others] * 3), {})
    whole, large = figure.axes
    figure.draw_without_rendering()
    names = [text for axes in (whole, large) for text in axes.texts if isinstance(text, Annotation)]
    boxes = {text.get_text(): Text.get_window_extent(text) for text in names}  # without their lines
    assert set(boxes) == {*crowd, "apart", "far"}
    assert not [(a, b) for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    lifted = {text.get_text() for text in names if text.arrow_patch is not None}
    assert lifted and lifted < set(crowd)  # a name that had to go elsewhere has a line to its point
    assert [text.get_text() for text in whole.texts] == ["far"], "the others are named where they are drawn larger"
    assert [len(axes.containers) for axes in (whole, large)] == [7, 6]


def test_losses_that_fall_far_are_drawn_on_a_logarithmic_scale() -> None:
    far = [{"step": step, "text": 10.0**-step, "image": 1.0 / (step + 1)} for step in range(4)]
    figure = plots.loss_curves({"base": far}, {"text": "words", "image": "pictures"})
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]


def test_histogram_counts_whole_numbers() -> None:
    axes = plots.histogram({"rollback": [0, 0, 1, 2, 2, 2]}, "depth", whole=True).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [2, 1, 3]


def test_tokens_are_told_apart() -> None:
    source = WorldSource(16)
    settings = DataConfig(conversations=1, rounds=(3,), rollback_share=0.0, describe_share=0.0)
    [talk] = build_conversations(source, settings, seed=0, split="train")
    tokenizer = build_tokenizer(source.attributes, 4, 8)
    template = Template(tokenizer, 4, "grounded")
    batch = template.packed([talk])
    words = tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    kinds = diagrams.token_kinds(words, batch.query_slots[0].tolist())
    assert (kinds.count("query"), kinds.count("history")) == (8, 8)
    said = [template.tokenizer.decode(template.reply(talk, index)).removesuffix("<img>").split() for index in (1, 2)]
    assert [word for word, kind in zip(words, kinds, strict=True) if kind == "reply"] == [*said[0], *said[1]]
    pieces = diagrams.pieces(words, kinds)
    assert [text for text, kind in pieces if kind == "query"] == ["4 query tokens"] * 2
    assert len(diagrams.token_strip(pieces).axes[0].texts) == len(pieces) + len(set(kinds))
    shown = np.asarray(diagrams.mask_picture(batch.attention_mask()[0, 0], kinds, words).axes[0].images[0].get_array())
    assert ((shown > 0) == batch.attention_mask()[0, 0].numpy()).all()


def test_heat_maps_write_exact_zeros() -> None:
    figure = diagrams.heat_maps({"one": torch.tensor([[0.5, 0.0]]), "two": torch.eye(2)}, "x", "y", numbers=True)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.5", "0"]


@pytest.mark.parametrize("meaningful", [True, False])
def test_a_size_that_means_nothing_is_said_to(meaningful: bool) -> None:
    source = SimpleNamespace(kind="world", image_size=32)
    params = SimpleNamespace(source=source, tokens_per_image=16, seed=0, meaningful=meaningful)
    text = plots.about(SimpleNamespace(name="tiny", params=params)).data  # type: ignore[arg-type]
    assert text.startswith("Run `tiny`: source *world*, 32 px, 16 tokens a picture, seed 0.")
    assert ("mean nothing" in text) is not meaningful


def test_kept_maps_show_the_gate_and_nothing_without_one() -> None:
    told, features = conversations(), random_features(2, 4)
    for gate in (True, False):
        model, template = make_model(3, copy_gate=gate)
        batch = template.packed(told)
        history = features[batch.history[:, 0], batch.history[:, 1]]
        if model.copy_gate is not None:
            torch.nn.init.normal_(model.copy_gate.weight)
        maps = diagrams.kept_maps(model, batch, history, 6)
        assert maps.shape == (len(batch.queries), 3, 6, 6)
        with torch.no_grad():
            output = model.predict(batch, history)
        for one, image, drawn, base in zip(maps, output.images, output.drawn, batch.bases.tolist(), strict=True):
            start = history[base] if base >= 0 else drawn
            cells = one[0, 1::3, 1::3].flatten()[:, None]  # a pixel inside each of 2 x 2 tokens
            torch.testing.assert_close(drawn + cells * (start - drawn), image, rtol=1e-4, atol=1e-5)
            assert bool((cells > 0).all()) == (gate and base >= 0)
        assert model.copy_gate is None or not model.copy_gate._forward_hooks, "the hook is gone"
