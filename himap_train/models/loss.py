"""Cross-entropy where there is something to predict, and nowhere else.

A sample of 700 tokens has some 60 to predict. `lm_head` on all of them would cost 700 x 32000 logits a sample (90 MB in
fp32, and the same again for their gradient); only the supervised rows go through it, a chunk at a time, and where there
is more than one chunk each is computed again in the backward pass. Shapes: B rows, S columns, D hidden size, N
supervised positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100


def supervised_loss(
    hidden: Tensor, labels: Tensor, lm_head: nn.Module, chunk: int = 1024, calls: int = 1
) -> tuple[Tensor, Tensor]:
    """Sum of the next-token losses and their number.

    The sum and not the mean: only the caller knows over what to average (see `LlavaFineTuner`, gradient accumulation).

    Args:
        hidden: (B, S, D) final decoder states; row i predicts label i + 1.
        labels: (B, S), -100 where nothing is supervised.
        lm_head: Called as a module, so that LoRA on it, quantised weights and ZeRO-3 gathering work.
        chunk: Positions per call of `lm_head`; 0 means all at once.
        calls: At least so many calls of `lm_head`, some of them for nothing; see `calls_needed`.

    Returns:
        The sum, a scalar in fp32, and the number of supervised positions, a scalar int64.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORED
    states, targets = hidden[:, :-1][supervised], targets[supervised]  # (N, D), (N,)
    count = torch.tensor(targets.numel(), device=hidden.device)
    step = chunk or max(targets.numel(), 1)
    pieces = list(zip(states.split(step), targets.split(step), strict=True)) if targets.numel() else []
    # Where there is nothing to predict: keep the graph, and the same module calls on every rank.
    nothing = (hidden[:1, 0], torch.full_like(labels[:1, 0], IGNORED))
    pieces += [nothing] * (max(calls, 1) - len(pieces))
    if len(pieces) == 1:
        return _chunk_loss(*pieces[0], lm_head), count
    losses = [checkpoint(_chunk_loss, *piece, lm_head, use_reentrant=False) for piece in pieces]
    return torch.stack(losses).sum(), count


def calls_needed(labels: Tensor, chunk: int) -> int:
    """Calls of `lm_head` that `supervised_loss` makes for these labels (B, S)."""
    return -(-int((labels[:, 1:] != IGNORED).sum()) // chunk) if chunk else 1


def _chunk_loss(states: Tensor, targets: Tensor, lm_head: nn.Module) -> Tensor:
    """Summed cross-entropy of (n, D) states against (n,) targets, in fp32."""
    return F.cross_entropy(lm_head(states).float(), targets, reduction="sum")
