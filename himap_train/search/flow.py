"""A first schedule from the information flow: what keeps the most of what image tokens give to text.

HiMAP (CVPR 2025, section 3) reads from the saliency in which layers the text takes from the image, and prunes behind
them. Here the saliency of each layer says what its image tokens are worth: a schedule keeps of it, layer by layer, the
share of the image tokens that it keeps there. That takes a choice of tokens that looks at nothing; a ranking that is
worth something keeps more. Under a budget the most is kept by one cut and, where the text has taken what it takes, the
exit of all that is left: the optimum of a linear programme with one constraint has no more levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from himap_train.analysis.saliency import SampleFlow
from himap_train.pruning.schedule import PruningSchedule
from himap_train.search.space import Point, Space

HANDED_OVER = 0.9
"""Share of a flow's total behind which it is called over."""


def mean_image_to_text(flows: Sequence[SampleFlow]) -> tuple[float, ...]:
    """Saliency of what image tokens give to text in each layer, mean over samples."""
    return tuple(torch.stack([flow.image_to_text.sum(1) for flow in flows]).mean(0).tolist())


def handed_over(flow: Sequence[float], share: float = HANDED_OVER) -> int:
    """The first layer, 1 or more, before which at least this share of a flow's total has gone over."""
    total = sum(flow)
    before = accumulate(flow)  # its entry l is what layers 0 to l have carried, so what stands before layer l + 1
    return next((layer for layer, done in enumerate(before, start=1) if done >= share * total), len(flow))


def kept_flow(flow: Sequence[float], space: Space, schedule: PruningSchedule) -> float:
    """Share of the flow's total that a schedule keeps if its choice of tokens looks at nothing."""
    counts = space.layer_counts(schedule)
    kept = sum(given * count for given, count in zip(flow, counts, strict=True))
    return kept / (space.tokens["image_tokens"] * sum(flow))


def suggest(flow: Sequence[float], space: Space) -> Point:
    """The point that keeps most of the flow at the budget: one cut, and an exit if there may be two stages."""
    layers, bare, total = space.num_layers, space.least(0), sum(flow)
    before = [0.0, *accumulate(flow)]
    found: list[tuple[float, int, int]] = []
    for first in range(space.earliest, space.deepest_first + 1):
        for last in range(first + 1, layers + 1) if space.stages > 1 else [layers]:  # `layers`: no exit
            # Layers before the cut cost 1, those behind the exit `bare`, and those between them what is left.
            ratio = (space.budget * layers - first - (layers - first) * bare) / ((last - first) * (1 - bare))
            if 0 <= ratio <= 1:
                kept = before[first] + ratio * (before[last] - before[first])
                found.append((-kept / total, first, last))
    points = [_point(space, first, last) for _, first, last in sorted(found)]
    return next((point for point in points if space.schedule(point) is not None), _point(space, space.earliest, layers))


def _point(space: Space, first: int, last: int) -> Point:
    """A cut and an exit, which is none behind the last layer; further stages take nothing away."""
    splits = [0.0 if last < space.num_layers else 1.0, *[1.0] * space.stages]
    exits = [min(last, space.num_layers - 1)] * (space.stages - 1)
    return space.point([first, *exits], splits[: space.stages - 1])


def reason(flow: Sequence[float], space: Space, schedule: PruningSchedule) -> str:
    """Why a schedule is suggested, in one line."""
    return (
        f"keeps {kept_flow(flow, space, schedule):.0%} of what image tokens give to text (saliency) if it chooses "
        f"blindly, the most at flops_ratio {space.budget:g}; {HANDED_OVER:.0%} has gone over before layer "
        f"{handed_over(flow)} of {len(flow)}"
    )
