"""Accuracy against cost: a table and a picture with one line a method, over several seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from himap_train.evaluation.tables import COLOURS, markdown_lines

Scores = dict[str, dict[float, list[tuple[float, float]]]]
"""Method -> budget -> (flops_ratio, accuracy in %), one for each seed."""


def point(row: Mapping[str, Any]) -> tuple[float, float]:
    """Measured `flops_ratio` and accuracy in % of a row of metrics.json."""
    return float(row["flops_ratio"]["mean"]), 100 * float(row["overall"]["score"])


def save_trade_off(
    folder: Path, scores: Scores, dense: Mapping[str, Sequence[float]], drawn: Sequence[str] | None = None
) -> str:
    """Write budgets.md, budgets.json and budgets.png; returns the table.

    Args:
        folder: Where to.
        scores: Name to what it has at each budget that it can meet.
        dense: Name to accuracies in % without pruning, one a seed; the first is the picture's band.
        drawn: Which of the names are in the picture; None for all.
    """
    budgets = sorted({budget for at in scores.values() for budget in at})
    lines = [
        [name, *(mean_and_spread([score for _, score in at[b]]) if b in at else "" for b in budgets)]
        for name, at in scores.items()
    ]
    text = markdown_lines(["`flops_ratio`", *(str(budget) for budget in budgets)], lines)
    text += "".join(f"\n{name}: {mean_and_spread(values)}" for name, values in dense.items()) + "\n"
    (folder / "budgets.md").write_text(text, encoding="utf-8")
    content = json.dumps({"scores": scores, "dense": dense}, indent=2)
    (folder / "budgets.json").write_text(content + "\n", encoding="utf-8")
    shown = {name: at for name, at in scores.items() if drawn is None or name in drawn}
    draw_trade_off(shown, next(iter(dense.values()))).savefig(folder / "budgets.png", dpi=150)
    return text


def mean_and_spread(values: Sequence[float]) -> str:
    """`85.4 ± 1.1`, standard deviation; without it for a single value."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def draw_trade_off(scores: Scores, dense: Sequence[float]) -> Figure:
    """Means with standard deviations over the seeds.

    Args:
        scores: As in `save_trade_off`.
        dense: Accuracies of the dense model in %, one a seed; a band.
    """
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.subplots()
    middle, spread = float(np.mean(dense)), float(np.std(dense, ddof=1)) if len(dense) > 1 else 0.0
    axes.axhspan(middle - spread, middle + spread, color="#dddddd", zorder=0)
    axes.axhline(middle, color="#888888", linewidth=1, label="dense, fine-tuned", zorder=1)
    for number, (name, at_budgets) in enumerate(scores.items()):
        points = list(at_budgets.values())
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
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
