"""Figures of the benchmark: ratios beside what arithmetic allows, and cost against the number of rounds."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter

from nmlib.plots import FIXED, GRID, INK, MUTED, SPARE, WIDTH, Figure, wrap
from nmlib.timing import Result

LINES = {"cached": (FIXED["tokens"], "keys and values kept"), "plain": (FIXED["reencode"], "encoded and read again")}


def ratios(results: Sequence[Result]) -> Figure:
    """Ratios on a logarithmic scale with their intervals, each with a mark at its limit.

    Args:
        results: with a limit above zero.
    """
    figure = Figure(WIDTH, 0.62 * len(results) + 0.7, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    places = np.arange(len(results))[::-1]
    values = np.array([item.value for item in results])
    limits = np.array([item.limit or np.nan for item in results])
    axes.barh(places, values, 0.5, color=FIXED["tokens"], label="measured")
    ends = [[item.value if end is None else end for end in (item.low, item.high)] for item in results]
    axes.hlines(places, *np.transpose(ends), color=INK, linewidth=1.4, label="95% interval of the median")
    axes.vlines(limits, places - 0.36, places + 0.36, color=SPARE[2], linewidth=2.6, label="limit by arithmetic")
    lowest, highest = np.nanmin([values, limits]), np.nanmax([values, limits])
    axes.set(xscale="log", xlim=(min(0.5, lowest / 1.5), 3.2 * highest), ylim=(-0.6, len(results) - 0.4))
    for place, item, limit in zip(places, results, limits, strict=True):
        right = np.nanmax([item.value, limit, item.high or 0])
        axes.text(1.12 * right, place, f"{item.value:.3g} of {limit:.3g}", va="center", fontsize=8.5, color=INK)
    axes.set_yticks(places, [wrap(item.meaning.partition(";")[0], 38, 2) for item in results], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("times", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure


def cost_by_rounds(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Milliseconds of a round against its number, on logarithmic scales.

    Args:
        rows: `rounds`, and seconds under `cached` and `plain`.
    """
    figure = Figure(6.5, 3.2, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    numbers = [row["rounds"] for row in rows]
    for name, (colour, label) in LINES.items():
        axes.plot(numbers, [1e3 * row[name] for row in rows], color=colour, marker="o", ms=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="round", ylabel="milliseconds of the round")
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(lambda value, _: "")
        axis.label.set_fontsize(9)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure
