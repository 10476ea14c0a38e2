"""What a search leaves in its folder: schedules that `--schedule FILE` takes, every trial, the figures, a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from himap_train.evaluation.samples import EncodedSamples
from himap_train.evaluation.tables import json_ready
from himap_train.models.training_cost import training_flops
from himap_train.search.show import draw_search
from himap_train.search.trials import Found, Trial, Trials
from himap_train.storage import atomic_file

TRIALS, FACTS, PICTURE = "trials.csv", "search.json", "search.png"
STEP_SAMPLES = 32
"""Samples of the training step that a search is compared with."""


def schedule_file(budget: float) -> str:
    """The name of the file for a budget: schedule-0.40.yaml."""
    return f"schedule-{budget:.2f}.yaml" if round(budget, 2) == budget else f"schedule-{budget:g}.yaml"


def training_steps(trials: Trials, samples: EncodedSamples) -> float:
    """How many training steps of `STEP_SAMPLES` samples under the best schedule cost what the trials did.

    Decoder alone, in FLOPs; the step without LoRA's own share, so the number is rather too high than too low.
    """
    config, tokens = trials.space.config, samples.tokens
    spent = sum(trial.schedule.cost(config, **tokens).flops for trial in trials.done) * samples.count
    without_lora = [0] * trials.space.num_layers
    step = training_flops(trials.best.schedule, config, *tokens.values(), lora_parameters=without_lora).decoder
    return spent / (step * STEP_SAMPLES)


def save_search(
    found: Sequence[Found], folder: Path, facts: dict[str, Any], samples: EncodedSamples, flow: Sequence[float]
) -> None:
    """Write a schedule for each budget, trials.csv, search.json and search.png, each whole or not at all.

    Args:
        found: The searches, with at least one trial each.
        folder: Made if it is not there.
        facts: Entries of search.json: checkpoint, data, method, dense loss, ...
        samples: What was searched on.
        flow: From `mean_image_to_text`, of the dense model.
    """
    for one in found:
        with atomic_file(folder / schedule_file(one.budget)) as part:
            part.write_text(_schedule_text(one), encoding="utf-8")
    with atomic_file(folder / TRIALS) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["budget", "trial", "origin", "loss", "flops_ratio", "seconds", "schedule"])
        writer.writerows(_cells(one.budget, trial) for one in found for trial in one.trials.done)
    content = facts | {
        "samples": samples.count,
        **samples.tokens,
        "supervised_tokens": samples.supervised,
        "image_to_text": flow,
        "budgets": [_facts(one, training_steps(one.trials, samples)) for one in found],
    }
    with atomic_file(folder / FACTS) as part:
        part.write_text(json.dumps(json_ready(content), indent=2) + "\n", encoding="utf-8")
    with atomic_file(folder / PICTURE) as part:
        draw_search(found, facts["dense_loss"]).savefig(part, dpi=120, format="png")


def _schedule_text(found: Found) -> str:
    best = found.trials.best
    head = (
        f"# flops_ratio {best.flops_ratio:.4f}; loss {best.loss:.4f}, the lowest of {len(found.trials.done)} schedules"
    )
    return f"{head}\n{yaml.safe_dump(best.schedule.to_dict(), sort_keys=False)}"


def _cells(budget: float, trial: Trial) -> list[Any]:
    figures = [f"{trial.loss:.6f}", f"{trial.flops_ratio:.5f}", f"{trial.seconds:.3f}"]
    return [budget, trial.number, trial.origin, *figures, json.dumps(trial.schedule.to_dict())]


def _facts(found: Found, steps: float) -> dict[str, Any]:
    best = found.trials.best
    preset = found.baseline and {"schedule": found.baseline[0].to_dict(), "loss": found.baseline[1]}
    return {
        "budget": found.budget,
        "file": schedule_file(found.budget),
        "best": {
            "trial": best.number,
            "origin": best.origin,
            "loss": best.loss,
            "flops_ratio": best.flops_ratio,
            "schedule": best.schedule.to_dict(),
        },
        "preset": preset,
        "trials": len(found.trials.done),
        f"training_steps_of_{STEP_SAMPLES}_samples": steps,
        "seconds": sum(trial.seconds for trial in found.trials.done),
        "interrupted": found.trials.interrupted,
    }
