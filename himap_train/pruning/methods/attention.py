"""Methods that read attention: the few rows of it that they need, and what they sum.

All average over heads and read the layer before the stage, so a token's score is what the rows of that layer look at.

Shapes: B rows, L current columns, R ranking rows (queries), H heads, K key-value heads, D head width, G groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.methods.base import Method, RankingRows, Reads, Seen, Widths
from himap_train.pruning.token_map import compact, gather_tokens
from himap_train.pruning.windows import window_by_window

_CPU_LOGITS, _GPU_LOGITS = 2**20, 2**24
"""Attention logits in memory at once."""


@dataclass(frozen=True)
class AttentionMethod(Method):
    """Ranks by the attention that image tokens receive from some rows, summed over these.

    Args:
        window: Side of square windows over the picture, in tokens, of which each keeps the same share of its tokens,
            those of the highest score (Window FastV, arXiv 2502.11501); where it does not divide, the highest of all
            windows have one more. 0: no windows.

    Raises:
        ValueError: Not such a number.
    """

    reads: ClassVar[Reads] = Reads.ATTENTION

    window: int = 0

    def __post_init__(self) -> None:
        """Check where it is set."""
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 0:
            raise ValueError(
                f"criterion {self.name}: window is {self.window!r}; expected the side of a window in tokens, or 0"
            )

    @property
    def ranks(self) -> bool:
        """Not by the score alone where windows have quotas."""
        return not self.window

    @property
    def uses_places(self) -> bool:
        """Where there are windows."""
        return bool(self.window)

    def choose(self, seen: Seen, kept: Tensor) -> Tensor:
        """By score, or window by window."""
        if not self.window:
            return super().choose(seen, kept)
        assert seen.scores is not None
        return super().choose(replace(seen, scores=window_by_window(seen.scores, seen.layout, self.window)), kept)

    @abstractmethod
    def number_of_rows(self, image_tokens: int, text_tokens: int) -> int:
        """Ranking rows of a sample, for its cost: an upper bound."""

    def score(self, seen: Seen) -> Tensor:
        """Sum over the ranking rows."""
        assert seen.rows is not None and seen.attention is not None
        total = torch.zeros(seen.layout.columns.shape, device=seen.rows.index.device)
        for part, attention in seen.attention:
            columns = attention.shape[2]
            total[:, :columns] += (attention * seen.rows.may_rank[:, part, :columns]).sum(1)
        return total

    def flops(self, widths: Widths, image_tokens: int, text_tokens: int, kept: int) -> float:
        """Attention logits of the ranking rows."""
        rows = self.number_of_rows(image_tokens, text_tokens)
        return 2.0 * rows * (image_tokens + text_tokens) * widths.queries if image_tokens else 0.0

    def peak_bytes(self, widths: Widths, image_tokens: int, text_tokens: int, element: int) -> int:
        """Scores of eight heads, their softmax, the sum over heads and its product with who may rank whom; queries."""
        rows = self.number_of_rows(image_tokens, text_tokens)
        logits = rows * (image_tokens + text_tokens) * (8 * min(widths.heads, 8) + 10)
        return logits + rows * widths.queries * element


def rows_of(mask: Tensor, number: Tensor, layout: TokenLayout, groups: int) -> RankingRows:
    """The ranking rows where `mask` (B, L) is true.

    Args:
        mask: (B, L) bool.
        number: (B,) long on the host, how many there are of each row: R follows without asking the device.
        layout: The current layout.
        groups: G.
    """
    index = compact(mask, max(int(number.max()), 1))
    real = torch.arange(index.shape[1], device=index.device) < mask.sum(1, keepdim=True)
    return RankingRows(index, _within_group(index, real, layout, groups), int(number.min()))


def last_rows(layout: TokenLayout, groups: int) -> RankingRows:
    """The last ranking row of each group."""
    one_based = torch.arange(1, layout.group.shape[1] + 1, device=layout.group.device)
    last = torch.stack([(one_based * (layout.ranking & (layout.group == g))).amax(1) for g in range(groups)], dim=1)
    index = (last - 1).clamp(min=0)
    return RankingRows(index, _within_group(index, last > 0, layout, groups), fewest=0)


def image_rows(layout: TokenLayout, counts: TokenCounts) -> RankingRows:
    """All image tokens that are left."""
    return rows_of(layout.image, counts.current.sum(1), layout, counts.image.shape[1])


def _within_group(index: Tensor, real: Tensor, layout: TokenLayout, groups: int) -> Tensor:
    """What each row may rank: (B, R, L), or (B, R, 1) where there is one group."""
    if groups == 1:
        return real.unsqueeze(2)
    return real.unsqueeze(2) & (layout.group.gather(1, index).unsqueeze(2) == layout.group.unsqueeze(1))


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
