"""Cross-entropy where there is something to predict, and nowhere else; and the divergence from a teacher there.

A sample of 700 tokens has some 60 to predict. `lm_head` on all of them would cost 700 x 32000 logits a sample (90 MB in
fp32, and the same again for their gradient); only the supervised rows go through it, a chunk at a time, and where there
is more than one chunk each is computed again in the backward pass. Shapes: B rows, S columns, D hidden size, N
supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable

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
    total = _over_chunks(_chunk_loss, (hidden,), labels, lm_head, chunk, calls)
    return total, (labels[:, 1:] != IGNORED).sum()


def distilled_loss(
    hidden: Tensor, teacher: Tensor, labels: Tensor, lm_head: nn.Module, chunk: int = 1024, calls: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the next-token losses and of the divergences from a teacher, and the number of positions.

    The divergence of a position is KL(teacher || student) between the distributions of the next token, at temperature
    1. The teacher's logits come from the same `lm_head`, a chunk at a time, without a gradient.

    Args:
        hidden: (B, S, D) as in `supervised_loss`.
        teacher: (B, S, D) final states of the teacher's pass over the same batch.
        labels: (B, S), -100 where nothing is supervised.
        lm_head: As in `supervised_loss`.
        chunk: As in `supervised_loss`.
        calls: As in `supervised_loss`; each is two, the student's and the teacher's.

    Returns:
        Cross-entropy and divergence, scalars in fp32, and the number of supervised positions, a scalar int64.
    """
    cross_entropy, divergence = _over_chunks(
        _chunk_losses, (hidden, teacher.detach()), labels, lm_head, chunk, calls
    ).unbind()
    return cross_entropy, divergence, (labels[:, 1:] != IGNORED).sum()


def calls_needed(labels: Tensor, chunk: int) -> int:
    """Calls of `lm_head` that `supervised_loss` makes for these labels (B, S)."""
    return -(-int((labels[:, 1:] != IGNORED).sum()) // chunk) if chunk else 1


def _over_chunks(
    loss: Callable[..., Tensor],
    hidden: tuple[Tensor, ...],
    labels: Tensor,
    lm_head: nn.Module,
    chunk: int,
    calls: int,
) -> Tensor:
    """Sum of `loss(states (n, D) ..., targets (n,), lm_head)` over the supervised positions of `hidden` (B, S, D)."""
    targets = labels[:, 1:]
    supervised = targets != IGNORED
    rows = [*(states[:, :-1][supervised] for states in hidden), targets[supervised]]  # (N, D) ..., (N,)
    step = chunk or max(len(rows[-1]), 1)
    pieces = list(zip(*(part.split(step) for part in rows), strict=True)) if len(rows[-1]) else []
    # Where there is nothing to predict: keep the graph, and the same module calls on every rank.
    nothing = (*(states[:1, 0] for states in hidden), torch.full_like(labels[:1, 0], IGNORED))
    pieces += [nothing] * (max(calls, 1) - len(pieces))
    if len(pieces) == 1:
        return loss(*pieces[0], lm_head)
    return torch.stack([checkpoint(loss, *piece, lm_head, use_reentrant=False) for piece in pieces]).sum(0)


def _chunk_loss(states: Tensor, targets: Tensor, lm_head: nn.Module) -> Tensor:
    """Summed cross-entropy of (n, D) states against (n,) targets, in fp32."""
    return F.cross_entropy(lm_head(states).float(), targets, reduction="sum")


def _chunk_losses(states: Tensor, teacher: Tensor, targets: Tensor, lm_head: nn.Module) -> Tensor:
    """Summed cross-entropy, and divergence from the (n, D) teacher's states: (2,), in fp32."""
    logits = lm_head(states).float()
    with torch.no_grad():
        expected = lm_head(teacher).float().log_softmax(-1)
    divergence = F.kl_div(logits.log_softmax(-1), expected, reduction="none", log_target=True).sum(-1)
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([cross_entropy, divergence[targets != IGNORED].sum()])
