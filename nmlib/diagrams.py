"""Drawings of how things hang together: the tree of a conversation, its tokens, who sees whom."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from nmlib.conversation import Conversation
from nmlib.layout import Layout
from nmlib.mllm import HistoryMLLM
from nmlib.plots import ACCENT, INK, MUTED, WIDTH, Figure, Picture, pixels, wrap

KINDS = {
    "text": "#dfe3e8", "reply": "#f8dd9b", "query": "#f2ab87", "history": "#a4cdea", "special": "#f4f5f7",
}  # fmt: skip
BLOCKS = ("query", "history")
LINE = 92  # characters of monospace text in a line of a token strip


def _lanes(bases: Sequence[int | None]) -> list[int]:
    """A row of the tree for each round: the first continuation of a picture stays in its row."""
    lanes: list[int] = []
    continued: set[int] = set()
    for base in bases:
        if base is not None and base not in continued:
            lanes.append(lanes[base])
        else:
            lanes.append(max(lanes, default=-1) + 1)
        continued |= set() if base is None else {base}
    return lanes


def state_graph(
    pictures: Sequence[Picture], captions: Sequence[str], bases: Sequence[int | None], numbers: bool = True
) -> Figure:
    """The tree of a conversation: time goes right, an arrow leads from the base of each picture to it.

    Every round has a column of its own, so that no arrow runs through a picture.

    Args:
        pictures: of the rounds, tensors (3, H, W) or PIL pictures.
        captions: what was said; stands above the picture.
        bases: the round each picture starts from. An arrow from any but the previous round is coloured.
        numbers: write `#1` and so on at the pictures.
    """
    lanes, count = _lanes(bases), len(pictures)
    unit = min(1.5, WIDTH / count)  # inches a round
    tall = 0.86 + 0.62 / unit  # units a row: picture and caption
    figure = Figure(count * unit, (max(lanes) + 1) * tall * unit)
    axes = figure.add_axes((0, 0, 1, 1))
    half = 0.4
    for index, (picture, base) in enumerate(zip(pictures, bases, strict=True)):
        x, y = float(index), -lanes[index] * tall
        axes.imshow(pixels(picture), extent=(x - half, x + half, y - half, y + half), interpolation="bicubic", zorder=2)
        axes.text(x, y + half + 0.05, wrap(captions[index], int(unit * 13)), ha="center", va="bottom", fontsize=7.5)
        if numbers:
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
            axes.text(x - half + 0.04, y + half - 0.05, f"#{index + 1}", ha="left", va="top", fontsize=7, bbox=box)
        if base is not None:
            straight = lanes[base] == lanes[index]
            start = (base + half, y) if straight else (base, -lanes[base] * tall - half)
            _arrow(axes, start, (x - half, y), MUTED if base == index - 1 else ACCENT, straight)
    axes.set(xlim=(-0.5, count - 0.5), ylim=(-max(lanes) * tall - half - 0.05, tall - half - 0.05), aspect="equal")
    axes.set_axis_off()
    return figure


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, straight: bool) -> None:
    style = "arc3,rad=0" if straight else "angle,angleA=-90,angleB=180,rad=8"
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=10,
            color=colour,
            linewidth=1.6,
            connectionstyle=style,
            shrinkA=0,
            shrinkB=1,
            zorder=1,
        )
    )


def conversation_graph(conversation: Conversation) -> Figure:
    """The state graph of a conversation that holds its pictures."""
    if conversation.images is None:
        raise ValueError(f"conversation {conversation.id!r} has no images; draw them with `rollback.with_images`")
    rounds = conversation.rounds
    return state_graph(list(conversation.images), [r.instruction for r in rounds], [r.base for r in rounds])


# ---------------------------------------------------------------------------------------------------------
# tokens


def token_kinds(words: Sequence[str], is_query: Sequence[bool]) -> list[str]:
    """What each token of a packed sequence is: a key of `KINDS`.

    Args:
        words: of the tokens.
        is_query: True for tokens of query blocks.
    """
    kinds, speaker = [], "text"
    for word, query in zip(words, is_query, strict=True):
        if word.startswith("<img_"):
            kinds.append("query" if query else "history")
        else:
            kinds.append(speaker if word[:1] not in "<[" else "special")
        speaker = {"[INST]": "text", "[/INST]": "reply"}.get(word, speaker)
    return kinds


def pieces(words: Sequence[str], kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Tokens as (text, kind), each block of a picture drawn together to one piece."""
    found: list[tuple[str, str]] = []
    for kind, group in groupby(zip(words, kinds, strict=True), key=lambda pair: pair[1]):
        block = [word for word, _ in group]
        if kind in BLOCKS:
            found.append((f"{len(block)} {kind} tokens", kind))
        else:
            found += [(word, kind) for word in block]
    return found


