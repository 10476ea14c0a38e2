"""A ranking that is trained beside the model: `pruning.learn_ranking` of a config does, a checkpoint brings it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from himap_train.pruning.learned.scorer import HEAD, Asked, Scorer
from himap_train.pruning.methods.base import Members, Method, Reads, Seen, Widths
from himap_train.pruning.methods.divprune import apart, computed_pairs, farthest_first
from himap_train.pruning.names import require_number
from himap_train.pruning.ranks import image_ranks

_LEAST = 1e-6
"""Distance of copies: above 0, so that the better of two still comes first."""


@dataclass(frozen=True)
class Learned(Method):
    """What a small network scores highest that is not there yet; it sees image and question at the stage's input.

    The next to stay is the token of the largest `score + spread * log d`, where d is its distance (1 - cosine, at most
    1) from the nearest that is chosen. Of scores e^score is the share of the loss that the network foresees a token to
    be owed, so this is its worth times what is new in it; compare maximal marginal relevance (Carbonell and Goldstein,
    SIGIR 1998). So copies of one thing do not crowd out another.

    While the network is trained, only half of what stays is chosen by score, the others by difference alone, as
    `divprune` does: what leaves teaches nothing, so training has to see what the network does not look for yet.

    Args:
        spread: How much difference counts; 0 leaves all to the scores.
        width: Width of the network, a multiple of 16.

    Raises:
        ValueError: A number that cannot be.
    """

    name: ClassVar[str] = "learned"
    reads: ClassVar[Reads] = Reads.STATES
    learns: ClassVar[bool] = True

    spread: float = 1.0
    width: int = 128

    def __post_init__(self) -> None:
        """Check every field where it is set."""
        require_number("criterion learned", "spread", self.spread)
        if not 0.0 <= self.spread <= 10.0:
            raise ValueError(f"criterion learned: spread is {self.spread}; expected 0 to 10 (weight of the difference)")
        if type(self.width) is not int or not 0 < self.width <= 1024 or self.width % HEAD:
            raise ValueError(f"criterion learned: width is {self.width!r}; expected a multiple of {HEAD}, 1024 at most")

    @property
    def ranks(self) -> bool:
        """Where difference does not count."""
        return self.spread == 0

    def scorer(self, hidden: int) -> Scorer:
        """A new one, with random weights, for a decoder of this width."""
        return Scorer(hidden, self.width)

    def score(self, seen: Seen) -> Tensor:
        """The scorer's.

        Raises:
            ValueError: There is none.
        """
        if seen.scorer is None:
            raise ValueError(
                "criterion learned has no ranking at this layer: `pruning.learn_ranking` trains one, and "
                "load_checkpoint brings what was trained"
            )
        assert seen.states is not None
        image = Members.of(seen.layout, seen.counts)
        scores: Tensor = seen.scorer.to(seen.layout.columns.device)(asked(image, seen.states, seen))
        return image.spread(scores, seen.layout)

    def choose(self, seen: Seen, kept: Tensor) -> Tensor:
        """Greedily, by score and by difference from all that are chosen."""
        assert seen.scores is not None
        if not self.spread:
            return image_ranks(seen.scores, seen.layout, seen.groups)
        assert seen.states is not None
        members, number = Members.of(seen.layout, seen.counts), int(kept.max())
        must, states = members.gather(seen.layout.protected), members.gather(seen.states)
        if seen.learns:
            ranks = members.gather(image_ranks(seen.scores, seen.layout, seen.groups))
            first = must | (ranks < (kept - kept // 2).to(ranks.device).view(-1, 1))
            order = farthest_first(apart(states, members.real, first), members.real, first, number)
        else:
            worth = members.gather(seen.scores).float().masked_fill(must, torch.inf)
            novelty = apart(states, members.real, must).clamp_(_LEAST, 1.0).log_()
            gain = novelty.mul_(self.spread).add_(worth.unsqueeze(1))
            order = farthest_first(gain, members.real, must, number, worth)
        return members.spread(order, seen.layout)

    def flops(self, widths: Widths, image_tokens: int, text_tokens: int, kept: int) -> float:
        """Of the scorer, and all pairs' cosines."""
        width, heads = self.width, self.width // HEAD
        image = image_tokens * (widths.hidden + 2) * width
        pairs = computed_pairs(image_tokens) * widths.hidden * (self.spread > 0)
        return 2.0 * (pairs + image + text_tokens * (widths.hidden + 9 * width + heads + 2 * text_tokens) * width)

    def peak_bytes(self, widths: Widths, image_tokens: int, text_tokens: int, element: int) -> int:
        """Normalised states of image and question, and distances, in fp32."""
        return 8 * (image_tokens + text_tokens) * widths.hidden + 8 * image_tokens**2 * (self.spread > 0)


def asked(image: Members, states: Tensor, seen: Seen) -> Asked:
    """What a scorer looks at.

    Args:
        image: Image tokens, of those that have `states`.
        states: (B, L, D).
        seen: What the stage's method was shown: the question is as it was there.
    """
    assert seen.states is not None
    text = Members.question(seen.layout, seen.counts)
    return Asked(image.gather(states), image.real, text.gather(seen.states), text.real)
