"""How important is each image token: one small function per criterion, and the few rows of attention that they need.

The criteria of HiMAP (CVPR 2025, section 4): `instruction` is Eq. 8, the attention that image token v receives from the
instruction, summed over its rows; `image` is Eq. 9 as its text and the released code have it, a column sum over the
image rows. `last_token` is FastV's (arXiv 2403.06764). All average over heads and read the layer before the stage.

Shapes: B rows, L current columns, R ranking rows (queries), H heads, K key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.schedule import PruningStage
from himap_train.pruning.selection import compact, gather_tokens

_CPU_LOGITS, _GPU_LOGITS = 2**20, 2**24
"""Attention logits in memory at once."""


@dataclass(frozen=True)
class RankingRows:
    """Which queries rank, and what each of them may rank.

    Attributes:
        index: (B, R) column of the current layout of each ranking row.
        may_rank: Bool, the row is real and the token of its group; (B, R, L), or (B, R, 1) where there is one group.
        fewest: Every row of the batch has at least so many ranking rows.
    """

    index: Tensor
    may_rank: Tensor
    fewest: int


def ranking_rows(stage: PruningStage, layout: TokenLayout, counts: TokenCounts) -> RankingRows:
    """The rows whose attention a stage reads. Their number R follows from `counts`, without asking the device."""
    groups = counts.image.shape[1]
    if stage.criterion == "last_token":
        index, real = _last_rows(layout, groups)
        fewest = 0
    else:
        by_image = stage.criterion in ("image", "image_debiased")
        rows, number = (layout.image, counts.current.sum(1)) if by_image else (layout.ranking, counts.ranking)
        index, fewest = compact(rows, max(int(number.max()), 1)), int(number.min())
        real = torch.arange(index.shape[1], device=index.device) < rows.sum(1, keepdim=True)
    may_rank = real.unsqueeze(2)
    if groups > 1:
        may_rank = may_rank & (layout.group.gather(1, index).unsqueeze(2) == layout.group.unsqueeze(1))
    return RankingRows(index, may_rank, fewest)


def _last_rows(layout: TokenLayout, groups: int) -> tuple[Tensor, Tensor]:
    """The last ranking row of each group: index (B, G), and whether there is one, (B, G) bool."""
    one_based = torch.arange(1, layout.group.shape[1] + 1, device=layout.group.device)
    last = torch.stack([(one_based * (layout.ranking & (layout.group == g))).amax(1) for g in range(groups)], dim=1)
    return (last - 1).clamp(min=0), last > 0


def attention_blocks(
    query: Tensor, key: Tensor, rows: Tensor, valid: Tensor, scaling: float, fewest: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Causal softmax attention of a few query rows, averaged over heads, a block of rows at a time.

    Blocks bound the memory, and each leaves out the columns behind its last row.

    Args:
        query: (B, H, L, D), rotary embedding applied.
        key: (B, K, L, D) with H a multiple of K, rotary embedding applied.
        rows: (B, R) columns of the ranking queries, ascending; what fills up a row of the batch points at column 0.
        valid: (B, L) bool, false at padding.
        scaling: What the layer multiplies the logits with.
        fewest: Every row of the batch has at least so many ranking rows.

    Yields:
        Which of the R rows, and their attention (B, rows, columns up to the last that any of them sees) fp32.
    """
    batch, heads, length, _ = query.shape
    number, share = rows.shape[1], heads // key.shape[1]
    query = gather_tokens(query.transpose(1, 2), rows).transpose(1, 2).unflatten(1, (-1, share))
    keys = key.transpose(2, 3).unsqueeze(2)
    columns = torch.arange(length, device=rows.device)
    block = _block(number, batch * heads * length, rows.device)
    for start in range(0, number, block):
        part = slice(start, min(start + block, number))
        # At least `fewest - part.stop` ranking rows follow, each at a column of its own.
        seen = length - max(fewest - part.stop, 0)
        hidden = (columns[:seen] > rows[:, part].unsqueeze(2)) | ~valid[:, None, :seen]
        # Added, which is faster than filling. Not -inf: an index that only fills up a row may point at padding that
        # sees nothing, and 0 * nan is nan.
        bias = torch.where(hidden, torch.finfo(torch.float32).min, 0.0)[:, None, None]
        logits = (query[..., part, :] @ keys[..., :seen]).float().mul_(scaling).add_(bias)
        yield part, logits.softmax(-1).sum((1, 2)).div_(heads)


def _block(number: int, logits_a_row: int, device: torch.device) -> int:
    """Ranking rows at a time: what a cache (CPU) or little memory (GPU) holds; more blocks leave more columns out."""
    on_cpu = device.type == "cpu"
    block = max((_CPU_LOGITS if on_cpu else _GPU_LOGITS) // logits_a_row, 1)
    return min(block, max(-(-number // 4), 48)) if on_cpu else block


def scores_from_attention(
    criterion: str, blocks: Iterable[tuple[slice, Tensor]], rows: RankingRows, length: int
) -> Tensor:
    """Score of every column from the attention of the ranking rows: (B, L) fp32; of use for image tokens.

    Args:
        criterion: What is summed how.
        blocks: As `attention_blocks` yields them.
        rows: Which rows they are.
        length: L.
    """
    total = torch.zeros(len(rows.index), length, device=rows.index.device)
    seen_by = torch.zeros_like(total)
    columns = torch.arange(length, device=total.device)
    for part, attention in blocks:
        seen = attention.shape[2]
        may_rank = rows.may_rank[:, part, :seen]
        total[:, :seen] += (attention * may_rank).sum(1)
        if criterion == "image_debiased":
            seen_by[:, :seen] += (may_rank & (rows.index[:, part].unsqueeze(2) >= columns[:seen])).sum(1)
    # Under a causal mask the first image token is seen by all image rows, the last by one: divide by how many see it.
    return total / seen_by.clamp(min=1) if criterion == "image_debiased" else total


def scores_without_attention(criterion: str, layout: TokenLayout, counts: TokenCounts, kept: Tensor) -> Tensor:
    """`random`: drawn anew each time from torch's generator; `uniform`: evenly spaced, k of n. (B, L) fp32.

    Args:
        criterion: "random" or "uniform".
        layout: The current layout.
        counts: Its counts.
        kept: (B, G) how many will stay.
    """
    if criterion == "random":
        return torch.rand(layout.image.shape, device=layout.image.device)
    group = layout.group.clamp(max=kept.shape[1] - 1)
    kept_here = kept.to(group.device, non_blocking=True).gather(1, group)
    left_here = counts.current.to(group.device, non_blocking=True).gather(1, group).clamp(min=1)
    place = torch.zeros_like(group)
    for number in range(kept.shape[1]):
        members = layout.image & (layout.group == number)
        place = torch.where(members, members.cumsum(1) - 1, place)
    chosen = (place + 1) * kept_here // left_here - place * kept_here // left_here
    return chosen.float()
