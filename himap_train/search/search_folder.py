"""What a search leaves in its folder: schedules that `--schedule FILE` takes, every trial, the figures, a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from himap_train.evaluation.samples import EncodedSamples
from himap_train.evaluation.tables import json_ready
from himap_train.search.show import draw_search
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
