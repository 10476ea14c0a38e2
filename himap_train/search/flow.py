"""A first schedule from the information flow: what keeps the most of what image tokens give to text.

HiMAP (CVPR 2025, section 3) reads from the saliency in which layers the text takes from the image, and prunes behind
them. Here the saliency of each layer says what its image tokens are worth, and a share r of them is taken to give the
square root of r of it: what they say overlaps, and a ranking finds those that say more (on the embedded model a tenth
of the tokens gives a quarter to half of a layer's saliency). Of the schedules with one cut, or a cut and a second one
that leaves nothing or a quarter, that one is suggested which keeps the most at the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from himap_train.analysis.saliency import SampleFlow
from himap_train.pruning.schedule import PruningSchedule
from himap_train.search.space import Point, Space

HANDED_OVER = 0.9
"""Share of a flow's total behind which it is called over."""
SPLITS = (0.0, 0.25, 1.0)
"""What a second cut may leave of what the first one left."""


def mean_image_to_text(flows: Sequence[SampleFlow]) -> tuple[float, ...]:
    """Saliency of what image tokens give to text in each layer, mean over samples."""
    return tuple(torch.stack([flow.image_to_text.sum(1) for flow in flows]).mean(0).tolist())


def handed_over(flow: Sequence[float], share: float = HANDED_OVER) -> int:
    """The first layer, 1 or more, before which at least this share of a flow's total has gone over."""
    total = sum(flow)
    before = accumulate(flow)  # its entry l is what layers 0 to l have carried, so what stands before layer l + 1
    return next((layer for layer, done in enumerate(before, start=1) if done >= share * total), len(flow))


def kept_flow(flow: Sequence[float], space: Space, schedule: PruningSchedule) -> float:
    """Share of the flow's total that a schedule keeps if a share r of the tokens gives the square root of r."""
    whole = space.tokens["image_tokens"]
    shares = (math.sqrt(count / whole) for count in space.layer_counts(schedule))
    return sum(given * share for given, share in zip(flow, shares, strict=True)) / sum(flow)


def suggest(flow: Sequence[float], space: Space) -> Point:
    """The point that keeps most of the flow at the budget; stages beyond the second take nothing away."""
    layers, bare, before = space.num_layers, space.least(0), [0.0, *accumulate(flow)]
    found: list[tuple[float, Point]] = []
    for first in range(space.earliest, space.deepest_first + 1):
        for last in range(first + 1, layers) if space.stages > 1 else [layers]:
            for split in SPLITS if space.stages > 1 else [1.0]:
                # A layer costs 1 before the cuts, and behind them `bare` and what its share of the image costs.
                spent = (space.budget * layers - first - (layers - first) * bare) / (1 - bare)
                share = spent / (last - first + split * (layers - last))
                if 0 <= share <= 1:
                    kept = [before[first], before[last] - before[first], before[layers] - before[last]]
                    roots = 1.0, math.sqrt(share), math.sqrt(split * share)
                    point = space.point(
                        [first, *[last] * (space.stages - 1)], [split, *[1.0] * space.stages][: space.stages - 1]
                    )
                    found.append((sum(part * root for part, root in zip(kept, roots, strict=True)), point))
    found.sort(key=lambda pair: -pair[0])
    nothing = space.point([space.earliest] * space.stages, [1.0] * (space.stages - 1))
    return next((point for _, point in found if space.schedule(point) is not None), nothing)


def reason(flow: Sequence[float], space: Space, schedule: PruningSchedule) -> str:
    """Why a schedule is suggested, in one line."""
    return (
        f"keeps {kept_flow(flow, space, schedule):.0%} of what image tokens give to text (saliency, a share r of them "
        f"taken to give its root), the most at flops_ratio {space.budget:g}; {HANDED_OVER:.0%} has gone over before "
        f"layer {handed_over(flow)} of {len(flow)}"
    )
