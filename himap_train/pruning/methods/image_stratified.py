"""HiMAP's deep criterion, region by region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from himap_train.pruning.methods.base import Seen
from himap_train.pruning.methods.image import ByImage
from himap_train.pruning.windows import over_mean


@dataclass(frozen=True)
class ImageStratified(ByImage):
    """Attention of the image rows, compared only with that of the same part of the picture.

    What position alone does to the sum of `image` is much the same all over a small window. So each window keeps the
    same share of its tokens, those of the highest score, and where that does not divide, the tokens that stand out most
    from the mean of their windows stay. Dividing by what even attention would give, as `image_debiased` nearly does,
    turns the bias round: attention falls with distance, not with position alone.

    Args:
        window: Side of a window in tokens, 1 or more. Windows of 3 keep about one token each at HiMAP's ratio of 1/8.
    """

    name: ClassVar[str] = "image_stratified"

    window: int = 3

    def __post_init__(self) -> None:
        """Check where it is set."""
        super().__post_init__()
        if not self.window:
            raise ValueError("criterion image_stratified: window is 0; expected 1 or more, or the criterion image")

    def score(self, seen: Seen) -> Tensor:
        """The sum, over the mean of its window."""
        return over_mean(super().score(seen), seen.layout, self.window)
