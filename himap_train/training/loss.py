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


def supervised_loss(hidden: Tensor, labels: Tensor, lm_head: nn.Module, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Sum of the next-token losses and their number.

    The sum and not the mean: only the caller knows over what to average (see `LlavaFineTuner`, gradient accumulation).

    Args:
        hidden: (B, S, D) final decoder states; row i predicts label i + 1.
        labels: (B, S), -100 where nothing is supervised.
        lm_head: Called as a module, so that LoRA on it, quantised weights and ZeRO-3 gathering work.
        chunk: Positions per call of `lm_head`; 0 means all at once.

    Returns:
        The sum, a scalar in fp32, and the number of supervised positions, a scalar int64.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORED
    states, targets = hidden[:, :-1][supervised], targets[supervised]  # (N, D), (N,)
    count = torch.tensor(targets.numel(), device=hidden.device)
    if targets.numel() == 0:  # keep the graph, and the same module calls on every rank
        return lm_head(hidden[:, :1]).float().sum() * 0.0, count
    step = chunk or targets.numel()
    if targets.numel() <= step:
        return _chunk_loss(states, targets, lm_head), count
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, targets.numel(), step):
        piece = (states[start : start + step], targets[start : start + step])
        total = total + checkpoint(_chunk_loss, *piece, lm_head, use_reentrant=False)
    return total, count


def _chunk_loss(states: Tensor, targets: Tensor, lm_head: nn.Module) -> Tensor:
    """Summed cross-entropy of (n, D) states against (n,) targets, in fp32."""
    return F.cross_entropy(lm_head(states).float(), targets, reduction="sum")
