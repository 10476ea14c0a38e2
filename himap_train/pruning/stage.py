"""One removal of image tokens: at which layer, ranked by what, and how many stay.

How many is a fraction, a number, or as many as hold a share of the attention: then a sample whose attention lies on few
image tokens keeps few and costs less, and one that looks everywhere keeps more.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

CRITERIA = ("instruction", "image", "image_debiased", "last_token", "random", "uniform")


@dataclass(frozen=True)
class AttentionMass:
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
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"keep: {field.name} is {value!r}; expected a number")
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

    def to_dict(self) -> dict[str, float]:
        """Plain YAML and JSON types; bounds that bind nothing are left out."""
        return {f.name: value for f in fields(self) if (value := float(getattr(self, f.name))) != f.default}


@dataclass(frozen=True)
class PruningStage:
    """One removal of image tokens.

    Args:
        layer: Decoder layer (0-based) at whose input the tokens leave; 1 or more, since layer `layer - 1` ranks them.
        criterion: What ranks the tokens, one of `CRITERIA`.
        keep_ratio: Fraction in [0, 1] kept of the image tokens that the row had originally; rounded half up, at least
            one token unless it is 0.
        keep_count: Number of image tokens kept instead of a ratio.
        keep: Share of the attention to keep instead: the number of tokens then follows each sample.

    Raises:
        ValueError: On a value outside these ranges, if not exactly one of the three is given, or if `keep` stands with
            a criterion that reads no attention.
    """

    layer: int
    criterion: str
    keep_ratio: float | None = None
    keep_count: int | None = None
    keep: AttentionMass | None = None

    def __post_init__(self) -> None:
        """Check every field where it is set."""
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(
                f"stage layer is {self.layer!r}; expected an integer of 1 or more (the layer before ranks the tokens)"
            )
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion {self.criterion!r} is unknown{nearest(self.criterion, CRITERIA)}")
        if sum(size is not None for size in (self.keep_ratio, self.keep_count, self.keep)) != 1:
            raise ValueError(
                f"stage at layer {self.layer} has keep_ratio={self.keep_ratio}, keep_count={self.keep_count} and "
                f"keep={self.keep}; give exactly one of them"
            )
        if self.keep_ratio is not None and not 0.0 <= self.keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio is {self.keep_ratio} at layer {self.layer}; expected 0 to 1 (fraction kept)")
        if self.keep_count is not None and (not isinstance(self.keep_count, int) or self.keep_count < 0):
            raise ValueError(
                f"keep_count is {self.keep_count!r} at layer {self.layer}; expected an integer of 0 or more"
            )
        if self.keep is not None and not isinstance(self.keep, AttentionMass):
            raise ValueError(f"keep is {self.keep!r} at layer {self.layer}; expected AttentionMass(mass)")
        if self.keep is not None and not self.needs_attention:
            raise ValueError(
                f"criterion {self.criterion!r} at layer {self.layer} reads no attention, so there is no mass to keep; "
                "give keep_ratio, or a criterion that does: instruction, image, image_debiased, last_token"
            )

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], where: str = "stage") -> PruningStage:
        """The inverse of `to_dict`; `where` names the stage in messages.

        Raises:
            ValueError: On an unknown key (the nearest valid one is named), a missing one or a wrong value.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} is {given!r}; expected a mapping with layer, criterion, keep_ratio")
        check_keys(where, given, cls, needed=("layer", "criterion"))
        keep = given.get("keep")
        if keep is None:
            return cls(**given)
        if not isinstance(keep, Mapping):
            raise ValueError(f"{where}.keep is {keep!r}; expected a mapping such as {{mass: 0.9}}")
        check_keys(f"{where}.keep", keep, AttentionMass, needed=("mass",))
        return cls(**{**given, "keep": AttentionMass(**keep)})

    @property
    def most(self) -> float | None:
        """Largest fraction of the original image tokens that may stay; None where a count is given."""
        return self.keep_ratio if self.keep is None else self.keep.at_most

    @property
    def needs_attention(self) -> bool:
        """Whether ranking reads attention: not for rules without scores, nor where every image token leaves."""
        return self.criterion not in ("random", "uniform") and self.keep_ratio != 0 and self.keep_count != 0

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML and JSON types; fields that are not set are left out."""
        fields = {"layer": self.layer, "criterion": self.criterion}
        keep = None if self.keep is None else self.keep.to_dict()
        optional = {"keep_ratio": self.keep_ratio, "keep_count": self.keep_count, "keep": keep}
        return fields | {key: value for key, value in optional.items() if value is not None}


def nearest(name: str, valid: tuple[str, ...]) -> str:
    """The tail of an error message: the nearest valid name, and all of them."""
    close = difflib.get_close_matches(str(name), valid, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" valid: {', '.join(valid)}"


def check_keys(where: str, given: Mapping[str, Any], of: type[Any], needed: tuple[str, ...] = ()) -> None:
    """Refuse keys that are no fields of a dataclass (the nearest is named), and missing ones that are `needed`.

    Raises:
        ValueError: Naming the key and `where` it is.
    """
    valid = tuple(field.name for field in fields(of))
    for key in given:
        if key not in valid:
            raise ValueError(f"{where} has the unknown key {key!r}{nearest(str(key), valid)}")
    for key in needed:
        if key not in given:
            raise ValueError(f"{where} has no {key!r}; found {sorted(given)}")
