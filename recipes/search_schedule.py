"""Layers and ratios for a budget, found on your own data without training.

python recipes/search_schedule.py --budget 0.4     # the embedded model, 300 of its validation questions
python recipes/search_schedule.py --checkpoint llava-hf/llava-1.5-7b-hf --dtype bfloat16 --data train.json
                                  --image-folder images --budgets [0.25,0.4,0.6] --output runs/search
python recipes/evaluate.py --schedule runs/search/schedule-0.40.yaml     # or model.schedule of recipes/finetune.py

Every candidate meets the budget; the one with the lowest loss on the answers wins.
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from himap_train.analysis.saliency import measure
from himap_train.bar import progress_bar
from himap_train.command_line import new_output_folder, run_command
from himap_train.evaluation.samples import open_samples
from himap_train.models.installed import scorers_of
from himap_train.models.stock import base_model, text_decoder
from himap_train.pruning.schedule import PruningSchedule
from himap_train.search.flow import mean_image_to_text
from himap_train.search.proposals import Method, search_budget
from himap_train.search.search_folder import (
    FACTS,
    TRIALS,
    print_flow,
    print_search,
    save_search,
    schedule_file,
    schedules_in,
)
from himap_train.search.space import Space
from himap_train.search.trials import Objective, Trials


def main(
    budget: float | None = None,
    budgets: list[float] | None = None,
    method: Method = "coordinate",
    trials: int = 60,
    stages: int = 2,
    criteria: list[str] | None = None,
    free_criteria: bool = False,
    output: Path = Path("runs/search"),
    overwrite: bool = False,
    seed: int = 0,
    **opened: Any,
) -> None:
    """Search the schedule with the lowest loss at each budget.

    Args:
        budget: Share of the dense prefill's FLOPs, text included, that a schedule may cost (`flops_ratio`).
        budgets: Several of them.
        method: coordinate (descents from many places), or flow (the information flow alone, one pass
            forward and backward).
        trials: Most schedules that are run at each budget.
        stages: Most removals of a schedule.
        criteria: One a stage, by depth; by default instruction at the first and image at the others.
        free_criteria: Choose any of the criteria at each stage.
        output: Folder for schedule-0.40.yaml and its like, trials.csv and search.json.
        overwrite: Replace results that are there.
        seed: Seed of the drawn samples, and for the criterion `random`.
        **opened: Options of `open_samples`.
    """
    if (budget is None) == (not budgets):
        raise ValueError(f"budget is {budget} and budgets is {budgets}; give --budget 0.4 or --budgets [0.25,0.4]")
    wanted = list(dict.fromkeys(budgets or [budget or 0.0]))
    clear = new_output_folder(output, (*map(schedule_file, wanted), *schedules_in(output), TRIALS, FACTS), overwrite)
    start = time.perf_counter()
    model, _, drawn = open_samples(seed=seed, each_turn=False, **opened)
    config = base_model(model).config
    searched: dict[str, Any] = {"stages": stages, "criteria": criteria, "free_criteria": free_criteria}
    ranked = frozenset(scorers_of(text_decoder(model)))
    image, text = drawn.tokens["image_tokens"], drawn.tokens["text_tokens"]
    spaces = [Space(config, one, image, text, **searched, ranked=ranked) for one in wanted]
    print(f"{drawn.count} samples, {drawn.image_tokens:.0f} image and {drawn.text_tokens:.0f} text tokens on average")
    flow, objective = mean_image_to_text(measure(model, drawn)), Objective(model, drawn, seed)
    print_flow(flow)
    dense = objective(PruningSchedule())
    found: list[Trials] = []
    for space in spaces:
        try:
            with progress_bar(f"budget {space.budget:g}", 1 if method == "flow" else trials) as advance:
                found.append(search_budget(space, objective, method, trials, flow, lambda trial: advance(1)))
        except KeyboardInterrupt:  # before the first trial of this budget
            if not found:
                raise
            stop(output)
        print_search(found[-1], dense)
        facts: dict[str, Any] = {
            **opened,
            "method": method,
            "seed": seed,
            **searched,
            "most_trials": trials,
            "objective": "mean next-token loss of the answers, teacher-forced",
            "dense_loss": dense,
            "seconds": time.perf_counter() - start,
            "forward_passes": objective.forward_passes + len(drawn.batches),
        }
        if len(found) == 1:
            clear()
        save_search(found, output, facts, drawn, flow)
        if found[-1].interrupted:
            stop(output)
    print(f"saved in {output}")


def stop(output: Path) -> NoReturn:
    """End as Ctrl-C does, once everything is written."""
    print(f"interrupted; what was tried is saved in {output}", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    sys.exit(run_command(main))
