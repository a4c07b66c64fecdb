"""Figures of the book: each function takes pictures or a table and returns a matplotlib figure.

Figures never touch pyplot's global state. They are white in the light and in the dark theme, and a training stage
or a history policy has the same colour wherever it appears.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from nmlib.conversation import to_picture
from nmlib.metrics import column_interval
from nmlib.runtime import Run, atomic_path

Picture = Tensor | Image.Image

WIDTH = 7.8  # inches; the page scales every figure to its own width
DPI = 160
DECADES = 30.0  # losses that fall by more than this factor are drawn on a logarithmic scale
INK, MUTED, GRID, ACCENT = "#1b1f24", "#6a737d", "#e3e6ea", "#d55e00"
FIXED = {
    "rollback": "#0072b2", "markov": "#d55e00", "base": "#8a9099",
    "tokens": "#0072b2", "prefix": "#56b4e9", "reencode": "#d55e00", "oracle": "#444b54",
    "same": "#0072b2", "other": "#d55e00",
}  # fmt: skip
SPARE = ("#009e73", "#cc79a7", "#e69f00", "#7b61b8", "#56b4e9", "#a6761d")
LABEL = (46.0, 10.0)  # points that the name of a point takes
DASHES = {"prefix": (0, (5, 2)), "oracle": (0, (1, 1.4))}


class Figure(matplotlib.figure.Figure):
    """A figure that notebooks show by themselves, white behind whatever the theme."""

    def __init__(self, width: float = WIDTH, height: float = 3.2, **options: Any) -> None:
        super().__init__(figsize=(width, height), dpi=DPI, facecolor="white", **options)

    def png(self) -> bytes:
        """The figure as a PNG file."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.08)
        return buffer.getvalue()

    def save(self, path: Path) -> "Figure":
        """Write the PNG file, whole or not at all, and return the figure."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.png())
        return self

    def _repr_png_(self) -> bytes:
        return self.png()


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name: the fixed one of a known stage or policy, a spare one for any other."""
    others = [name for name in names if name not in FIXED]
    return {name: FIXED.get(name) or SPARE[others.index(name) % len(SPARE)] for name in names}


def pixels(picture: Picture) -> np.ndarray:
    """A picture as an array (H, W, 3)."""
    return np.asarray(to_picture(picture) if isinstance(picture, Tensor) else picture.convert("RGB"))


def wrap(text: str, width: int, lines: int = 4) -> str:
    """Text broken into at most so many lines."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))


def _show(axes: Axes, picture: Picture, edge: str | None = None) -> None:
    axes.imshow(pixels(picture), interpolation="bicubic")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=edge is not None, color=edge or INK, linewidth=2.2)


def _plain(axes: Axes) -> None:
    """Axes of a chart: two spines, a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


# ---------------------------------------------------------------------------------------------------------
# pictures and conversations


