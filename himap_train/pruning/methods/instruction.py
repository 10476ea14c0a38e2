"""HiMAP's shallow criterion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.methods.attention import AttentionMethod, rows_of
from himap_train.pruning.methods.base import RankingRows


@dataclass(frozen=True)
class Instruction(AttentionMethod):
    """Attention of the instruction's rows: prompt text after the image (HiMAP, CVPR 2025, Eq. 8)."""

    name: ClassVar[str] = "instruction"

    def rows(self, layout: TokenLayout, counts: TokenCounts) -> RankingRows:
        """Text tokens of the prompt after the image."""
        return rows_of(layout.ranking, counts.ranking, layout, counts.image.shape[1])

    def number_of_rows(self, image_tokens: int, text_tokens: int) -> int:
        """All text, an upper bound."""
        return text_tokens
