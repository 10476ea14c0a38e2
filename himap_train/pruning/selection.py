"""Which tokens stay, and moving everything that belongs to a token with one index.

How many stay is known before a forward pass runs, from the schedule and what the batch holds, except at a stage that
keeps a share of the attention: there the scores say it, and shapes then wait for one transfer of (B, G) numbers to the
host, once for each such stage.

Shapes: B rows, L current columns, L' columns after the removal, G groups (see `layout`), S columns as passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.schedule import PruningSchedule, PruningStage


def keep_counts(stage: PruningStage, counts: TokenCounts) -> Tensor:
    """How many image tokens stay: (B, G) long on the host.

    Rounds half up, keeps at least one token unless the ratio is 0, and never fewer than must stay nor more than are
    left. Of a stage that keeps by attention mass: the fewest that it may keep.
    """
    if stage.keep_count is not None:
        kept = torch.full_like(counts.image, stage.keep_count)
    elif stage.keep is not None:
        kept = keep_from_ratio(stage.keep.at_least, counts.image).clamp(min=1)
    else:
        kept = keep_from_ratio(float(stage.keep_ratio or 0.0), counts.image)
    return torch.minimum(torch.maximum(kept, counts.protected), counts.current)


@dataclass(frozen=True)
class Removal:
    """One stage of one batch: how many tokens there are before and after it.

    Of a stage that keeps by attention mass `after` is the fewest that may be left, until `settle_mass` knows better.
    """

    stage: PruningStage
    before: TokenCounts
    after: TokenCounts

    @property
    def removes(self) -> bool:
        """Whether any token leaves, or may leave."""
        return not torch.equal(self.before.current, self.after.current)


def plan_removals(schedule: PruningSchedule, counts: TokenCounts) -> dict[int, Removal]:
    """All counts of a forward pass before it runs, by layer: they follow from the schedule and what the batch holds.

    Those of a stage that keeps by attention mass and of the stages behind it are bounds, see `settle_mass`.
    """
    return _planned(schedule.stages, counts)


def settle_mass(removals: dict[int, Removal], layer: int, scores: Tensor, layout: TokenLayout) -> dict[int, Removal]:
    """The plan once the scores of the stage at `layer` are there: its counts, and those of the stages behind it.

    Args:
        removals: The plan so far.
        layer: Of the stage. Where it does not keep by attention mass the plan is handed back as it is.
        scores: (B, L), as `image_ranks` takes them.
        layout: The current layout.
    """
    stage, counts = removals[layer].stage, removals[layer].before
    if stage.keep is None:
        return removals
    held_by = tokens_for_mass(scores, layout, stage.keep.mass, groups=counts.image.shape[1])
    most = keep_from_ratio(stage.keep.at_most, counts.image)
    # The stage's one transfer. `after` so far is the fewest that may stay: protected tokens and `at_least` are in it.
    kept = torch.maximum(torch.minimum(held_by.cpu(), most), removals[layer].after.current)
    settled = replace(counts, current=torch.minimum(kept, counts.current))
    behind = tuple(removal.stage for number, removal in removals.items() if number > layer)
    return {**removals, layer: Removal(stage, counts, settled), **_planned(behind, settled)}


def _planned(stages: tuple[PruningStage, ...], counts: TokenCounts) -> dict[int, Removal]:
    removals = {}
    for stage in stages:
        after = replace(counts, current=keep_counts(stage, counts))
        removals[stage.layer] = Removal(stage, counts, after)
        counts = after
    return removals


def keep_from_ratio(ratio: float, image_tokens: Tensor) -> Tensor:
    """`round_half_up(ratio * image_tokens)`, at least 1 unless the ratio is 0. Long, of the shape of `image_tokens`."""
    # To nine decimals first: 0.145 * 100 is a little below 14.5 in binary.
    rounded = torch.floor((image_tokens.double() * ratio).round(decimals=9) + 0.5).long()
    return rounded.clamp(min=1) if ratio > 0 else rounded


def image_ranks(scores: Tensor, layout: TokenLayout, groups: int) -> Tensor:
    """Rank of every image token in its row and group, 0 for the highest score, ties to the earlier one.

    Args:
        scores: (B, L); only the entries of image tokens are read.
        layout: The current layout; its protected tokens come first.
        groups: G.

    Returns:
        (B, L) long; at text and padding no number of use.
    """
    ranks = torch.zeros_like(layout.columns)
    places = torch.arange(ranks.shape[1], device=ranks.device).expand_as(ranks)
    for number in range(groups):
        candidates, order = _ranked(scores, layout, number, groups)
        here = torch.zeros_like(ranks).scatter(1, order, places)
        ranks = torch.where(candidates, here, ranks) if groups > 1 else here
    return ranks


def select(ranks: Tensor, layout: TokenLayout, kept: Tensor) -> Tensor:
    """The `kept` best-ranked image tokens of every row and group, and all text.

    Args:
        ranks: (B, L) as `image_ranks` gives them.
        layout: The current layout.
        kept: (B, G) long, how many stay.

    Returns:
        (B, L) bool, the tokens that stay.
    """
    here = of_group(kept.to(ranks.device, non_blocking=True), layout)
    return layout.valid & (~layout.image | (ranks < here))


def of_group(numbers: Tensor, layout: TokenLayout) -> Tensor:
    """What each token's group has of `numbers` (B, G): (B, L), or (B, 1) where there is one group."""
    return numbers.gather(1, layout.group.clamp(max=numbers.shape[1] - 1)) if numbers.shape[1] > 1 else numbers


