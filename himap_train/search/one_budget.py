"""One budget searched: where the search starts, what it is compared with, and the search itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from himap_train.pruning.reading import fit_preset
from himap_train.pruning.schedule import PruningSchedule
from himap_train.search.flow import suggest
from himap_train.search.proposals import Method, search
from himap_train.search.space import Point, Space
from himap_train.search.trials import Found, Trial, Trials

BASELINE = "himap"
"""The preset that a search is compared with."""


def budgets_of(budget: float | None, budgets: list[float] | None) -> list[float]:
    """The budgets that are asked for.

    Raises:
        ValueError: None, or in both ways.
    """
    if (budget is None) == (not budgets):
        raise ValueError(f"budget is {budget} and budgets is {budgets}; give --budget 0.4 or --budgets [0.25,0.4]")
    return list(dict.fromkeys(budgets or [float(budget or 0.0)]))


def search_budget(
    space: Space,
    objective: Callable[[PruningSchedule], float],
    method: Method,
    limit: int,
    flow: Sequence[float],
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Found:
    """The best schedules of a space.

    Args:
        space: With the budget.
        objective: Schedule to loss.
        method: How candidates are chosen.
        limit: Most schedules that are run.
        flow: From `mean_image_to_text`; its suggestion is the first candidate.
        on_trial: Called after each trial.

    Raises:
        ValueError: No candidate meets the budget, or `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"{limit} trials: give at least 1")
    preset = preset_at_budget(space)
    trials = Trials(space, objective, limit, on_trial)
    baseline = None if preset is None else (preset, objective(preset))
    search(method, trials, starting_points(space, flow, with_preset=method != "flow"))
    return Found(trials, baseline)


def preset_at_budget(space: Space) -> PruningSchedule | None:
    """The preset at its relative depths with ratios for the budget; None where it cannot meet that."""
    try:
        preset = fit_preset(PruningSchedule.from_preset(BASELINE), space.num_layers)
        return preset.at_budget(space.config, space.budget, **space.tokens)
    except ValueError:
        return None


def starting_points(space: Space, flow: Sequence[float], with_preset: bool) -> list[Point]:
    """The flow's suggestion and, where it has as many stages as the space, the preset's layers."""
    points = [suggest(flow, space)]
    preset = preset_at_budget(space) if with_preset else None
    if preset is not None and len(preset.stages) == space.stages:
        ratios = [stage.keep_ratio or 0.0 for stage in preset.stages]
        splits = [after / before if before else 0.0 for before, after in itertools.pairwise(ratios)]
        points.append(space.point([stage.layer for stage in preset.stages], splits))
    return points
