"""Whether time and memory grow as the cost model says: one straight line through dense and pruned points together.

If one line fits both, a FLOP (or a token in a layer) costs the same with pruning and without, and the model's ratios
are what arrives. Time is fitted as `fixed + FLOPs / rate`, peak memory of training as `fixed + bytes * tokens`, tokens
summed over the layers that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from himap_train.benchmark.contenders import find_method
from himap_train.benchmark.measured_method import Row
from himap_train.pruning.cost import image_tokens_per_layer


@dataclass(frozen=True)
class Fit:
    """A line through the points of a series.

    Attributes:
        axis: The series.
        measure: What was measured.
        quantity: "time" or "memory".
        fixed: Seconds or bytes that do not grow.
        slope: FLOP/s, or bytes for each token in a layer.
        r2: Share of the variance that the line explains.
        worst: Largest relative deviation of a point from the line.
        dense_exponent: How dense grows with the axis: as `value ** exponent`.
        exponent: How the pruned method grows.
    """

    axis: str
    measure: str
    quantity: str
    fixed: float
    slope: float
    r2: float
    worst: float
    dense_exponent: float
    exponent: float

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def fit_growth(axis: str, values: Sequence[int], rows: Sequence[Row]) -> list[Fit]:
    """Fits of the rows of one measure along an axis, one row for each of `values`; none where FLOPs are not counted."""
    if len(rows) < 3 or any(row.flops is None for row in rows):
        return []
    flops = [[row.workload.batch * row.flops[which] for row in rows if row.flops] for which in (0, 1)]
    times = [[row.dense_seconds.median for row in rows], [row.seconds.median for row in rows]]
    fits = [_fit(axis, rows[0].measure, "time", values, flops, times)]
    peaks = [[float(row.dense_peak or 0) for row in rows], [float(row.peak or 0) for row in rows]]
    if rows[0].measure == "training_step" and all(peaks[1]):
        fits.append(_fit(axis, rows[0].measure, "memory", values, _token_layers(rows), peaks))
    return fits


def _token_layers(rows: Sequence[Row]) -> list[list[float]]:
    """Tokens of the batch, summed over layers, dense and pruned."""
    dense, pruned = [], []
    for row in rows:
        work = row.workload
        kept = image_tokens_per_layer(find_method(row.method, row.layers).schedule, row.layers, work.image_tokens)
        dense.append(float(work.tokens * row.layers))
        pruned.append(float(work.batch * sum(count + work.text_tokens for count in kept)))
    return [dense, pruned]


def _fit(
    axis: str, measure: str, quantity: str, values: Sequence[int], x: list[list[float]], y: list[list[float]]
) -> Fit:
    at, found = np.concatenate(x), np.concatenate(y)
    # Relative errors count: a small batch matters as much as a large one.
    (slope, fixed), *_ = np.linalg.lstsq(np.stack([at / found, 1 / found], axis=1), np.ones_like(found), rcond=None)
    line = fixed + slope * at
    return Fit(
        axis=axis,
        measure=measure,
        quantity=quantity,
        fixed=float(fixed),
        slope=float(1 / slope if quantity == "time" else slope),
        r2=float(1 - ((found - line) ** 2).sum() / ((found - found.mean()) ** 2).sum()),
        worst=float(np.abs(line / found - 1).max()),
        dense_exponent=_exponent(values, y[0]),
        exponent=_exponent(values, y[1]),
    )


def _exponent(values: Sequence[int], found: Sequence[float]) -> float:
    return float(np.polyfit(np.log(values), np.log(found), 1)[0])
