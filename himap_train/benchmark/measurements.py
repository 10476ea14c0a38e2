"""What will be measured, at one shape or along an axis, checked before the first of it starts; and measuring it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from himap_train.bar import progress_bar
from himap_train.benchmark.bench import Bench, Settings
from himap_train.benchmark.contenders import DENSE, MEASURES, find_method
from himap_train.benchmark.sizes import TOKENS_PER_IMAGE
from himap_train.benchmark.timing import free_memory
from himap_train.benchmark.workload import Workload
from himap_train.pruning.names import nearest


@dataclass(frozen=True)
class Point:
    """A model and a batch, and what to measure on them.

    Attributes:
        settings: The model.
        workload: The batch.
        rows: Measure and method of each row.
        axis: The series that it is a point of; "" for the table.
        value: Its value on that axis.
    """

    settings: Settings
    workload: Workload
    rows: list[tuple[str, str]]
    axis: str = ""
    value: int = 0


def _batches(change: Callable[[Workload, int], Workload]) -> Callable[..., tuple[Settings, Workload]]:
    """Of an axis along which the model stays as it is."""
    return lambda settings, workload, value: (settings, change(workload, value))


_AXES: dict[str, tuple[tuple[int, ...], Callable[[Settings, Workload, int], tuple[Settings, Workload]]]] = {
    "image_tokens": (
        (TOKENS_PER_IMAGE // 4, TOKENS_PER_IMAGE // 2, TOKENS_PER_IMAGE, 2 * TOKENS_PER_IMAGE, 5 * TOKENS_PER_IMAGE),
        _batches(lambda workload, value: replace(workload, image_tokens=value)),
    ),
    "dynamic_resolution": (
        (TOKENS_PER_IMAGE, 2 * TOKENS_PER_IMAGE, 5 * TOKENS_PER_IMAGE),
        # Several samples, or there is nothing to mix.
        _batches(lambda load, value: replace(load, image_tokens=value, mixed=True, batch=max(4, load.batch))),
    ),
    "batch": ((1, 2, 4, 8), _batches(lambda workload, value: replace(workload, batch=value))),
    "depth": (
        (6, 12, 24),
        lambda settings, workload, value: (replace(settings, size=replace(settings.size, layers=value)), workload),
    ),
    # The share before the image stays small and fixed, as a system prompt does.
    "text_tokens": (
        (64, 115, 256, 512),
        _batches(lambda workload, value: replace(workload, text_after=value - workload.text_before)),
    ),
}
AXES = tuple(_AXES)


def planned(
    settings: Settings,
    workload: Workload,
    methods: Sequence[str],
    measures: Sequence[str],
    axis: str = "",
    values: Sequence[int] | None = None,
) -> list[Point]:
    """Some methods at one shape, or at each value of one of `AXES` (its own, unless others are given), along which the
    other shapes do not change.

    Raises:
        ValueError: A name is unknown, or a value impossible.
    """
    if not axis:
        return [Point(settings, workload, _rows(settings, workload, methods, measures))]
    if axis not in _AXES:
        raise ValueError(f"series {axis!r} is unknown{nearest(axis, AXES)}")
    own, change = _AXES[axis]
    along = ((value, *change(settings, workload, value)) for value in values or own)
    return [Point(how, load, _rows(how, load, methods, measures), axis, value) for value, how, load in along]


def _rows(
    settings: Settings, workload: Workload, methods: Sequence[str], measures: Sequence[str]
) -> list[tuple[str, str]]:
    if settings.whole:
        workload.require_whole_images()
    for measure in measures:
        if measure not in MEASURES:
            raise ValueError(f"measure {measure!r} is unknown{nearest(measure, MEASURES)}")
    found = [find_method(name, settings.size.layers) for name in methods if name != DENSE]
    if peers := [method.name for method in found if method.peer and workload.mixed]:
        raise ValueError(f"{', '.join(peers)} cannot be run on samples of several lengths, as peers know no padding")
    # Training comes last: it attaches LoRA to the model for good.
    ordered = [measure for measure in (*MEASURES[1:], MEASURES[0]) if measure in measures]
    return [(measure, method.name) for measure in ordered for method in found if measure in method.measures]


def run_all(points: Sequence[Point]) -> tuple[list[tuple[Point, dict[str, Any]]], list[str]]:
    """Measure it all, with a bar on a terminal and a line for each row elsewhere.

    Returns:
        Rows, those of `Bench`, and what had no room in memory.
    """
    found, too_large = list[tuple[Point, dict[str, Any]]](), list[str]()
    shown = sys.stderr.isatty()
    with progress_bar("pairs", sum(len(point.rows) * point.settings.rounds for point in points), shown) as advance:
        for point in points:
            bench = Bench(point.settings, point.workload)
            for measure, method in point.rows:
                name = f"{point.axis} {point.value}, {measure}, {method}" if point.axis else f"{measure}, {method}"
                row: dict[str, Any] | None = None
                with suppress(torch.OutOfMemoryError):  # the other rows are worth having
                    row = bench.row(measure, method, each=partial(advance, 1))
                if row is None:
                    too_large.append(name)
                    free_memory()
                else:
                    found.append((point, row))
                if not shown:
                    told = f"{row['ratio'].median:.3f} of dense" if row else "out of memory"
                    print(f"{name}: {told}", file=sys.stderr, flush=True)
            del bench
            free_memory()
    return found, too_large
