"""A picture of growth along each axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from himap_train.benchmark.measured_method import Row


def draw_series(series: Mapping[str, Sequence[tuple[int, Row]]]) -> Figure:
    """A line of panels an axis: times of dense and pruned, efficiency, peak memory; one line a measure."""
    figure = Figure(figsize=(13.5, 3.4 * len(series)), layout="constrained")
    panels = figure.subplots(len(series), 3, squeeze=False)
    for (axis, found), line in zip(series.items(), panels, strict=True):
        _series(axis, found, line)
    return figure


def _series(axis: str, found: Sequence[tuple[int, Row]], panels: Sequence[Axes]) -> None:
    times, efficiency, memory = panels
    for number, key in enumerate(dict.fromkeys((row.measure, row.method) for _, row in found)):
        some = [(value, row) for value, row in found if (row.measure, row.method) == key]
        values, rows = [value for value, _ in some], [row for _, row in some]
        colour, name = f"C{number}", f"{key[0].replace('_', ' ')}, {key[1]}"
        times.plot(values, [row.seconds.median for row in rows], "o-", color=colour, label=name)
        times.plot(values, [row.dense_seconds.median for row in rows], "o--", color=colour, alpha=0.6)
        memory.plot(values, [_mib(row.peak) for row in rows], "o-", color=colour)
        memory.plot(values, [_mib(row.dense_peak) for row in rows], "o--", color=colour, alpha=0.6)
        if rows[0].bound is not None:
            bounds = [row.bound or 0.0 for row in rows]
            low, middle, high = (
                [bound / getattr(row.ratio, which) for bound, row in zip(bounds, rows, strict=True)]
                for which in ("high", "median", "low")
            )
            efficiency.plot(values, middle, "o-", color=colour)
            efficiency.fill_between(values, low, high, color=colour, alpha=0.2)
    efficiency.axhline(0.98, color="#4c566a", linewidth=1, linestyle=":")
    for axes, title in ((times, "seconds"), (efficiency, "efficiency"), (memory, "peak memory, MiB")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({value for value, _ in found}), [str(value) for value in sorted({v for v, _ in found})])
        axes.minorticks_off()
        axes.set_xlabel(axis.replace("_", " "))
        axes.set_title(title)
        axes.grid(alpha=0.3)
    for axes in (times, memory):
        axes.set_yscale("log")
    times.legend(frameon=False, fontsize=8, title="solid: method, dashed: dense", title_fontsize=8)


def _mib(value: int | None) -> float:
    return math.nan if value is None else value / 2**20
