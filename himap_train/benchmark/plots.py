"""Two pictures: time ratio of every method beside its bound, and growth along each axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from himap_train.benchmark.measured_method import Row

DENSE_COLOUR, COLOUR, BOUND_COLOUR = "#4c566a", "#2a9d8f", "#d08770"


def draw_table(rows: Sequence[Row]) -> Figure:
    """Bars of the time ratio with quartiles, a mark where the bound is, one panel a measure."""
    measures = list(dict.fromkeys(row.measure for row in rows))
    longest = max(sum(row.measure == measure for row in rows) for measure in measures)
    figure = _figure(4.6 * len(measures), 1.6 + 0.34 * longest)
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        _bars(axes, [row for row in rows if row.measure == measure])
        axes.set_title(measure.replace("_", " "))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    places = list(range(len(rows), 0, -1))
    ratios = [row.ratio for row in rows]
    errors = [[one.median - one.low for one in ratios], [one.high - one.median for one in ratios]]
    widths = [one.median for one in ratios]
    axes.barh(places, widths, 0.7, xerr=errors, color=COLOUR, ecolor="#999999", label="time, method / dense")
    bounded = [(place, row.bound) for place, row in zip(places, rows, strict=True) if row.bound is not None]
    if bounded:
        heights, bounds = zip(*bounded, strict=True)
        axes.plot(bounds, heights, "|", color=BOUND_COLOUR, markersize=16, markeredgewidth=2.5, label="bound")
    axes.axvline(1, color=DENSE_COLOUR, linewidth=1, linestyle="--", label="dense")
    axes.set_yticks(places, [row.method for row in rows])
    axes.set_xlim(0, max(1.1, 1.05 * max(one.high for one in ratios)))
    axes.spines[["top", "right"]].set_visible(False)


def draw_series(series: Mapping[str, Sequence[tuple[int, Row]]]) -> Figure:
    """A line of panels an axis: times of dense and pruned, efficiency, peak memory; one line a measure."""
    figure = _figure(13.5, 3.4 * len(series))
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
    efficiency.axhline(0.98, color=DENSE_COLOUR, linewidth=1, linestyle=":")
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


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure


def _mib(value: int | None) -> float:
    return math.nan if value is None else value / 2**20
