"""How a stage chooses: what its method is shown, the ranks that it gives, and the removal that follows."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from himap_train.models.attention import ScoreCollector, unrounded
from himap_train.models.tokens import Tokens
from himap_train.pruning.layout import TokenLayout
from himap_train.pruning.methods.base import Seen, with_scores
from himap_train.pruning.ranks import image_ranks, select
from himap_train.pruning.removal import Removal
from himap_train.pruning.token_map import TokenMap


def collector_for(removal: Removal | None, tokens: Tokens, layout: TokenLayout, always: bool) -> ScoreCollector | None:
    """What the layer before a stage reports to; None where nothing will be ranked."""
    if removal is None or not (removal.removes or always) or not removal.stage.reads_before:
        return None
    return ScoreCollector(removal.stage, layout, removal.before, tokens.hidden.detach())


def show(
    removal: Removal,
    tokens: Tokens,
    layout: TokenLayout,
    collector: ScoreCollector | None,
    scorer: nn.Module | None,
) -> Seen:
    """What a stage's method may look at, with its scores."""
    seen = Seen(layout, removal.before) if collector is None else collector.seen()
    seen = replace(seen, states=tokens.hidden.detach(), scorer=scorer)
    if removal.stage.removes_all or removal.stage.ranks_before:
        return seen
    with unrounded(tokens.hidden):
        return with_scores(removal.stage.method, seen)


def ranked(removal: Removal, shown: Seen) -> Tensor:
    """Ranks of the image tokens, (B, L) long; where all leave, those that must stay come first."""
    if removal.stage.removes_all:
        return image_ranks(shown.layout.image.float(), shown.layout, shown.groups)
    with unrounded(shown.layout.image):
        return removal.stage.method.choose(shown, removal.after.current)


def token_map(removal: Removal, shown: Seen, ranks: Tensor, tokens: Tokens) -> TokenMap:
    """The removal; where all leave nothing is merged, and marginal tokens run one layer more."""
    marginal, after = tokens.marginal, removal.after
    if marginal is None and not removal.stage.removes_all:
        with unrounded(tokens.hidden):
            return removal.stage.method.token_map(shown, ranks, after)
    keep = select(ranks, shown.layout, after.current)
    if marginal is None:
        return TokenMap.of(keep, after.lengths)
    return TokenMap.of(keep | marginal.shadow, after.lengths + marginal.shadows)