def film_strip(
    pictures: Sequence[Picture], captions: Sequence[str], columns: int = 8, edges: Sequence[str | None] | None = None
) -> Figure:
    """Pictures in a row, each with its caption below; long strips go on in further rows.

    Args:
        pictures: tensors (3, H, W) or PIL pictures.
        captions: one for each, for example the instruction.
        columns: most pictures in a row.
        edges: colour of each picture's frame; None for no frame.
    """
    rows = -(-len(pictures) // columns)
    columns = -(-len(pictures) // rows)
    side = WIDTH / columns
    figure = Figure(height=rows * (side + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(pictures):
            axes.set_axis_off()
            continue
        _show(axes, pictures[place], edges[place] if edges else None)
        axes.set_xlabel(wrap(captions[place], int(side * 14)), fontsize=8, color=INK)
    return figure


def picture_grid(
    rows: Mapping[str, Sequence[Picture]], columns: Sequence[str] = (), side: float | None = None
) -> Figure:
    """Rows of pictures with a label each, and captions above the columns.

    Args:
        rows: label -> pictures; rows may be of unequal length.
        columns: captions above the first row.
        side: inches of a picture; by default the figure's width is filled, with at most 1.3 inches.
    """
    most = max(len(row) for row in rows.values())
    side = side or min(1.3, (WIDTH - 1.0) / most)
    tight = ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.015)
    figure = Figure(most * side + 1.0, len(rows) * side + (0.6 if columns else 0.1), layout=tight)
    grid = figure.subplots(len(rows), most, squeeze=False)
    for row, (label, pictures) in enumerate(rows.items()):
        for place, axes in enumerate(grid[row]):
            if place >= len(pictures):
                axes.set_axis_off()
                continue
            _show(axes, pictures[place])
            if row == 0 and place < len(columns):
                small = side < 0.9
                text = wrap(columns[place], int(side * (17 if small else 14)), 7)
                axes.set_title(text, fontsize=6.5 if small else 8, color=INK)
        name = wrap(label, 12)
        grid[row][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=INK, labelpad=6)
    return figure


# ---------------------------------------------------------------------------------------------------------
# tables


def _bound(axes: Axes, values: pd.Series) -> None:
    """Show the whole range where the numbers are shares of right answers."""
    if values.isin((0.0, 1.0)).all():
        axes.set_ylim(-0.03, 1.03)


def _means(part: pd.DataFrame, x: str, y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Positions, means and 95% bootstrap intervals of a column by another."""
    found = [(key, column_interval(group, y, 400)) for key, group in part.groupby(x)]
    places = np.array([float(key) for key, _ in found])
    mean, low, high = (np.array([getattr(item, name) for _, item in found]) for name in ("value", "low", "high"))
    return places, mean, low, high


def curves(
    table: pd.DataFrame, x: str, columns: Mapping[str, str], by: str | None = None, label: str | None = None
) -> Figure:
    """Means of columns along `x` with bands of 95% bootstrap intervals, a panel for each column.

    Args:
        table: one row for each thing measured.
        x: column of the horizontal axis.
        columns: column -> title of its panel.
        by: column whose values become lines, for example `policy`.
        label: of the horizontal axis.
    """
    figure = Figure(WIDTH if len(columns) > 1 else 5.5, 3.0, layout="constrained")
    names = [str(name) for name in table[by].unique()] if by else [""]
    palette = colours(names) if by else {"": FIXED["tokens"]}
    for axes, (column, title) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        _plain(axes)
        for name in names:
            part = table[table[by] == name] if by else table
            places, mean, low, high = _means(part, x, column)
            axes.fill_between(places, low, high, color=palette[name], alpha=0.15, linewidth=0)
            axes.plot(places, mean, color=palette[name], linestyle=DASHES.get(name, "-"), marker="o", ms=3, label=name)
        _bound(axes, table[column])
        axes.set_title(title, fontsize=9.5, color=INK)
        axes.set_xlabel(label or x, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=bool((places % 1 == 0).all()), nbins=8))
    if by:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def accuracy_by_depth(table: pd.DataFrame, column: str = "accuracy", trained_depth: int | None = None) -> Figure:
    """Accuracy of each stage by rollback depth, between chance and the Markov ceiling.

    Args:
        table: rows of `experiments.rollback_table`, one kind of history.
        column: `accuracy` is compared with the ceiling, `retrieval` with chance.
        trained_depth: deepest rollback in training; deeper ones are marked.
    """
    figure = Figure(6.5, 3.6, layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    stages = [str(name) for name in table["stage"].unique()]
    palette = colours(stages)
    for number, stage in enumerate(stages):
        places, mean, low, high = _means(table[table["stage"] == stage], "depth", column)
        shifted = places + 0.05 * (number - (len(stages) - 1) / 2)
        bars = np.clip(np.stack([mean - low, high - mean]), 0, None)
        axes.errorbar(shifted, mean, bars, color=palette[stage], marker="o", ms=5, capsize=3, label=f"{stage}-trained")
    limit, words, dash = {
        "accuracy": ("ceiling", "Markov ceiling", "--"), "retrieval": ("chance", "chance", ":"),
    }[column]  # fmt: skip
    places, mean, _, _ = _means(table, "depth", limit)
    axes.plot(places, mean, color=INK, linestyle=dash, linewidth=1.4, label=words)
    if trained_depth is not None and trained_depth < places.max():
        axes.axvspan(trained_depth + 0.5, places.max() + 0.5, color=GRID, alpha=0.45, linewidth=0, zorder=0)
        axes.text(
            places.max() + 0.45, 0.97, "deeper than counted in training", ha="right", va="top", fontsize=8, color=MUTED
        )
    axes.set(xticks=places, xlim=(places.min() - 0.5, places.max() + 0.5), ylim=(-0.03, 1.03))
    axes.set_xlabel("rollback depth", fontsize=9)
    axes.set_ylabel({"accuracy": "full state right", "retrieval": "right base found"}[column], fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def bars(
    table: pd.DataFrame, x: str, y: str, by: str | None = None, title: str = "", lines: str | None = None
) -> Figure:
    """Bars of means with 95% bootstrap intervals.

    Args:
        table: one row for each thing measured.
        x: column of the groups.
        y: column of the numbers.
        by: column whose values stand side by side in each group.
        title: of the vertical axis.
        lines: column of a value to mark in each group, for example `chance`.
    """
    groups = list(dict.fromkeys(table[x]))
    names = [str(name) for name in table[by].unique()] if by else [""]
    palette = colours(names) if by else {"": FIXED["tokens"]}
    figure = Figure(WIDTH if len(groups) > 4 else 6.5, 3.0, layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    wide = 0.8 / len(names)
    for number, name in enumerate(names):
        part = table[table[by] == name] if by else table
        found = [column_interval(part[part[x] == g], y, 400) if (part[x] == g).any() else None for g in groups]
        places = [place + wide * (number - (len(names) - 1) / 2) for place, item in enumerate(found) if item]
        kept = [item for item in found if item]
        error = np.clip([[i.value - i.low for i in kept], [i.high - i.value for i in kept]], 0, None)
        axes.bar(places, [i.value for i in kept], 0.92 * wide, color=palette[name], label=name)
        axes.errorbar(places, [i.value for i in kept], error, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    if lines:
        marks = [float(table[table[x] == group][lines].mean()) for group in groups]
        axes.hlines(
            marks, np.arange(len(groups)) - 0.45, np.arange(len(groups)) + 0.45, color=INK, linestyle=":", label=lines
        )
    axes.set_xticks(range(len(groups)), [wrap(str(group), 14) for group in groups])
    _bound(axes, table[y])
    axes.set_ylabel(title or y, fontsize=9)
    axes.grid(axis="x", visible=False)
    if by or lines:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def frontier(table: pd.DataFrame, lines: Mapping[str, float]) -> Figure:
    """Identity against prompt compliance, a point with 95% bootstrap intervals for each stage; the best once larger.

    Args:
        table: rows of `people_experiments.personal_table`.
        lines: name -> identity to mark, for example the ceiling.
    """
    whole, large = (figure := Figure(9.0, 4.4, layout="constrained")).subplots(1, 2)
    palette = colours(list(table["stage"].unique()))
    found = {
        stage: [column_interval(table[table["stage"] == stage], name, 400) for name in ("compliance", "identity")]
        for stage in palette
    }
    best = [max(pair[axis].value for pair in found.values()) for axis in (0, 1)]
    near = [stage for stage, (x, y) in found.items() if x.value > best[0] / 2 and y.value > best[1] / 2]
    for axes in (whole, large):
        _plain(axes)
        for stage in found if axes is whole else near:
            (x, y), colour = found[stage], palette[stage]
            across, up = ([[p.value - p.low], [p.high - p.value]] for p in (x, y))
            axes.errorbar(x.value, y.value, up, across, fmt="o", color=colour, capsize=2)
        axes.set(xlabel="named attributes that are right", ylabel="similarity to another true picture")
    for name, value in lines.items():
        whole.axhline(value, color=MUTED, linestyle="--", linewidth=1)
        whole.annotate(name, (0.01, value), xycoords=("axes fraction", "data"), fontsize=8, color=MUTED, va="bottom")
    (left, right), (bottom, top) = large.get_xlim(), large.get_ylim()
    whole.indicate_inset((left, bottom, right - left, top - bottom))
    for axes, shown in ((whole, found.keys() - set(near)), (large, near)):
        _name_points(axes, {stage: (found[stage][0].value, found[stage][1].value) for stage in shown}, palette)
    return figure


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]], palette: Mapping[str, str]) -> None:
    """Write the name of each point beside it, higher up where another name stands already."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # where points lie on the page is known only now
    places: list[tuple[float, float]] = []
    for stage, point in sorted(points.items(), key=lambda item: item[1][1]):
        spot = axes.transData.transform(point) * 72 / figure.dpi  # (2,)
        x, y = spot[0] + 5, spot[1] + 4
        while any(abs(x - left) < LABEL[0] and abs(y - bottom) < LABEL[1] for left, bottom in places):
            y += 1
        places.append((x, y))
        beside = (x - spot[0], y - spot[1])
        line = {"arrowstyle": "-", "color": palette[stage], "linewidth": 0.5, "shrinkB": 3}
        axes.annotate(
            stage, point, xytext=beside, textcoords="offset points", fontsize=8.5, color=palette[stage],
            arrowprops=line if beside[1] > LABEL[1] else None, path_effects=[withStroke(linewidth=2.5, foreground="w")],
        )  # fmt: skip


def loss_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], columns: Mapping[str, str]) -> Figure:
    """Losses by training step, a panel for each kind of loss.

    Args:
        histories: name of the training -> records with `step`.
        columns: key of a record -> title of its panel.
    """
    figure = Figure(WIDTH if len(columns) > 1 else 5.5, 2.9, layout="constrained")
    palette = colours(list(histories))
    for axes, (column, title) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        _plain(axes)
        lowest, highest = np.inf, 0.0
        for name, history in histories.items():
            steps, values = [row["step"] for row in history], [row[column] for row in history]
            axes.plot(steps, values, color=palette[name], linewidth=1.5, label=name)
            lowest, highest = min(lowest, *values), max(highest, *values)
        if lowest > 0 and highest > DECADES * lowest:
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9.5, color=INK)
        axes.set_xlabel("step", fontsize=9)
    if len(histories) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def histogram(groups: Mapping[str, Sequence[float]], label: str, whole: bool = False) -> Figure:
    """Distributions over one another.

    Args:
        groups: name -> numbers.
        label: of the horizontal axis.
        whole: the numbers are counts, one bar each.
    """
    figure = Figure(5.5, 2.8, layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    palette = colours(list(groups))
    everything = np.concatenate([np.asarray(values, dtype=float) for values in groups.values()])
    edges = np.arange(everything.max() + 2) - 0.5 if whole else np.linspace(everything.min(), everything.max(), 40)
    wide, opaque = 0.85 if whole else 1.0, 0.75 if len(groups) > 1 else 1.0
    for name, values in groups.items():
        axes.hist(np.asarray(values), list(edges), color=palette[name], alpha=opaque, rwidth=wide, label=name)
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("count", fontsize=9)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=9)
    return figure


# ---------------------------------------------------------------------------------------------------------
# words


def about(run: Run) -> Markdown:
    """A line that says which run a notebook shows, and whether its numbers mean anything."""
    params = run.params
    line = (
        f"Run `{run.name}`: source *{params.source.kind}*, {params.source.image_size} px, "
        f"{params.tokens_per_image} tokens a picture, seed {params.seed}."
    )
    if not params.meaningful:
        line += " **This size only shows that everything runs: its numbers and pictures mean nothing.**"
    return Markdown(line)
