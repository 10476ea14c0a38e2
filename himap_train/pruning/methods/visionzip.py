"""VisionZip: what the vision tower looks at, and means of the rest (arXiv 2412.04467, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from himap_train.pruning.methods.base import Members, Method, Reads, Seen, Widths
from himap_train.pruning.names import require_number
from himap_train.pruning.ranks import image_ranks
from himap_train.pruning.token_map import Pool, compact, gather_tokens

_KEY = 64
"""Width of a head of the usual towers."""


@dataclass(frozen=True)
class VisionZip(Method):
    """Dominant tokens, which get most attention in the vision tower, and contextual ones, into which the rest merges.

    The attention is that of the layer whose output the projector takes, mean over heads: of the class token, or in a
    tower without one the mean over all patches. Of the tokens that are not dominant every n-th becomes a contextual
    one, n the whole part of their number by that of the contextual ones; each of the others goes to the contextual one
    whose key (of that layer, mean over heads) has the largest cosine to its own, ties to the earlier. What shows no
    part of the picture (newlines between rows of patches) is merged into nothing.

    A contextual token becomes half of what it was and half the mean of those that went to it. The released code adds
    the two, before the projector; the decoder's first norm takes no notice of the length. Published before the decoder
    (layer 0).

    Args:
        contextual: Share of what stays that is contextual; 0 merges nothing.

    Raises:
        ValueError: Not a share.
    """

    name: ClassVar[str] = "visionzip"
    reads: ClassVar[Reads] = Reads.TOWER
    merges: ClassVar[bool] = True
    ranks = False

    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        """Check where it is set."""
        require_number("criterion visionzip", "contextual", self.contextual)
        if not 0.0 <= self.contextual <= 1.0:
            raise ValueError(
                f"criterion visionzip: contextual is {self.contextual}; expected 0 to 1 (share that stays)"
            )

    def score(self, seen: Seen) -> Tensor:
        """Attention in the tower."""
        assert seen.layout.tower is not None
        return seen.layout.tower.score

    def choose(self, seen: Seen, kept: Tensor) -> Tensor:
        """Dominant tokens by rank, contextual ones in their order, the others."""
        members, place, dominant, target = self._parts(seen, kept)
        last = place.shape[1]
        behind = torch.where(target, last, 2 * last) + torch.arange(last, device=place.device)
        order = torch.where(dominant, place, behind).argsort(dim=1)
        return members.spread(order.argsort(dim=1), seen.layout)

    def pool(self, seen: Seen, keep: Tensor, kept: Tensor) -> Pool:
        """The others into contextual tokens."""
        assert seen.layout.tower is not None
        members, _, dominant, target = self._parts(seen, kept)
        key = members.gather(seen.layout.tower.key)
        joins = members.real & ~dominant & ~target & (key != 0).any(2) & target.any(1, keepdim=True)
        index = compact(target, max(self._most(kept), 1))
        real = torch.arange(index.shape[1], device=index.device) < target.sum(1, keepdim=True)
        cosine = normalize(key, dim=2) @ normalize(gather_tokens(key, index), dim=2).transpose(1, 2)
        into = index.gather(1, cosine.masked_fill(~real.unsqueeze(1), -torch.inf).argmax(2))
        into = torch.where(joins, into, torch.arange(key.shape[1], device=key.device))
        number = torch.zeros_like(into).scatter_add(1, into, joins.long())
        share = torch.where(joins, 0.5 / number.gather(1, into).clamp(min=1), torch.where(number > 0, 0.5, 1.0))
        columns = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        image = seen.layout.image
        keeper = torch.where(image, members.spread(members.index.gather(1, into), seen.layout), columns)
        return Pool(keeper, torch.where(image, members.spread(share, seen.layout), 1.0))

    def _most(self, kept: Tensor) -> int:
        """The largest number of contextual tokens of a row and group."""
        return int((kept * self.contextual + 0.5).long().max())

    def _parts(self, seen: Seen, kept: Tensor) -> tuple[Members, Tensor, Tensor, Tensor]:
        """The image tokens, their ranks by score, and which are dominant and contextual: (B * G, N) each."""
        assert seen.scores is not None and seen.layout.tower is not None
        members = Members.of(seen.layout, seen.counts)
        numbers = torch.minimum((kept * self.contextual + 0.5).long(), (kept - seen.counts.protected).clamp(min=0))
        both = torch.stack([numbers, kept - numbers]).flatten(1).unsqueeze(2)
        number, main = both.to(seen.layout.columns.device, non_blocking=True)
        place = members.gather(image_ranks(seen.scores, seen.layout, seen.groups))
        dominant = (place < main) & members.real
        rest = members.real & ~dominant & (members.gather(seen.layout.tower.key) != 0).any(2)
        step = (rest.sum(1, keepdim=True) // number.clamp(min=1)).clamp(min=1)
        nth = rest.cumsum(1) - 1
        target = rest & (nth % step == 0) & (nth // step < number)
        return members, place, dominant, target

    def flops(self, widths: Widths, image_tokens: int, text_tokens: int, kept: int) -> float:
        """Cosines of the image tokens and the contextual ones, and one multiply-add for each state."""
        return 2.0 * image_tokens * int(kept * self.contextual + 0.5) * _KEY

    def peak_bytes(self, widths: Widths, image_tokens: int, text_tokens: int, element: int) -> int:
        """Keys and normalised keys in fp32, and weighted states and their sums of the whole sequence."""
        return 8 * image_tokens * _KEY + 2 * (image_tokens + text_tokens) * widths.hidden * element
