"""A search on the screen and in its folder: schedules that `--schedule FILE` takes, trials and figures."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from himap_train.evaluation.samples import EncodedSamples
from himap_train.evaluation.tables import screen_table, write_json
from himap_train.pruning.schedule import PruningSchedule
from himap_train.search.flow import HANDED_OVER, handed_over
from himap_train.search.trials import Trials
from himap_train.storage import atomic_file

TRIALS, FACTS = "trials.csv", "search.json"


def schedule_file(budget: float) -> str:
    """The name of the file for a budget: schedule-0.40.yaml."""
    return f"schedule-{budget:.2f}.yaml" if round(budget, 2) == budget else f"schedule-{budget:g}.yaml"


def schedules_in(folder: Path) -> list[str]:
    """Names of the schedules that a search has left, whatever their budgets."""
    return [path.name for path in folder.glob("schedule-*.yaml") if re.fullmatch(r"schedule-[\d.e-]+\.yaml", path.name)]


def save_search(
    found: Sequence[Trials], folder: Path, facts: dict[str, Any], samples: EncodedSamples, flow: Sequence[float]
) -> None:
    """Write a schedule for each budget, trials.csv and search.json, each whole or not at all.

    Each search has at least one trial. `facts` are entries of search.json (checkpoint, data, method, dense loss, ...),
    `flow` is that of the dense model, from `mean_image_to_text`.
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
    write_json(folder / FACTS, content)


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
    ratio, baseline = found.space.flops_ratio, found.baseline
    rows = [["dense", "", f"{dense_loss:.4f}", "1.000"]]
    if baseline:
        schedule, loss = baseline
        rows.append(["preset himap at the budget", describe(schedule), f"{loss:.4f}", f"{ratio(schedule):.3f}"])
    for trial in sorted(found.done, key=lambda trial: trial.loss)[:5]:
        name = f"trial {trial.number} ({trial.origin})"
        rows.append([name, describe(trial.schedule), f"{trial.loss:.4f}", f"{trial.flops_ratio:.3f}"])
    title = f"budget {found.space.budget:g}: {len(found.done)} schedules tried"
    Console().print(screen_table(title, ["", "schedule", "loss", "flops_ratio"], rows, left=2))


def print_flow(flow: Sequence[float]) -> None:
    """A line a layer: saliency of what image tokens give to text, and its share of the total."""
    rows = [[str(layer), f"{given:.4f}", f"{given / sum(flow):.0%}"] for layer, given in enumerate(flow)]
    table = screen_table("saliency, image to text", ["layer", "saliency", "share"], rows)
    table.caption = f"{HANDED_OVER:.0%} of it has gone over before layer {handed_over(flow)}"
    Console().print(table)


def describe(schedule: PruningSchedule) -> str:
    """One line: "1 instruction 0.49, 5 image 0"."""
    return ", ".join(f"{stage.layer} {stage.criterion} {stage.keep_ratio:.3g}" for stage in schedule.stages)
