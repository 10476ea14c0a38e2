"""One budget searched: where the search starts, what it is compared with, and how the next candidate is chosen.

That is from the information flow alone, or by coordinate search; both first try the flow's suggestion.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

from himap_train.pruning.reading import fit_preset
from himap_train.pruning.schedule import PruningSchedule
from himap_train.search.flow import suggest
from himap_train.search.space import Point, Space
from himap_train.search.trials import Trial, Trials

Method = Literal["coordinate", "flow"]
FINEST_SPLIT = 1 / 64
"""Where the coordinate search stops."""
_PROPOSALS_PER_TRIAL = 10
"""Schedules are proposed again that have been run, which costs nothing; but not for ever."""


def search_budget(
    space: Space,
    objective: Callable[[PruningSchedule], float],
    method: Method,
    limit: int,
    flow: Sequence[float],
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Trials:
    """Search a space from the suggestion of the flow (see `mean_image_to_text`) and, by coordinates, from the layers of
    preset himap too. At most `limit` schedules are run; `on_trial` is called after each.

    Raises:
        ValueError: No candidate meets the budget, or `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"{limit} trials: give at least 1")
    preset = preset_at_budget(space)
    baseline = None if preset is None else (preset, objective(preset))
    trials = Trials(space, objective, limit, on_trial, baseline)
    search(method, trials, starting_points(space, flow, preset if method == "coordinate" else None))
    return trials


def preset_at_budget(space: Space) -> PruningSchedule | None:
    """Preset himap at its relative depths with ratios for the budget; None where it cannot meet that."""
    try:
        with warnings.catch_warnings(action="ignore"):  # that a search should choose: this one does
            preset = fit_preset(PruningSchedule.from_preset("himap"), space.num_layers)
        return preset.at_budget(space.config, space.budget, **space.tokens)
    except ValueError:
        return None


def starting_points(space: Space, flow: Sequence[float], preset: PruningSchedule | None) -> list[Point]:
    """The flow's suggestion and the layers of a preset that has as many stages as the space."""
    points = [suggest(flow, space)]
    if preset is not None and len(preset.stages) == space.stages:
        ratios = [stage.keep_ratio or 0.0 for stage in preset.stages]
        splits = [after / before if before else 0.0 for before, after in itertools.pairwise(ratios)]
        points.append(space.point([stage.layer for stage in preset.stages], splits))
    return points


def search(method: Method, trials: Trials, starts: Sequence[Point]) -> None:
    """Fill `trials`. A pressed Ctrl-C behind the first trial ends the search and sets `trials.interrupted`.

    Args:
        method: "flow" tries the starting points alone.
        trials: With the space, the objective and the allowance.
        starts: Tried first; those that miss the budget are passed over.

    Raises:
        ValueError: No candidate meets the budget.
    """
    try:
        losses = {point: loss for point in starts if (loss := trials.try_point(point, "start")) is not None}
        if method == "coordinate":
            _coordinate(trials, losses)
    except KeyboardInterrupt:
        if not trials.done:
            raise
        trials.interrupted = True
    if not trials.done:
        raise ValueError(
            f"no candidate's flops_ratio is within 1 % of the budget {trials.space.budget}: the sample has only "
            f"{trials.space.tokens['image_tokens']} image tokens, which go one by one. Give a higher budget, or "
            "more stages"
        )


def _coordinate(trials: Trials, losses: dict[Point, float]) -> None:
    """Descents from the best of some points with their losses and of others spread over the space, then from more."""
    spread = islice(_spread(trials.space), _PROPOSALS_PER_TRIAL * trials.limit)
    for point in islice(spread, max(trials.limit // 8, 2)):
        if (loss := trials.try_point(point, "spread")) is not None:
            losses[point] = loss
    for point in sorted(losses, key=lambda start: losses[start]):
        _descend(trials, point, losses[point])
    for point in spread:
        if trials.full:
            return
        if (loss := trials.try_point(point, "spread")) is not None:
            _descend(trials, point, loss)


def _descend(trials: Trials, point: Point, best: float) -> None:
    """The best of all moves of one coordinate; where none helps, moves half as far; then the end."""
    space = trials.space
    layer_step, split_step = max(1, space.num_layers // 4), 0.25
    while not trials.full:
        tried = {move: trials.try_point(move, "coordinate") for move in _moves(point, space, layer_step, split_step)}
        better = {move: loss for move, loss in tried.items() if loss is not None and loss < best}
        if better:
            point = min(better, key=lambda move: better[move])
            best = better[point]
        elif layer_step == 1 and (space.stages == 1 or split_step <= FINEST_SPLIT):
            return
        else:
            layer_step, split_step = max(1, layer_step // 2), split_step / 2


def _spread(space: Space) -> Iterator[Point]:
    """Points that fill the space evenly, always the same: multiples of irrational numbers modulo 1 (Roberts 2018)."""
    size = 3 * space.stages - 1
    root = 2.0
    for _ in range(32):  # the positive root of x ** (size + 1) = x + 1
        root = (1 + root) ** (1 / (size + 1))
    for count in itertools.count(1):
        at = [(0.5 + count * root**-power) % 1 for power in range(1, size + 1)]
        first, places = space.earliest, space.num_layers - space.earliest
        layers = [first + int(at[0] * (space.deepest_first + 1 - first))]
        layers += [first + int(place * places) for place in at[1 : space.stages]]
        splits, choices = at[space.stages : 2 * space.stages - 1], at[2 * space.stages - 1 :]
        criteria = [space.criteria[int(place * len(space.criteria))] for place in choices]
        yield space.point(sorted(layers), splits, criteria if space.free_criteria else None)


def _moves(point: Point, space: Space, layer_step: int, split_step: float) -> Iterator[Point]:
    """Every coordinate one step up and down, and every other criterion where these are free."""
    for number, layer in enumerate(point.layers):
        for moved in (layer - layer_step, layer + layer_step):
            if space.earliest <= moved < space.num_layers:
                yield replace(point, layers=tuple(sorted(_with(point.layers, number, moved))))
    for number, split in enumerate(point.splits):
        for wanted in (split - split_step, split + split_step):
            value = min(max(wanted, 0.0), 1.0)
            if value != split:
                yield replace(point, splits=_with(point.splits, number, value))
    if space.free_criteria:
        for number, criterion in enumerate(point.criteria):
            for other in space.criteria:
                if other != criterion:
                    yield replace(point, criteria=_with(point.criteria, number, other))


def _with(values: tuple[Any, ...], number: int, value: Any) -> tuple[Any, ...]:
    return (*values[:number], value, *values[number + 1 :])
