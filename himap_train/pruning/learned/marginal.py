"""The gradient of a keep ratio while tokens are really removed.

A token that has left sends no gradient, so autograd sees no way in which the loss depends on a keep ratio. But moving a
cut by a little moves the *marginal* tokens: the last that it keeps and the first that it drops. The last that stay have
a bias of zero on their attention logits, whose derivative is what the loss loses, to first order, when they go. The
first that leave, the *shadows*, run through one more layer hidden from all others, and what adding one of them would
change in each row's attention is added with the factor zero. Both sides get a derivative by the ratio: half of the
tokens that move, each. The forward pass is the hard removal, to rounding.

Both sides are needed. Where the loss is small it is flat: taking a token from an answer that is right and sure shows
little at first, although taking more of them makes it wrong. Answers that are wrong for want of the dropped tokens show
the other half.

One invariant makes this right for several stages: the moves of a layer add up to the number of tokens by which its
count moves. A token that an earlier cut would take, and that survives a later one, is replaced there by the marginal
tokens of the later cut; without this, the derivative of an early ratio has the wrong sign wherever the tokens that it
adds push better ones out later on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.ranks import of_group
from himap_train.pruning.removal import Removal
from himap_train.pruning.token_map import TokenMap, compact, gather_tokens

MARGINAL_SHARE = 0.05
"""Marginal tokens on each side as a share of the original image tokens: fewer are noisier, more are less marginal."""
HIDDEN = -16.0
"""Bias of the shadows: their weight of 1e-7 is lost in rounding, yet it can be read (bf16 has fp32's range). It shows
where their logits are ten above all that a row sees, as may be for the first tokens of a prompt that begins with its
image."""


@dataclass(frozen=True)
class Marginal:
    """The marginal tokens of one stage, at the columns before its removal.

    Attributes:
        bias: (B, L) fp32, of the attention logits of each token as a key; 0 or `HIDDEN`.
        gain: (B, L) fp32, zero: by how much the presence of each shadow moves.
        moved: (B, L) fp32, zero: by how much each token's presence moves with the ratios, for the stages behind.
        shadow: (B, L) bool, the first dropped tokens, which run through one more layer.
        shadows: (B,) long on the host, their number.
    """

    bias: Tensor
    gain: Tensor
    moved: Tensor
    shadow: Tensor
    shadows: Tensor

    def gather(self, moved_by: TokenMap) -> Marginal:
        """At the tokens after a removal."""
        parts = (self.bias, self.gain, self.moved, self.shadow)
        bias, gain, moved, shadow = (moved_by.gather(part) * moved_by.valid for part in parts)
        return Marginal(bias, gain, moved, shadow, self.shadows)


def marginal_tokens(
    ratio: Tensor, ranks: Tensor, layout: TokenLayout, removal: Removal, carried: Tensor | None = None
) -> Marginal:
    """What gives the keep ratio of one stage its gradient.

    Args:
        ratio: Scalar, the fraction kept at this stage.
        ranks: (B, L) as `image_ranks` gives them.
        layout: Before the removal.
        removal: Its counts.
        carried: (B, L) `moved` of the stage before, at the same tokens; None at the first stage.
    """
    device, after = ranks.device, removal.after
    width = _widths(after)
    below = torch.minimum(width, removal.before.current - after.current)
    above = torch.minimum(width, after.current)
    original, kept, above_here, below_here = (
        numbers.to(device, non_blocking=True) for numbers in (after.image, after.current, above, below)
    )
    cut = of_group(kept, layout)
    stays = layout.image & (ranks < cut)
    last = stays & (ranks >= cut - of_group(above_here, layout))
    shadow = layout.image & (ranks >= cut) & (ranks < cut + of_group(below_here, layout))
    moves = (ratio - ratio.detach()) * original
    if carried is not None:
        carried = carried * stays
        moves = moves - _sum_per_group(carried, layout, kept.shape[1])
    each = of_group(moves / above_here.clamp(min=1), layout) * last
    moved = each if carried is None else carried + each
    half = of_group(torch.where((below_here > 0) & (above_here > 0), 0.5, 1.0), layout)
    gain = of_group(moves / below_here.clamp(min=1), layout) * shadow * half
    seen = each * half if carried is None else carried + each * half
    return Marginal(seen + HIDDEN * shadow, gain, moved, shadow, below.sum(1))


def shadow_gain(
    out: Tensor, held: Tensor, query: Tensor, key: Tensor, value: Tensor, marginal: Marginal, scaling: float
) -> Tensor:
    """Zero of the shape of `out`, whose derivative by `gain` is what adding the shadows would change in it.

    A token that is added takes the share `e / (1 + e)` of a row's attention, e its weight relative to all that the row
    sees, and gives its value for the row's mean. The shadows' weights relative to one another come from their logits,
    their sum from what the kernel gave for their column of the values: no row's attention is computed again.

    Args:
        out: (B, L, H, D) attention without the shadows.
        held: (B, L, H, 1) sum of e over the shadows of each row.
        query: (B, H, L, D).
        key: (B, K, L, D).
        value: (B, K, L, D).
        marginal: At these tokens.
        scaling: What logits are multiplied with.
    """
    number = max(int(marginal.shadows.max()), 1)
    index = compact(marginal.shadow, number)  # (B, S) columns of the shadows
    real = torch.arange(number, device=index.device) < marginal.shadow.sum(1, keepdim=True)
    gain = (marginal.gain.gather(1, index) * real)[:, None, None].to(out.dtype)
    with torch.no_grad():
        share = query.shape[1] // key.shape[1]
        keys, values = (
            gather_tokens(part.transpose(1, 2), index).transpose(1, 2).repeat_interleave(share, 1)
            for part in (key, value)
        )
        logits = (query @ keys.transpose(2, 3)).float() * scaling
        rows = torch.arange(query.shape[2], device=index.device)
        unseen = ~real[:, None] | (index[:, None] > rows[:, None])  # (B, L, S)
        weights = logits.masked_fill(unseen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        weights = weights * held.transpose(1, 2).float().clamp(min=0)
        taken = (weights / (1 + weights)).to(out.dtype)  # (B, H, L, S)
    moved = taken * gain
    change = moved @ values - moved.sum(-1, keepdim=True) * out.detach().transpose(1, 2)
    return change.transpose(1, 2)


def _widths(counts: TokenCounts) -> Tensor:
    return (MARGINAL_SHARE * counts.image).round().long().clamp(min=1)


def _sum_per_group(values: Tensor, layout: TokenLayout, groups: int) -> Tensor:
    """(B, G) sums of `values` (B, L), which are zero but at image tokens."""
    if groups == 1:
        return values.sum(1, keepdim=True)
    group = layout.group.clamp(max=groups - 1)
    return values.new_zeros(len(values), groups).scatter_add(1, group, values)
