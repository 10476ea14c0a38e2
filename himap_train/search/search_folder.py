"""A search on the screen and in its folder: schedules that `--schedule FILE` takes, trials, figures, a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from himap_train.evaluation.samples import EncodedSamples
from himap_train.evaluation.tables import json_ready
from himap_train.pruning.schedule import PruningSchedule
from himap_train.search.flow import HANDED_OVER, handed_over
from himap_train.search.trials import Trials
from himap_train.storage import atomic_file

TRIALS, FACTS, PICTURE = "trials.csv", "search.json", "search.png"


def schedule_file(budget: float) -> str:
    """The name of the file for a budget: schedule-0.40.yaml."""
    return f"schedule-{budget:.2f}.yaml" if round(budget, 2) == budget else f"schedule-{budget:g}.yaml"


def save_search(
    found: Sequence[Trials], folder: Path, facts: dict[str, Any], samples: EncodedSamples, flow: Sequence[float]
) -> None:
    """Write a schedule for each budget, trials.csv, search.json and search.png, each whole or not at all.

    Args:
        found: The search at each budget, with at least one trial.
        folder: Made if it is not there.
        facts: Entries of search.json: checkpoint, data, method, dense loss, ...
        samples: What was searched on.
        flow: From `mean_image_to_text`, of the dense model.
    """
    for one in found:
        told = f"loss {one.best.loss:.4f}, the lowest of {len(one.done)} schedules"
        text = yaml.safe_dump(one.best.schedule.to_dict(), sort_keys=False)
        with atomic_file(folder / schedule_file(one.space.budget)) as part:
            part.write_text(f"# flops_ratio {one.best.flops_ratio:.4f}; {told}\n{text}", encoding="utf-8")
    with atomic_file(folder / TRIALS) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["budget", "trial", "origin", "loss", "flops_ratio", "seconds", "schedule"])
        for one in found:
            for trial in one.done:
                figures = [f"{trial.loss:.6f}", f"{trial.flops_ratio:.5f}", f"{trial.seconds:.3f}"]
                schedule = json.dumps(trial.schedule.to_dict())
                writer.writerow([one.space.budget, trial.number, trial.origin, *figures, schedule])
    content = facts | {
        "samples": samples.count,
        **samples.tokens,
        "supervised_tokens": samples.supervised,
        "image_to_text": flow,
        "budgets": [_facts(one) for one in found],
    }
    with atomic_file(folder / FACTS) as part:
        part.write_text(json.dumps(json_ready(content), indent=2) + "\n", encoding="utf-8")
    with atomic_file(folder / PICTURE) as part:
        draw_search(found, facts["dense_loss"]).savefig(part, dpi=120, format="png")


def _facts(found: Trials) -> dict[str, Any]:
    best, baseline = found.best, found.baseline
    return {
        "budget": found.space.budget,
        "file": schedule_file(found.space.budget),
        "best": {**asdict(best), "schedule": best.schedule.to_dict()},
        "preset": baseline and {"schedule": baseline[0].to_dict(), "loss": baseline[1]},
        "trials": len(found.done),
        "seconds": sum(trial.seconds for trial in found.done),
        "interrupted": found.interrupted,
    }


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
