"""How cost grows: the same measurement along one axis, the other shapes unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from himap_train.benchmark.sizes import TOKENS_PER_IMAGE, Size
from himap_train.benchmark.workload import Workload
from himap_train.pruning.names import nearest


@dataclass(frozen=True)
class Point:
    """One value of an axis, and the shapes that go with it; no axis for the shapes as they are given."""

    axis: str | None
    value: int
    size: Size
    workload: Workload


def _text(workload: Workload, value: int) -> Workload:
    # The share before the image stays small and fixed, as a system prompt does.
    return replace(workload, text_after=value - workload.text_before)


_AXES: dict[str, tuple[tuple[int, ...], Callable[[Size, Workload, int], tuple[Size, Workload]]]] = {
    "image_tokens": (
        (TOKENS_PER_IMAGE // 4, TOKENS_PER_IMAGE // 2, TOKENS_PER_IMAGE, 2 * TOKENS_PER_IMAGE, 5 * TOKENS_PER_IMAGE),
        lambda size, workload, value: (size, replace(workload, image_tokens=value)),
    ),
    "dynamic_resolution": (
        (TOKENS_PER_IMAGE, 2 * TOKENS_PER_IMAGE, 5 * TOKENS_PER_IMAGE),
        # Several samples, or there is nothing to mix.
        lambda size, workload, value: (
            size,
            replace(workload, image_tokens=value, mixed=True, batch=max(4, workload.batch)),
        ),
    ),
    "batch": ((1, 2, 4, 8), lambda size, workload, value: (size, replace(workload, batch=value))),
    "depth": ((6, 12, 24), lambda size, workload, value: (replace(size, layers=value), workload)),
    "text_tokens": ((64, 115, 256, 512), lambda size, workload, value: (size, _text(workload, value))),
}
AXES = tuple(_AXES)


def points(axis: str, size: Size, workload: Workload, values: list[int] | None = None) -> Iterator[Point]:
    """The points of an axis.

    Args:
        axis: One of `AXES`.
        size: The model.
        workload: The batch.
        values: Instead of the axis' own.

    Raises:
        ValueError: There is no such axis.
    """
    if axis not in _AXES:
        raise ValueError(f"series {axis!r} is unknown{nearest(axis, AXES)}")
    own, change = _AXES[axis]
    for value in values or own:
        changed_size, changed_workload = change(size, workload, value)
        yield Point(axis, value, changed_size, changed_workload)