def tokens_for_mass(scores: Tensor, layout: TokenLayout, mass: float, groups: int) -> Tensor:
    """How many image tokens `select` must keep so that they hold a share of the scores: (B, G) long.

    The token at which the share is reached is counted. Where no token has any score the share is never reached, and
    the number is that of all columns or more.

    Args:
        scores: (B, L), not negative; only the entries of image tokens are read.
        layout: The current layout.
        mass: The share, of the sum over a group's image tokens.
        groups: G.
    """
    needed = []
    for number in range(groups):
        candidates, order = _ranked(scores, layout, number, groups)
        # In fp64 from the highest score down, padding last: the same sum whatever lies beside a row in its batch.
        held = scores.double().masked_fill(~candidates, 0.0).gather(1, order).cumsum(1)
        share = held / held[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
        needed.append((share < mass).sum(1) + 1)
    return torch.stack(needed, dim=1)


def _ranked(scores: Tensor, layout: TokenLayout, number: int, groups: int) -> tuple[Tensor, Tensor]:
    """The image tokens of group `number`, (B, L) bool, and all columns in the order in which they stay, (B, L) long:
    those that must stay, then by falling score, ties to the earlier one; all else last.
    """
    candidates = layout.image & (layout.group == number) if groups > 1 else layout.image
    ranks = scores.masked_fill(layout.protected, torch.inf).masked_fill(~candidates, -torch.inf)
    return candidates, ranks.argsort(dim=1, descending=True, stable=True)


def compact(keep: Tensor, length: int) -> Tensor:
    """Index (B, length) of the tokens to `keep` (B, L) in their order, packed left; the rest points at column 0."""
    place = torch.where(keep, keep.cumsum(1) - 1, length)
    columns = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    index = columns.new_zeros(keep.shape[0], length + 1)
    return index.scatter(1, place, columns)[:, :length]


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, L') of `tokens` (B, L, ...); a batch of one is shared by all rows. Returns (B, L', ...)."""
    batch, length = tokens.shape[:2]
    if batch == 1:
        flat = index
    else:
        flat = index + torch.arange(index.shape[0], device=index.device).unsqueeze(1) * length
    return tokens.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)


def scatter_back(tokens: Tensor, layout: TokenLayout, length: int) -> Tensor:
    """Put `tokens` (B, L, D) back at their columns of a batch of `length` columns; dropped rows are zero. (B, S, D)."""
    batch, _, width = tokens.shape
    # Padding goes to one spare row behind the batch, which the view then leaves out.
    start = torch.arange(batch, device=tokens.device).unsqueeze(1) * length
    flat = torch.where(layout.valid, layout.columns + start, batch * length).flatten()
    full = tokens.new_zeros(batch * length + 1, width)
    return full.index_copy(0, flat, tokens.flatten(0, 1))[: batch * length].unflatten(0, (batch, length))
