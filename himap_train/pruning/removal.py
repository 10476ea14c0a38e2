"""How many tokens each stage of a batch leaves.

How many stay is known before a forward pass runs, from the schedule and what the batch holds, except at a stage that
keeps a share of the attention or waits until the image has been read: there the scores say it, and shapes then wait for
one transfer of (B, G) numbers to the host, once for each such stage.

Shapes: B rows, L current columns, G groups (see `layout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from himap_train.pruning.keep import Mass
from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.places import Places, TokenGrid
from himap_train.pruning.ranks import tokens_for_mass
from himap_train.pruning.readings import TowerReadings
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage


@dataclass(frozen=True)
class Removal:
    """One stage of one batch: how many tokens there are before and after it.

    Of a stage that keeps by attention mass, or waits, `after` is the fewest that may be left, until `settle_mass` or
    `settle_waiting` knows better.
    """

    stage: PruningStage
    before: TokenCounts
    after: TokenCounts

    @property
    def removes(self) -> bool:
        """Whether any token leaves, or may leave."""
        return not torch.equal(self.before.current, self.after.current)


def with_facts(
    layout: TokenLayout,
    counts: TokenCounts,
    schedule: PruningSchedule,
    grids: Sequence[TokenGrid] | None,
    readings: Tensor | None,
) -> TokenLayout:
    """The layout of a batch with what the schedule's methods ask for beside it; see `Places.of`, `TowerReadings.of`."""
    if schedule.uses_places:
        layout = replace(layout, places=Places.of(layout.image, grids))
    if schedule.uses_tower:
        layout = replace(layout, tower=TowerReadings.of(layout.image, counts.image.sum(1), readings))
    return layout


def plan_removals(stages: tuple[PruningStage, ...], counts: TokenCounts) -> dict[int, Removal]:
    """All counts of a forward pass before it runs, by layer: they follow from the schedule and what the batch holds.

    Those of a stage that keeps by attention mass or waits, and of the stages behind it, are bounds, see `Removal`.
    """
    removals = {}
    for stage in stages:
        after = replace(counts, current=_bounded(stage.keep.least(counts.image), counts))
        removals[stage.layer] = Removal(stage, counts, after)
        counts = after
    return removals


def settle_mass(removals: dict[int, Removal], layer: int, scores: Tensor, layout: TokenLayout) -> dict[int, Removal]:
    """The plan once the scores of the stage at `layer` are there: its counts, and those of the stages behind it.

    Args:
        removals: The plan so far.
        layer: Layer of the stage. Where it does not keep by attention mass the plan is handed back as it is.
        scores: (B, L), as `image_ranks` takes them.
        layout: The current layout.
    """
    removal = removals[layer]
    stage, counts = removal.stage, removal.before
    if not isinstance(stage.keep, Mass):
        return removals
    held_by = tokens_for_mass(scores, layout, stage.keep.mass, groups=counts.image.shape[1])
    # The stage's one transfer. `after` so far is the fewest that may stay: protected tokens and `at_least` are in it.
    kept = torch.maximum(torch.minimum(held_by.cpu(), stage.keep.most(counts.image)), removal.after.current)
    return _settled(removals, layer, torch.minimum(kept, counts.current))


def settle_waiting(removals: dict[int, Removal], layer: int, looks: Tensor, layout: TokenLayout) -> dict[int, Removal]:
    """The plan once it is known which rows (and turns) the stage at `layer`, which waits, acts on.

    Args:
        removals: The plan so far.
        layer: Layer of the stage.
        looks: (B, L), what `instruction` scores there.
        layout: The current layout.
    """
    removal = removals[layer]
    assert removal.stage.attention_below is not None
    shares = []
    for number in range(removal.before.image.shape[1]):
        here = layout.group == number
        rows = (layout.ranking & here).sum(1).clamp(min=1)
        shares.append((looks * (layout.image & here)).sum(1) / rows)
    acts = (torch.stack(shares, dim=1) < removal.stage.attention_below).cpu()
    return _settled(removals, layer, torch.where(acts, removal.after.current, removal.before.current))


def _settled(removals: dict[int, Removal], layer: int, current: Tensor) -> dict[int, Removal]:
    """The plan with `current` (B, G) tokens behind the stage at `layer`."""
    stage, before = removals[layer].stage, removals[layer].before
    after = replace(before, current=current)
    behind = tuple(later.stage for number, later in removals.items() if number > layer)
    return {**removals, layer: Removal(stage, before, after), **plan_removals(behind, after)}


def _bounded(kept: Tensor, counts: TokenCounts) -> Tensor:
    """Never fewer than must stay nor more than are left: (B, G) long on the host."""
    return torch.minimum(torch.maximum(kept, counts.protected), counts.current)
