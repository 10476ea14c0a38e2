"""The picture of accuracy against cost: one line a method, over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from himap_train.evaluation.chart import COLOURS

Points = Sequence[Sequence[tuple[float, float]]]
"""For each budget the (flops_ratio, accuracy in %) of each seed."""


def draw_trade_off(lines: Mapping[str, Points], dense: Sequence[float]) -> Figure:
    """Means with standard deviations over the seeds.

    Args:
        lines: Name of a method to its points.
        dense: Accuracies of the dense model in %, one a seed; a band.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    middle, spread = float(np.mean(dense)), float(np.std(dense, ddof=1)) if len(dense) > 1 else 0.0
    axes.axhspan(middle - spread, middle + spread, color="#dddddd", zorder=0)
    axes.axhline(middle, color="#888888", linewidth=1, label="dense, fine-tuned", zorder=1)
    for number, (name, points) in enumerate(lines.items()):
        ratios = [np.mean([ratio for ratio, _ in at]) for at in points]
        means = [np.mean([score for _, score in at]) for at in points]
        errors = [float(np.std([score for _, score in at], ddof=1)) if len(at) > 1 else 0.0 for at in points]
        style = "o--" if max(map(len, points)) == 1 else "o-"
        axes.errorbar(
            ratios, means, yerr=errors, fmt=style, color=COLOURS[number % len(COLOURS)], label=name, capsize=2, ms=4
        )
    axes.set_xlabel("flops_ratio of the prefill")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
