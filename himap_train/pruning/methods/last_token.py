"""FastV's criterion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.methods.attention import AttentionMethod, last_rows
from himap_train.pruning.methods.base import RankingRows


@dataclass(frozen=True)
class LastToken(AttentionMethod):
    """Attention of the prompt's last row (FastV, arXiv 2403.06764)."""

    name: ClassVar[str] = "last_token"

    def rows(self, layout: TokenLayout, counts: TokenCounts) -> RankingRows:
        """The last prompt token, of each turn that has images."""
        return last_rows(layout, counts.image.shape[1])

    def number_of_rows(self, image_tokens: int, text_tokens: int) -> int:
        """One."""
        return 1
