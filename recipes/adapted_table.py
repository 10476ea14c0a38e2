"""What each method is worth once the model has adapted to it: fine-tunings of equal length on scenes it does not know.

python recipes/adapted_table.py --split validation      # "embedded-fine" on crowded scenes: twelve minutes a method

The scenes are the fine ones, crowded by decoys that the base has never seen, so there is something to learn. Every run
is elastic: one fine-tuning is measured at all budgets. `learned` trains its ranking beside the model. Runs that are
there already are not repeated, so an interrupted table goes on where it stopped.
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from himap_train.command_line import run_command
from himap_train.evaluation.accuracy_against_cost import Scores, save_trade_off
from himap_train.experiments import common_options, fine_tune_all, points
from himap_train.models.foresight import learned_layers
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage


def _form(*stages: tuple[int, str, float], enter: int = 0) -> PruningSchedule:
    return PruningSchedule(tuple(PruningStage(*stage) for stage in stages), enter=enter)


READ = 5
"""The layer before which 90 % of the image has been read, as `information_flow.py` says of "embedded-fine"."""
FORMS = {
    "uniform": _form((0, "uniform", 0.3)),
    "random": _form((0, "random", 0.3)),
    "first-k": _form((0, "first-k", 0.3)),
    "average-pool": _form((0, "average-pool", 0.3)),
    "divprune": _form((0, "divprune", 0.3)),
    "coverage": _form((0, "coverage", 0.3)),
    "visionzip": _form((0, "visionzip", 0.3)),
    "divprune-vtw": _form((0, "divprune", 0.4), (READ, "uniform", 0.0)),
    "coverage-vtw": _form((0, "coverage", 0.4), (READ, "uniform", 0.0)),
    "learned": _form((0, "learned", 0.3)),
    "learned-vtw": _form((0, "learned", 0.4), (READ, "uniform", 0.0)),
    "learned-image": _form((0, "learned", 0.416), (READ, "image", 0.079)),
    "dart": _form((1, "dart", 0.3)),
    "sparsevlm": _form((1, "sparsevlm", 0.3)),
    "last_token": _form((1, "last_token", 0.3)),
    "instruction": _form((1, "instruction", 0.3)),
    "himap": _form((1, "instruction", 0.5), (3, "image", 0.125)),
    "hidrop": _form((2, "last_token", 0.4), (3, "last_token", 0.1), (READ, "last_token", 0.0), enter=1),
}
"""What each method's budgets scale. Layers were chosen on fine validation; `-vtw`: all leave for good (VTW)."""
LAYER_IN_FULL = 0.2
"""The lowest budget of what chooses behind a layer that has all tokens: an eighth is spent by then."""
DRAWN = ("learned-image", "learned", "coverage-vtw", "divprune", "coverage", "instruction", "himap", "uniform")


def main(
    methods: list[str] = list(FORMS),  # noqa: B006, B008
    budgets: list[float] = [0.1, 0.2, 0.3, 0.4],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    steps: int = 150,
    kind: str = "fine-",
    decoys: int = 80,
    split: str = "test",
    output: Path = Path("runs/adapted"),
    workers: int = 1,
) -> None:
    """Run what is missing, then print and save the table and its picture.

    Args:
        methods: Of `FORMS`.
        budgets: `flops_ratio` of the prefill.
        seeds: One fine-tuning of each method for each.
        steps: Optimizer steps of each.
        kind: Of scenes: "fine-", or "" for coarse ones.
        decoys: Striped tiles in a fine scene.
        split: "test", or "validation" to choose by.
        output: Folder of the runs, budgets.md and budgets.png.
        workers: Runs at a time, one thread each.
    """
    crowd = f"&decoys={decoys}" if kind else ""
    data = {"train": f"embedded:{kind}train?scenes=4800&fixed=1{crowd}"}
    data["test"] = f"embedded:{kind}{split}?scenes=400&seed=11{crowd}"
    fine_tune_all(dict(jobs(output, methods, budgets, seeds, steps, data)), workers)
    drawn = [f"{name}, adapted" for name in DRAWN]
    print(save_trade_off(output, *results(output, methods, budgets, seeds), drawn))


def results(
    output: Path, methods: list[str], budgets: list[float], seeds: list[int]
) -> tuple[Scores, dict[str, list[float]]]:
    """What the runs of `jobs` measured: at the budgets before and after training, and without pruning."""
    scores: Scores = {}
    for name in methods:
        met = within(name, budgets)
        if not learned_layers(FORMS[name]):
            scores[name] = {b: points(output, name, seeds[:1], f"training-free pruned at {b}") for b in met}
        scores[f"{name}, adapted"] = {b: points(output, name, seeds, f"adapted pruned at {b}") for b in met}
    dense = {
        "dense, fine-tuned": points(output, "dense", seeds, "fine-tuned dense"),
        "dense, not fine-tuned": points(output, "dense", seeds[:1], "dense, not fine-tuned"),
        **{f"{name}, adapted, run dense": points(output, name, seeds, "adapted, evaluated dense") for name in methods},
    }
    return scores, {name: [score for _, score in at] for name, at in dense.items()}


def within(name: str, budgets: list[float]) -> list[float]:
    """The budgets that a method can meet.

    Raises:
        ValueError: There is none.
    """
    stages = FORMS.get(name, PruningSchedule()).stages
    lowest = LAYER_IN_FULL if stages and stages[0].layer else 0.0
    if found := [budget for budget in budgets if budget >= lowest]:
        return found
    raise ValueError(f"{name} meets no budget of {budgets}, it needs {lowest}: give a higher one, or leave it out")


def jobs(
    output: Path, methods: list[str], budgets: list[float], seeds: list[int], steps: int, data: dict[str, str]
) -> Iterator[tuple[Path, list[str]]]:
    """Every fine-tuning of the table: options of the ordinary command line."""
    for seed in seeds:
        for name in ["dense", *methods]:
            schedule, met = FORMS.get(name, PruningSchedule()), within(name, budgets)
            elastic = ["--config", "configs/elastic.yaml", "--pruning.elastic.budgets", json.dumps([met[0], met[-1]])]
            elastic += ["--evaluation.budgets", json.dumps(met)]
            # What stands before training is the same for all seeds, and a ranking that is not trained is none.
            before = seed == seeds[0] and not learned_layers(schedule)
            given = {
                "--model.schedule": json.dumps(schedule.to_dict()),
                "--trainer.max_steps": str(steps),
                "--data.train": data["train"],
                "--data.test": data["test"],
                "--data.cache_image_features": str(output / ("features_tower" if schedule.uses_tower else "features")),
                "--evaluation.before": "true" if before else "false",
            }
            pairs = [part for pair in given.items() for part in pair]
            yield output / f"{name}-{seed}", [*common_options(seed), *(elastic if schedule.stages else []), *pairs]


if __name__ == "__main__":
    sys.exit(run_command(main))
