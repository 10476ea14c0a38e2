"""Accuracy against FLOPs: what each way of choosing layers and ratios is worth at five budgets, over several seeds.

python recipes/budgets_table.py                          # about three hours on two cores

Every fine-tuning is the quickstart in bf16 with its own schedule. Choices (the training-free search, the grid) are made
on validation scenes, the table on test scenes. The grid has HiMAP's form, trains each of its candidates for a short
while and takes the best. The search chooses each stage's criterion too; what learns its ratios starts from its schedule
at the same budget, the elastic checkpoint has its layers and proportions at the middle one. Runs that are there already
are not repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig

from himap_train.command_line import run_command
from himap_train.data.sources import open_source
from himap_train.evaluation.accuracy_against_cost import Scores, point, save_trade_off
from himap_train.evaluation.compare import compare
from himap_train.evaluation.tables import save_table
from himap_train.experiments import METRICS, common_options, fine_tune_all, points, rows_of
from himap_train.models.loading import EMBEDDED, load_llava, resolve_model
from himap_train.pruning.reading import read_schedule
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage
from himap_train.search.grid import himap_grid
from himap_train.search.search_folder import schedule_file

VALIDATION, TEST = "embedded:validation?scenes=700&seed=5", "embedded:test?scenes=700&seed=11"
SEARCHED_ON = "embedded:validation?scenes=300&seed=5"
QUICKSTART = PruningSchedule((PruningStage(1, "instruction", 0.6), PruningStage(3, "image", 0.15)))
TOKENS = (144, 13)  # image tokens, and the mean of a prompt's other tokens
NAMES = {
    "free": "HiMAP, training-free",
    "search": "training-free search",
    "grid": "adapted, grid search",
    "searched": "adapted, the search's schedule",
    "learned": "adapted, learned ratios",
    "elastic": "elastic, one checkpoint",
    "random": "adapted, random selection",
}


def main(
    budgets: list[float] = [0.25, 0.32, 0.4, 0.55, 0.8],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    steps: int = 300,
    grid_steps: int = 80,
    elastic_steps: int = 600,
    output: Path = Path("runs/budgets"),
    workers: int = 2,
) -> None:
    """Run what is missing, then print and save the table and its picture.

    Args:
        budgets: `flops_ratio` of the prefill.
        seeds: Seeds of each fine-tuning.
        steps: Optimizer steps of a fine-tuning at one budget.
        grid_steps: Steps of each candidate of the grid.
        elastic_steps: Steps of the one fine-tuning for all budgets.
        output: Folder of the runs, table and picture.
        workers: Runs at a time, one thread each.
    """
    searched = search(output / "search", budgets)
    config = AutoConfig.from_pretrained(resolve_model(EMBEDDED))
    grid = {budget: himap_grid(config, budget, *TOKENS) for budget in budgets}
    fine_tune_all(dict(grid_jobs(output, grid, grid_steps)), workers)
    chosen = {budget: best_of(output, budget, grid[budget]) for budget in budgets}
    fine_tune_all(dict(jobs(output, chosen, searched, seeds, steps, elastic_steps)), workers)
    scores = training_free(output / "training-free", budgets, searched) | adapted(output, budgets, seeds)
    named = {label: scores[name] for name, label in NAMES.items()}
    print(save_trade_off(output, named, dense_scores(output, seeds)))


def search(folder: Path, budgets: list[float]) -> dict[float, PruningSchedule]:
    """The schedules that `search_schedule.py` finds without training."""
    files = {budget: searched_file(folder.parent, budget) for budget in budgets}
    if not all(file.exists() for file in files.values()):
        command = [sys.executable, "recipes/search_schedule.py", "--data", SEARCHED_ON, "--output", str(folder)]
        free = ["--free-criteria", "true", "--trials", "40"]
        subprocess.run([*command, *free, "--budgets", json.dumps(budgets), "--overwrite", "true"], check=True)
    return {budget: read_schedule(file) for budget, file in files.items()}


def searched_file(output: Path, budget: float) -> Path:
    """Where the search leaves its schedule."""
    return output / "search" / schedule_file(budget)


def options(seed: int, steps: int, schedule: PruningSchedule | None, *others: str, test: str = TEST) -> list[str]:
    """Options of one fine-tuning."""
    given = ["--trainer.max_steps", str(steps), "--data.test", test, "--evaluation.before", "false"]
    stages = [] if schedule is None else ["--model.schedule", json.dumps(schedule.to_dict())]
    return [*common_options(seed), *others, *given, *stages]


def grid_jobs(output: Path, grid: dict[float, list[PruningSchedule]], steps: int) -> Iterator[tuple[Path, list[str]]]:
    """A short run for each candidate, measured on validation scenes."""
    for budget, schedules in grid.items():
        for number, schedule in enumerate(schedules):
            yield output / f"grid-{budget}-{number}", options(0, steps, schedule, test=VALIDATION)


def best_of(output: Path, budget: float, schedules: list[PruningSchedule]) -> PruningSchedule:
    """The candidate of the best accuracy; the first of equals."""
    places = range(len(schedules))
    scores = [score for _, score in points(output, f"grid-{budget}", list(places))]
    return schedules[max(places, key=lambda place: scores[place])]


def jobs(
    output: Path,
    chosen: dict[float, PruningSchedule],
    searched: dict[float, PruningSchedule],
    seeds: list[int],
    steps: int,
    elastic_steps: int,
) -> Iterator[tuple[Path, list[str]]]:
    """Every fine-tuning of the table."""
    lengths = ["--pruning.image_tokens", str(TOKENS[0]), "--pruning.text_tokens", str(TOKENS[1])]
    learned = ["--config", "configs/learned.yaml", *lengths]
    elastic = ["--config", "configs/elastic.yaml", *lengths, "--evaluation.budgets", json.dumps(list(chosen))]
    shape = searched[sorted(searched)[len(searched) // 2]]
    for seed in seeds:
        for budget, schedule in chosen.items():
            by_chance = PruningSchedule(tuple(PruningStage(s.layer, "random", s.keep_ratio) for s in schedule.stages))
            at = {"budget": budget, "start": searched_file(output, budget)}
            settings = [part for key, value in at.items() for part in (f"--pruning.learnable.{key}", str(value))]
            yield output / f"learned-{budget}-{seed}", options(seed, steps, None, *learned, *settings)
            yield output / f"searched-{budget}-{seed}", options(seed, steps, searched[budget])
            yield output / f"grid-best-{budget}-{seed}", options(seed, steps, schedule)
            yield output / f"random-{budget}-{seed}", options(seed, steps, by_chance)
        yield output / f"elastic-{seed}", options(seed, elastic_steps, shape, *elastic)
        yield output / f"dense-{seed}", options(seed, steps, PruningSchedule())


def training_free(folder: Path, budgets: list[float], searched: dict[float, PruningSchedule]) -> Scores:
    """HiMAP and the search's schedules on the model as it ships."""
    if not (folder / METRICS).exists():
        model, processor = load_llava(EMBEDDED, attn_implementation="eager")
        himap = {f"free {budget}": QUICKSTART.at_budget(model.config, budget, *TOKENS) for budget in budgets}
        found = {f"search {budget}": schedule for budget, schedule in searched.items()}
        with torch.autocast("cpu", torch.bfloat16):
            rows = compare(model, processor, open_source(TEST), himap | found, progress=False)
        folder.mkdir(parents=True, exist_ok=True)
        save_table(rows, folder)
    by_name = {row["name"]: point(row) for row in rows_of(folder)}
    return {name: {budget: [by_name[f"{name} {budget}"]] for budget in budgets} for name in ("free", "search")}


def adapted(output: Path, budgets: list[float], seeds: list[int]) -> Scores:
    """What was fine-tuned under pruning."""
    runs = {"grid": "grid-best", "searched": "searched", "learned": "learned", "random": "random"}
    scores: Scores = {
        name: {budget: points(output, f"{run}-{budget}", seeds) for budget in budgets} for name, run in runs.items()
    }
    scores["elastic"] = {budget: points(output, "elastic", seeds, f"adapted pruned at {budget}") for budget in budgets}
    return scores


def dense_scores(output: Path, seeds: list[int]) -> dict[str, list[float]]:
    """Without pruning."""
    rows = {
        "dense fine-tuned": points(output, "dense", seeds, "fine-tuned dense"),
        "elastic, run dense": points(output, "elastic", seeds, "adapted, evaluated dense"),
    }
    return {name: [score for _, score in at] for name, at in rows.items()}


if __name__ == "__main__":
    sys.exit(run_command(main))
