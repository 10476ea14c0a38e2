"""A search on the screen and as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from himap_train.pruning.schedule import PruningSchedule
from himap_train.search.flow import HANDED_OVER, handed_over
from himap_train.search.trials import Trials


def print_search(found: Trials, dense_loss: float) -> None:
    """The best few schedules of a budget, with dense and the preset to compare, on standard output."""
    table = Table(title=f"budget {found.space.budget:g}: {len(found.done)} schedules tried")
    for name in ("", "loss", "flops_ratio", "schedule"):
        table.add_column(name, justify="left" if name in ("", "schedule") else "right")
    table.add_row("dense", f"{dense_loss:.4f}", "1.000", "")
    ratio = found.space.flops_ratio
    if found.baseline:
        schedule, loss = found.baseline
        table.add_row("preset himap at the budget", f"{loss:.4f}", f"{ratio(schedule):.3f}", describe(schedule))
    for trial in sorted(found.done, key=lambda trial: trial.loss)[:5]:
        name = f"trial {trial.number} ({trial.origin})"
        table.add_row(name, f"{trial.loss:.4f}", f"{trial.flops_ratio:.3f}", describe(trial.schedule))
    Console().print(table)


def print_flow(flow: Sequence[float]) -> None:
    """A line a layer: saliency of what image tokens give to text, and its share of the total."""
    table = Table(title="saliency, image to text")
    for name in ("layer", "saliency", "share"):
        table.add_column(name, justify="right")
    for layer, given in enumerate(flow):
        table.add_row(str(layer), f"{given:.4f}", f"{given / sum(flow):.0%}")
    table.caption = f"{HANDED_OVER:.0%} of it has gone over before layer {handed_over(flow)}"
    Console().print(table)


def describe(schedule: PruningSchedule) -> str:
    """One line: "1 instruction 0.49, 5 image 0"."""
    return ", ".join(f"{stage.layer} {stage.criterion} {stage.keep_ratio:.3g}" for stage in schedule.stages)


def draw_search(found: Sequence[Trials], dense_loss: float) -> Figure:
    """A line of panels a budget: loss against trial, and the image tokens of every layer coloured by loss."""
    figure = Figure(figsize=(11, 3.6 * len(found)), layout="constrained")
    for one, (history, shapes) in zip(found, figure.subplots(len(found), 2, squeeze=False), strict=True):
        losses = [trial.loss for trial in one.done]
        history.plot(losses, "o", color="#5e81ac", markersize=4, label="trial")
        history.plot([min(losses[: n + 1]) for n in range(len(losses))], color="#2a9d8f", label="best so far")
        if one.baseline:
            history.axhline(one.baseline[1], color="#d08770", linestyle="--", label="preset himap at the budget")
        history.axhline(dense_loss, color="#4c566a", linestyle=":", label="dense")
        history.set(xlabel="trial", ylabel="loss", title=f"budget {one.space.budget:g}")
        history.legend(frameon=False, fontsize=8)
        norm = Normalize(min(losses), sorted(losses)[len(losses) * 3 // 4])  # bad ones would use up the colours
        colours = ScalarMappable(norm, "viridis_r")
        for trial in sorted(one.done, key=lambda trial: -trial.loss):
            counts = one.space.layer_counts(trial.schedule)
            shapes.step(
                range(len(counts)), counts, where="mid", color=colours.to_rgba(np.array([trial.loss]))[0], alpha=0.7
            )
        best = one.space.layer_counts(one.best.schedule)
        shapes.step(range(len(best)), best, where="mid", color="#bf616a", linewidth=2.5, label="best")
        shapes.set(xlabel="layer", ylabel="image tokens", title="schedules tried")
        shapes.legend(frameon=False, fontsize=8)
        figure.colorbar(colours, ax=shapes, label="loss")
    return figure
