"""The curves of a run: what its logs say of loss, accuracy, tokens and rates over the steps."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from himap_train.evaluation.chart import COLOURS
from himap_train.structured import named

PANELS = (  # title, and how the names of its curves begin
    ("loss", ("train/loss", "val/loss")),
    ("accuracy while training", ("val/accuracy", "val/accuracy_dense")),
    ("kept after the last stage, and FLOPs", ("image tokens kept", "train/flops_ratio")),
    ("keep ratio of a layer", ("keep_ratio/",)),
    ("learning rate", ("lr-",)),
)
Curves = dict[str, dict[int, float]]


def read_curves(run: Path) -> Curves:
    """Name to value at each step. Of a run in pieces, the later piece holds where two have a step.

    Raises:
        ValueError: A log is no table of numbers.
    """
    curves: Curves = defaultdict(dict)
    files = (run / "logs").glob("version_*/metrics.csv")
    for file in sorted(files, key=lambda file: int(file.parent.name.removeprefix("version_"))):
        with named(file, "is no log of a run"), file.open(encoding="utf-8", newline="") as lines:
            for line in csv.DictReader(lines):
                for name, value in line.items():
                    if value:
                        curves[name][int(line["step"])] = float(value)
    return curves


def draw_curves(curves: Curves) -> Figure | None:
    """A panel for each of `PANELS` that the log has something of; None where it has nothing."""
    panels = [(title, sorted(name for name in curves if name.startswith(starts))) for title, starts in PANELS]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return None
    figure = Figure(figsize=(3.6 * len(panels), 2.9), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, name in enumerate(names):
            steps, values = zip(*sorted(curves[name].items()), strict=True)
            axes.plot(steps, values, ".-", color=COLOURS[number % len(COLOURS)], label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    return figure
