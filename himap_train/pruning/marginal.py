"""The gradient of a keep ratio while tokens are really removed.

A token that has left sends no gradient, so autograd sees no way in which the loss depends on a keep ratio. But moving a
cut by a little moves the *marginal* tokens, the last that it keeps. They are there, and what the loss loses when one of
them goes is, to first order, its derivative by the token's weight in the softmax of the layers behind the cut: by a
bias on its attention logits. So each stage gives its marginal tokens a bias of value zero whose derivative by the ratio
is their share of the tokens that move. The forward pass is the hard removal.

One invariant makes this right for several stages: the shares of a layer add up to the number of tokens by which its
count moves. A token that an earlier cut would take, and that survives a later one, is replaced there by the marginal
token of the later cut; without this, the derivative of an early ratio has the wrong sign wherever the tokens that it
adds push better ones out later on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.selection import of_group

MARGINAL_SHARE = 0.05
"""Marginal tokens as a share of the original image tokens: fewer are noisier, more are less marginal."""


def marginal_bias(
    ratio: Tensor, ranks: Tensor, layout: TokenLayout, after: TokenCounts, carried: Tensor | None = None
) -> Tensor:
    """A bias of zero for the attention logits of each token as a key, through which a keep ratio gets its gradient.

    Args:
        ratio: Scalar, the fraction kept at this stage.
        ranks: (B, L) as `image_ranks` gives them.
        layout: Before the removal.
        after: Counts after it.
        carried: (B, L) the bias of the layer before, at the same tokens; None at the first stage.

    Returns:
        (B, L) fp32, zero everywhere; of use where tokens stay.
    """
    device = ranks.device
    original, kept = (numbers.to(device, non_blocking=True) for numbers in (after.image, after.current))
    number = torch.minimum((MARGINAL_SHARE * original).round().long().clamp(min=1), kept)
    cut, width = of_group(kept, layout), of_group(number, layout)
    stays = layout.image & (ranks < cut)
    moved = (ratio - ratio.detach()) * original
    if carried is not None:
        moved = moved - _sum_per_group(carried * stays, layout, kept.shape[1])
    bias = of_group(moved, layout) * (stays & (ranks >= cut - width)) / width.clamp(min=1)
    return bias if carried is None else bias + carried * stays


def _sum_per_group(values: Tensor, layout: TokenLayout, groups: int) -> Tensor:
    """(B, G) sums of `values` (B, L), which are zero but at image tokens."""
    if groups == 1:
        return values.sum(1, keepdim=True)
    group = layout.group.clamp(max=groups - 1)
    return values.new_zeros(len(values), groups).scatter_add(1, group, values)
