"""HiMAP's deep criterion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.methods.attention import AttentionMethod, image_rows
from himap_train.pruning.methods.base import RankingRows


@dataclass(frozen=True)
class ByImage(AttentionMethod):
    """Attention of the image rows that are left, summed as the text of HiMAP's Eq. 9 and its released code have it."""

    name: ClassVar[str] = "image"

    def rows(self, layout: TokenLayout, counts: TokenCounts) -> RankingRows:
        """The image tokens that are left."""
        return image_rows(layout, counts)

    def number_of_rows(self, image_tokens: int, text_tokens: int) -> int:
        """All image tokens before the stage."""
        return image_tokens
