"""How many image tokens a stage keeps: a fraction, a number, or as many as hold a share of the attention.

With a share of the attention a sample whose attention lies on few image tokens keeps few and costs less, and one that
looks everywhere keeps more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from himap_train.pruning.names import check_keys, field_names, require_number


@dataclass(frozen=True)
class Ratio:
    """Keep a fraction of the original image tokens of the row, rounded half up, at least one unless it is 0.

    Args:
        ratio: In [0, 1].

    Raises:
        ValueError: Outside.
    """

    ratio: float

    def __post_init__(self) -> None:
        """Check where it is set."""
        require_number("keep_ratio", "the ratio", self.ratio)
        if not 0.0 <= self.ratio <= 1.0:
            raise ValueError(f"keep_ratio is {self.ratio}; expected 0 to 1 (fraction kept)")

    def least(self, image: Tensor) -> Tensor:
        """How many stay of `image` tokens; long, of the same shape."""
        return keep_from_ratio(self.ratio, image)

    most = least

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a stage."""
        return {"keep_ratio": self.ratio}


@dataclass(frozen=True)
class Count:
    """Keep a number of image tokens.

    Args:
        count: 0 or more, below 2**31.

    Raises:
        ValueError: Not such a number.
    """

    count: int

    def __post_init__(self) -> None:
        """Check where it is set."""
        if isinstance(self.count, bool) or not isinstance(self.count, int) or not 0 <= self.count < 2**31:
            raise ValueError(f"keep_count is {self.count!r}; expected an integer of 0 or more, below 2**31")

    def least(self, image: Tensor) -> Tensor:
        """How many stay of `image` tokens; long, of the same shape."""
        return torch.full_like(image, self.count)

    most = least

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a stage."""
        return {"keep_count": self.count}


@dataclass(frozen=True)
class Mass:
    """Keep the smallest set of image tokens that holds a share of the attention.

    The share is of the scores of the stage's criterion, summed over the image tokens of a row (and turn) that are left.
    Tokens that must stay count in it.

    Args:
        mass: Share in (0, 1] of the attention that the kept tokens hold together.
        at_least: Fraction in [0, 1] of the original image tokens that stay in any case; never less than one token.
        at_most: Fraction in (0, 1] of the original image tokens that no sample exceeds. The cost of a schedule is
            bounded by it.

    Raises:
        ValueError: On a value outside these ranges, or bounds upside down.
    """

    mass: float
    at_least: float = 0.0
    at_most: float = 1.0

    def __post_init__(self) -> None:
        """Check every field where it is set."""
        for name in field_names(type(self)):
            require_number("keep", name, getattr(self, name))
        if not 0.0 < self.mass <= 1.0:
            raise ValueError(f"keep: mass is {self.mass}; expected a share above 0, up to 1, of the attention")
        if not 0.0 <= self.at_least <= 1.0:
            raise ValueError(f"keep: at_least is {self.at_least}; expected 0 to 1 (fraction of the image tokens)")
        if not 0.0 < self.at_most <= 1.0:
            raise ValueError(f"keep: at_most is {self.at_most}; expected above 0, up to 1 (fraction of the tokens)")
        if self.at_least > self.at_most:
            raise ValueError(
                f"keep: at_least={self.at_least} is more than at_most={self.at_most}; the bounds are upside down"
            )

    def least(self, image: Tensor) -> Tensor:
        """The fewest that stay of `image` tokens; long, of the same shape."""
        return keep_from_ratio(self.at_least, image).clamp(min=1)

    def most(self, image: Tensor) -> Tensor:
        """The most that stay of `image` tokens; long, of the same shape."""
        return keep_from_ratio(self.at_most, image)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a stage; bounds that bind nothing are left out."""
        bound = {f.name: value for f in fields(self) if (value := float(getattr(self, f.name))) != f.default}
        return {"keep": bound}

    @classmethod
    def from_dict(cls, given: Any, where: str) -> Mass:
        """The inverse of `to_dict`; `where` names it in messages.

        Raises:
            ValueError: Not a mapping, an unknown or a missing key.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} is {given!r}; expected a mapping such as {{mass: 0.9}}")
        check_keys(where, given, field_names(cls), needed=("mass",))
        return cls(**given)


Keep = Ratio | Count | Mass
AttentionMass = Mass
"""Its public name until 0.1."""


def keep_from_ratio(ratio: float, image_tokens: Tensor) -> Tensor:
    """`round_half_up(ratio * image_tokens)`, at least 1 unless the ratio is 0. Long, of the shape of `image_tokens`."""
    # To nine decimals first: 0.145 * 100 is a little below 14.5 in binary.
    rounded = torch.floor((image_tokens.double() * ratio).round(decimals=9) + 0.5).long()
    return rounded.clamp(min=1) if ratio > 0 else rounded
