"""A ranking that is trained beside the model: `pruning.learn_ranking` of a config does, a checkpoint brings it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from himap_train.pruning.learned.scorer import HEAD, Asked, Scorer
from himap_train.pruning.methods.base import Members, Method, Reads, Seen, Widths
from himap_train.pruning.methods.divprune import apart, computed_pairs, farthest_first
from himap_train.pruning.names import require_number
from himap_train.pruning.ranks import image_ranks


@dataclass(frozen=True)
class Learned(Method):
    """What a small network scores highest, which sees the states of image and question at the stage's input.

    A share of what stays is chosen by difference instead, as `divprune` does: after the tokens of the highest scores
    comes the one whose state is farthest from all chosen (1 - cosine), and so on. So what nobody foresaw is like
    something that stays, and training sees what it does not look for yet.

    Args:
        spread: The share of the tokens that stay which is chosen by difference; 0 leaves all to the scores.
        width: Width of the network, a multiple of 16.

    Raises:
        ValueError: A number that cannot be.
    """

    name: ClassVar[str] = "learned"
    reads: ClassVar[Reads] = Reads.STATES
    learns: ClassVar[bool] = True

    spread: float = 0.5
    width: int = 128

    def __post_init__(self) -> None:
        """Check every field where it is set."""
        require_number("criterion learned", "spread", self.spread)
        if not 0.0 <= self.spread <= 1.0:
            raise ValueError(f"criterion learned: spread is {self.spread}; expected 0 to 1 (share of what stays)")
        if type(self.width) is not int or not 0 < self.width <= 1024 or self.width % HEAD:
            raise ValueError(f"criterion learned: width is {self.width!r}; expected a multiple of {HEAD}, 1024 at most")

    @property
    def ranks(self) -> bool:
        """Where nothing is spread."""
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
        """By the scores, and from a number on by the difference from all that are chosen."""
        assert seen.scores is not None
        ranks = image_ranks(seen.scores, seen.layout, seen.groups)
        if not self.spread:
            return ranks
        members = Members.of(seen.layout, seen.counts)
        first = (kept - (self.spread * kept).add(0.5).floor().long()).flatten().to(ranks.device).unsqueeze(1)
        best = (members.gather(ranks) < first.clamp(min=1)) | members.gather(seen.layout.protected)
        assert seen.states is not None
        distance = apart(members.gather(seen.states), members.real, best)
        return members.spread(farthest_first(distance, members.real, best, int(kept.max())), seen.layout)

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
