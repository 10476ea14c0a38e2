"""How the next candidate is chosen: from the information flow alone, by coordinate search, or by optuna's TPE.

All methods first try the same starting points (a published preset at the budget, the flow's suggestion) and differ in
what they do with the rest of their allowance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, get_args

from himap_train.pruning.names import nearest
from himap_train.search.space import Point, Space
from himap_train.search.trials import Trials

Method = Literal["tpe", "coordinate", "flow"]
FINEST_SPLIT = 1 / 64
"""Where the coordinate search stops."""
_PROPOSALS_PER_TRIAL = 10
"""Schedules are proposed again that have been run, which costs nothing; but not for ever."""
_SPLIT_GRID = 1 / 16
"""Grid of TPE, whose draws would never hit the ends of an interval."""
_OPTUNA_MISSING = (
    'method "tpe" needs optuna, which is not installed: pip install "himap-train[search]" (or: pip install '
    '"optuna>=4"), or use --method coordinate, which needs nothing'
)


def check_method(method: str) -> None:
    """Refuse a method that cannot run here, before anything is loaded.

    Raises:
        ValueError: There is no such method.
        ValueError: It needs optuna, which is not installed.
    """
    if method not in get_args(Method):
        raise ValueError(f"method {method!r} is unknown{nearest(method, get_args(Method))}")
    if method == "tpe":
        _optuna()


def search(method: Method, trials: Trials, starts: Sequence[Point], seed: int = 0) -> None:
    """Fill `trials`. A pressed Ctrl-C ends the search and sets `trials.interrupted`.

    Args:
        method: "flow" tries the starting points alone.
        trials: With the space, the objective and the allowance.
        starts: Tried first; those that miss the budget are passed over.
        seed: Seed of TPE.

    Raises:
        ModuleNotFoundError: optuna is not installed.
        ValueError: No candidate meets the budget.
    """
    with trials.until_interrupted():
        for point in starts:
            trials.try_point(point, "start")
        if method == "tpe":
            _tpe(trials, starts, seed)
        elif method == "coordinate":
            _coordinate(trials, starts)
        if not trials.done:
            raise ValueError(
                f"no candidate's flops_ratio is within 1 % of the budget {trials.space.budget}: the sample has only "
                f"{trials.space.tokens['image_tokens']} image tokens, which go one by one. Give a higher budget, or "
                "more stages"
            )


def _coordinate(trials: Trials, starts: Sequence[Point]) -> None:
    """Descents from the best of the starts and of points spread over the space, then from further ones."""
    spread = islice(_spread(trials.space), _PROPOSALS_PER_TRIAL * trials.limit)
    losses = {point: loss for point in starts if (loss := trials.try_point(point, "start")) is not None}
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
        layers = [1 + int(at[0] * space.deepest_first)]
        layers += [1 + int(place * (space.num_layers - 1)) for place in at[1 : space.stages]]
        splits, choices = at[space.stages : 2 * space.stages - 1], at[2 * space.stages - 1 :]
        criteria = [space.criteria[int(place * len(space.criteria))] for place in choices]
        yield space.point(sorted(layers), splits, criteria if space.free_criteria else None)


def _moves(point: Point, space: Space, layer_step: int, split_step: float) -> Iterator[Point]:
    """Every coordinate one step up and down, and every other criterion where these are free."""
    for number, layer in enumerate(point.layers):
        for moved in (layer - layer_step, layer + layer_step):
            if 1 <= moved < space.num_layers:
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


def _tpe(trials: Trials, starts: Sequence[Point], seed: int) -> None:
    """Bergstra et al. 2011, on layers, splits and criteria together."""
    optuna, space = _optuna(), trials.space
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    startup = max(2, min(10, trials.limit // 4))
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=startup)
    study = optuna.create_study(sampler=sampler)
    for point in starts:
        if space.schedule(point) is not None:
            study.enqueue_trial(_parameters(point, space))
    for _ in range(_PROPOSALS_PER_TRIAL * trials.limit):
        if trials.full:
            return
        asked = study.ask()
        loss = trials.try_point(_suggested(asked, space), "tpe")
        if loss is None:
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(asked, loss)


def _suggested(asked: Any, space: Space) -> Point:
    """The first layer within the budget, the others anywhere: `Space` sorts them and joins equal ones."""
    layers = [
        asked.suggest_int(f"layer_{number}", 1, space.num_layers - 1 if number else space.deepest_first)
        for number in range(space.stages)
    ]
    splits = [asked.suggest_float(f"split_{number}", 0.0, 1.0, step=_SPLIT_GRID) for number in range(1, space.stages)]
    criteria = None
    if space.free_criteria:
        criteria = [asked.suggest_categorical(f"criterion_{n}", space.criteria) for n in range(space.stages)]
    return space.point(layers, splits, criteria)


def _parameters(point: Point, space: Space) -> dict[str, Any]:
    """The inverse of `_suggested`."""
    named: dict[str, Any] = {f"layer_{number}": layer for number, layer in enumerate(sorted(point.layers))}
    on_grid = [round(split / _SPLIT_GRID) * _SPLIT_GRID for split in point.splits]
    named |= {f"split_{number}": split for number, split in enumerate(on_grid, start=1)}
    if space.free_criteria:
        named |= {f"criterion_{number}": criterion for number, criterion in enumerate(point.criteria)}
    return named


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ValueError(_OPTUNA_MISSING) from error
    return optuna
