"""Everything that will be measured, checked by name and shape before the first of it starts, and then measured."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from himap_train.bar import progress_bar
from himap_train.benchmark.bench import Bench, Settings
from himap_train.benchmark.contenders import DENSE, MEASURES, find_method
from himap_train.benchmark.measured_method import Row
from himap_train.benchmark.series import Point
from himap_train.benchmark.workload import Workload
from himap_train.pruning.names import nearest


@dataclass(frozen=True)
class Job:
    """A model and a batch, and what to measure on them.

    Attributes:
        axis: The series that it is a point of; None for the table.
        value: Its value on that axis.
        settings: The model.
        workload: The batch.
        rows: Measure and method of each row.
    """

    axis: str | None
    value: int
    settings: Settings
    workload: Workload
    rows: list[tuple[str, str]]


def planned(points: Iterable[Point], settings: Settings, methods: Sequence[str], measures: Sequence[str]) -> list[Job]:
    """Some methods at each point, for which the size of `settings` is replaced.

    Raises:
        ValueError: A name is unknown, or a value impossible.
    """
    return [
        Job(point.axis, point.value, changed, point.workload, _rows(changed, point.workload, methods, measures))
        for point in points
        for changed in [replace(settings, size=point.size)]
    ]


def _rows(
    settings: Settings, workload: Workload, methods: Sequence[str], measures: Sequence[str]
) -> list[tuple[str, str]]:
    for measure in measures:
        if measure not in MEASURES:
            raise ValueError(f"measure {measure!r} is unknown{nearest(measure, MEASURES)}")
    found = [find_method(name, settings.size.layers) for name in methods if name != DENSE]
    if peers := [method.name for method in found if method.peer and workload.mixed]:
        raise ValueError(f"{', '.join(peers)} cannot be run on samples of several lengths, as peers know no padding")
    # Training comes last: it attaches LoRA to the model for good.
    ordered = [measure for measure in (*MEASURES[1:], MEASURES[0]) if measure in measures]
    return [(measure, method.name) for measure in ordered for method in found if measure in method.measures]


def run_jobs(jobs: Sequence[Job]) -> tuple[list[Row], dict[str, list[tuple[int, Row]]]]:
    """Measure it all, with a bar on a terminal and a line for each row elsewhere.

    Returns:
        The rows of the table, and for each axis its rows with their values.
    """
    rows: list[Row] = []
    series: dict[str, list[tuple[int, Row]]] = {}
    shown = sys.stderr.isatty()
    with progress_bar("pairs", sum(len(job.rows) * job.settings.rounds for job in jobs), shown) as advance:
        for job in jobs:
            bench = Bench(job.settings, job.workload)
            for measure, method in job.rows:
                row = bench.row(measure, method, each=partial(advance, 1))
                if job.axis is None:
                    rows.append(row)
                else:
                    series.setdefault(job.axis, []).append((job.value, row))
                if not shown:
                    place = f"{job.axis} {job.value}, " if job.axis else ""
                    print(f"{place}{measure}, {method}: {row.ratio.median:.3f} of dense", file=sys.stderr, flush=True)
    return rows, series