def token_strip(pieces: Sequence[tuple[str, str]]) -> Figure:
    """A sequence of tokens as coloured words.

    Args:
        pieces: (text, kind) in order, kinds as in `KINDS`.
    """
    places, x, y = [], 0.0, 0
    for text, kind in pieces:
        wide = len(text) + 1.6
        if x + wide > LINE:
            x, y = 0.0, y + 1
        places.append((x, y, wide, text, kind))
        x += wide + 0.4
    figure = Figure(WIDTH, 0.3 * (y + 2.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, LINE), ylim=(-y - 1.9, 0.7))
    axes.set_axis_off()
    used = [kind for kind in KINDS if any(kind == k for _, k in pieces)]
    legend = [(1.0 + 14 * number, y + 1.4, len(kind) + 1.6, kind, kind) for number, kind in enumerate(used)]
    for left, line, wide, text, kind in [*places, *legend]:
        axes.add_patch(
            FancyBboxPatch(
                (left, -line - 0.32),
                wide,
                0.64,
                boxstyle="round,pad=0,rounding_size=0.2",
                mutation_aspect=0.3,
                facecolor=KINDS[kind],
                edgecolor="none",
            )
        )
        axes.text(
            left + wide / 2, -line - 0.02, text, ha="center", va="center", fontsize=7.6, family="monospace", color=INK
        )
    return figure


def mask_picture(mask: Tensor, kinds: Sequence[str], words: Sequence[str] = ()) -> Figure:
    """Who sees whom: a row for each token, coloured where it may look, by the kind of what it sees.

    Args:
        mask: bool (T, T).
        kinds: of the T tokens, as in `KINDS`.
        words: of the T tokens, written at the sides; left out where there is no room.
    """
    names = list(KINDS)
    count = len(kinds)
    codes = np.array([names.index(kind) for kind in kinds])
    shown = np.where(mask.cpu().numpy(), codes[None, :] + 1, 0)  # (T, T)
    side = min(7.5, max(4.0, 0.19 * count))
    figure = Figure(side, side, layout="constrained")
    axes = figure.subplots()
    palette = ["white", *(KINDS[name] for name in names[:-1]), "#c9ced6"]
    axes.imshow(shown, cmap=ListedColormap(palette), vmin=0, vmax=len(names), interpolation="nearest")
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e3e6ea", linewidth=0.5 if count <= 64 else 0.1)
    axes.tick_params(which="both", length=0)
    axes.xaxis.tick_top()
    if words and count <= 64:
        shown_words = [kind.upper() if kind in BLOCKS else word for word, kind in zip(words, kinds, strict=True)]
        axes.set_xticks(range(count), shown_words, rotation=90, fontsize=6.5, family="monospace")
        axes.set_yticks(range(count), shown_words, fontsize=6.5, family="monospace")
    else:
        axes.set(xticks=[], yticks=[])
    axes.set_xlabel("is seen", fontsize=9)
    axes.set_ylabel("looks", fontsize=9)
    return figure


def heat_maps(
    panels: Mapping[str, np.ndarray | Tensor],
    x: str,
    y: str,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    numbers: bool = False,
) -> Figure:
    """Matrices side by side on one scale.

    Args:
        panels: title -> matrix.
        x: what the columns are.
        y: what the rows are.
        columns: their names; numbers if there are none.
        rows: their names; numbers if there are none.
        numbers: write each value into its cell.
    """
    arrays = {title: np.asarray(matrix, dtype=float) for title, matrix in panels.items()}
    top = max(float(array.max()) for array in arrays.values())
    tall = 0.9 + 2.8 * max(array.shape[0] / array.shape[1] for array in arrays.values())
    figure = Figure(3.6 * len(arrays) + 0.6, tall, layout="constrained")
    grid = figure.subplots(1, len(arrays), squeeze=False)[0]
    for axes, (title, array) in zip(grid, arrays.items(), strict=True):
        image = axes.imshow(array, cmap="Blues", vmin=0, vmax=top or 1.0)
        axes.set_title(title, fontsize=9.5, color=INK)
        axes.set_xlabel(x, fontsize=9)
        axes.set_ylabel(y, fontsize=9)
        for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
            axis.set_major_locator(MaxNLocator(integer=True))
            if names:
                axis.set_ticks(range(len(names)), names)
        axes.tick_params(labelsize=8)
        if numbers:
            for row, column in np.ndindex(array.shape):
                value = array[row, column]
                ink = "white" if value > 0.6 * top else INK
                axes.text(
                    column, row, f"{value:.2g}" if value else "0", ha="center", va="center", fontsize=8, color=ink
                )
    figure.colorbar(image, ax=grid, shrink=0.8).ax.tick_params(labelsize=8)
    return figure


@torch.no_grad()
def kept_maps(model: HistoryMLLM, layout: Layout, history: Tensor, size: int) -> Tensor:
    """What the copy gate keeps of the picture that each query block starts from, as pictures.

    Args:
        model: predicts; without a gate it keeps nothing.
        layout: the batch.
        history: (C, N, D_feature) features in the order of `layout.history`.
        size: pixels a side.

    Returns:
        (Q, 3, size, size) from 0, drawn anew, to 1, kept, in the order of `layout.queries`.
    """
    kept = torch.zeros(len(layout.queries), model.tokens_per_image)  # (Q, N)
    if model.copy_gate is not None:
        said: list[Tensor] = []
        watch = model.copy_gate.register_forward_hook(lambda *call: said.append(call[-1]))
        try:
            model.predict(layout, history)
        finally:
            watch.remove()
        kept = said[0].squeeze(-1).sigmoid().cpu() * (layout.bases.cpu() >= 0)[:, None]  # (Q, N)
    side = int(kept.shape[1] ** 0.5)
    grids = kept.float().unflatten(1, (side, side))[:, None]  # (Q, 1, n, n)
    return nn.functional.interpolate(grids, (size, size)).expand(-1, 3, -1, -1)  # (Q, 3, size, size)
