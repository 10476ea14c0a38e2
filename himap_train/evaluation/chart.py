"""The picture of a table: accuracy per question type, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from himap_train.evaluation.compare import Row

COLOURS = ("#4c566a", "#d08770", "#2a9d8f", "#5e81ac", "#b48ead", "#a3be8c", "#bf616a", "#ebcb8b")


def draw_chart(rows: Sequence[Row]) -> Figure:
    """Bars with standard errors, overall first; beside them overall accuracy over `flops_ratio` where it is known."""
    types = sorted({name for row in rows for name in row.result.types})
    with_cost = any(row.cost for row in rows)
    widths = [max(4.0, 1.0 + 0.25 * (len(types) + 1) * (len(rows) + 1)), 4.5][: 1 + with_cost]
    figure = Figure(figsize=(sum(widths), 4.4), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    _bars(axes[0], rows, types)
    if with_cost:
        _cost(axes[1], rows)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(rows)), frameon=False)
    return figure


def _bars(axes: Axes, rows: Sequence[Row], types: list[str]) -> None:
    places, width = np.arange(len(types) + 1), 0.8 / len(rows)
    for number, row in enumerate(rows):
        groups = [row.result.overall, *(row.result.types.get(name) for name in types)]
        heights = [100 * group.score if group else 0.0 for group in groups]
        errors = [100 * np.nan_to_num(group.standard_error) if group else 0.0 for group in groups]
        offsets = places + (number - (len(rows) - 1) / 2) * width
        bars = axes.bar(offsets, heights, width, yerr=errors, label=row.name, color=_colour(number), ecolor="#999999")
        axes.bar_label(bars, fmt="%.0f", fontsize=6, padding=1)
    many = len(types) > 3
    axes.set_xticks(places, ["overall", *types], rotation=30 if many else 0, ha="right" if many else "center")
    axes.set_ylim(0, 105)
    axes.set_ylabel(f"{rows[0].result.metric} score, %")
    axes.spines[["top", "right"]].set_visible(False)


def _cost(axes: Axes, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows):
        if ratio := row.result.flops_ratio:
            error = 100 * np.nan_to_num(row.result.standard_error)
            axes.errorbar(ratio.mean, 100 * row.result.score, yerr=error, fmt="o", color=_colour(number))
    axes.set_xlim(0, 1.05)
    axes.set_ylim(0, 105)
    axes.set_xlabel("flops_ratio of the prefill")
    axes.set_ylabel("overall, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
