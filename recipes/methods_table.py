"""Every method at equal cost, where any even choice sees all (coarse scenes) and where it misses most (fine scenes).

python recipes/methods_table.py --split validation      # training-free, "embedded-fine": an hour on one core

Each method chooses once. Where it reads attention, its layer is the best of 1 to 4 on validation scenes at that budget,
on whichever split the table is; measured.json has all that was tried. The marks: what looks at nothing (even, at random
over seeds, the first), and an oracle that keeps what the question is about, which fine scenes name.
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from himap_train.analysis.oracle import oracle_accuracy
from himap_train.benchmark.ablation_rows import as_of, runs_of
from himap_train.command_line import run_command
from himap_train.data.sources import open_source
from himap_train.embedded.scene_text import FINE_GRID
from himap_train.evaluation.accuracy_against_cost import Scores, point, save_trade_off
from himap_train.evaluation.budgeted import prompt_tokens
from himap_train.evaluation.compare import compare
from himap_train.models.loading import load_llava
from himap_train.pruning.methods import METHODS
from himap_train.pruning.methods.base import Reads
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

PAIRS = ((1, 3), (2, 4), (2, 5))  # layers that HiMAP's two stages may have
DRAWN = ("himap", "uniform", "random", "first-k", "divprune", "instruction", "oracle")

UNTRAINED = ["himap", *(name for name, method in METHODS.items() if not method.learns)]


def main(
    kinds: list[str] = ["", "fine-"],  # noqa: B006
    split: str = "test",
    model: str = "embedded-fine",
    methods: list[str] = UNTRAINED,  # noqa: B006
    budgets: list[float] = [0.1, 0.2, 0.3, 0.4, 0.6],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    scenes: int = 600,
    output: Path = Path("runs/methods"),
) -> None:
    """Measure what is missing, then print and save a table and its picture for each kind of scenes.

    Args:
        kinds: "" for the coarse scenes, "fine-".
        split: "test", or "validation" to choose by.
        model: "embedded", "embedded-fine", or a merged folder.
        methods: Names of methods, and "himap" for its two stages.
        budgets: `flops_ratio` of the prefill.
        seeds: Draws of what is chosen at random.
        scenes: Questions of the table; half as many choose a layer.
        output: Folder.
    """
    llava, processor = load_llava(model, attn_implementation="eager")
    if "fine-" in kinds and llava.config.image_seq_length != FINE_GRID**2:
        raise ValueError(f"fine scenes need {FINE_GRID**2} image tokens, not those of {model}: --kinds '[\"\"]'")
    for kind in kinds:
        folder = output / f"{kind}{split}"
        folder.mkdir(parents=True, exist_ok=True)
        asked = open_source(f"embedded:{kind}{split}?scenes={scenes}&seed=11")
        chosen_on = open_source(f"embedded:{kind}validation?scenes={scenes // 2}&seed=5")
        run = partial(measured, folder / "measured.json", f"{model}{as_of(model, '*.safetensors')}, {scenes} scenes")
        tokens = prompt_tokens(asked, processor)
        scores: Scores = {}
        with torch.autocast("cpu", torch.bfloat16):
            dense = run("dense", partial(answer, llava, processor, asked, PruningSchedule()))
            for name in methods:
                scores[name] = {}
                for budget in budgets:
                    forms = candidates(name, llava.config, budget, tokens)
                    if not forms:
                        continue
                    tried = [
                        run(f"choosing {key(form)}", partial(answer, llava, processor, chosen_on, form))[1]
                        for form in (forms if len(forms) > 1 else ())
                    ]
                    best = forms[tried.index(max(tried)) if tried else 0]
                    scores[name][budget] = [
                        run(f"{key(form)}, {seed}", partial(answer, llava, processor, asked, form, seed))
                        for form, seed in runs_of([best], seeds)
                    ]
            if kind == "fine-":
                form = PruningSchedule((PruningStage(0, "uniform", 0.5),))
                even = {budget: at(budget, form, llava.config, tokens) for budget in budgets}
                scores["oracle"] = {
                    budget: [run(f"oracle {budget}", partial(foresee, llava, processor, asked, schedule, budget))]
                    for budget, schedule in even.items()
                    if schedule
                }
        drawn = [name for name in scores if name in DRAWN]
        print(f"{kind}{split}\n{save_trade_off(folder, scores, {'dense': [dense[1]]}, drawn)}", flush=True)


def candidates(name: str, config: Any, budget: float, tokens: tuple[int, int]) -> list[PruningSchedule]:
    """The forms of a method that meet the budget: before the decoder where it can act there, else behind a layer."""
    forms: list[tuple[tuple[int, str, float], ...]]
    if name == "himap":
        forms = [((k1, "instruction", 0.5), (k2, "image", 0.125)) for k1, k2 in PAIRS]
    elif METHODS[name].reads in (Reads.ATTENTION, Reads.KEYS):
        forms = [((layer, name, 0.5),) for layer in (1, 2, 3, 4)]
    else:
        forms = [((0, name, 0.5),)]
    schedules = [PruningSchedule(tuple(PruningStage(*stage) for stage in form)) for form in forms]
    return [schedule for form in schedules if (schedule := at(budget, form, config, tokens))]


def key(form: PruningSchedule) -> str:
    """A schedule in a line."""
    return "; ".join(f"{stage.criterion} at {stage.layer}, {stage.keep}" for stage in form.stages)


def at(budget: float, form: PruningSchedule, config: Any, tokens: tuple[int, int]) -> PruningSchedule | None:
    """The form at a budget of a prompt of so many image and other tokens; None where its layers cost more than that."""
    try:
        return form.at_budget(config, budget, *tokens)
    except ValueError:
        return None


def answer(llava: Any, processor: Any, source: Any, form: PruningSchedule, seed: int = 0) -> tuple[float, float]:
    """Measured `flops_ratio` and accuracy in %."""
    torch.manual_seed(seed)
    return point(compare(llava, processor, source, {"": form}, progress=False)[0].to_dict())


def foresee(llava: Any, processor: Any, source: Any, even: PruningSchedule, budget: float) -> tuple[float, float]:
    """The oracle with as many tokens as an even choice has at the budget."""
    ratio = even.stages[0].keep_ratio
    assert ratio is not None
    return budget, 100 * oracle_accuracy(llava, processor, source, ratio)


def measured(file: Path, asked: str, key: str, measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """What `file` has under what is asked and `key`, measured and added where it is not there."""
    found, key = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}, f"{asked}: {key}"
    if key not in found:
        found[key] = measure()
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return tuple(found[key])


if __name__ == "__main__":
    sys.exit(run_command(main))
