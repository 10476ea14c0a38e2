"""One removal of image tokens: at which layer, by which method, and how many stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from himap_train.pruning.keep import Count, Keep, Mass, Ratio
from himap_train.pruning.methods import METHODS, Method, read_method
from himap_train.pruning.methods.base import Reads, Widths
from himap_train.pruning.methods.instruction import Instruction
from himap_train.pruning.names import check_keys, require_number

LOOKS = Instruction()
"""What says how much of its attention the text gives the image, to a stage that waits."""
_LONGEST = 256
_KEYS = ("layer", "criterion", "keep_ratio", "keep_count", "keep", "attention_below")


@dataclass(frozen=True, init=False)
class PruningStage:
    """One removal of image tokens.

    Args:
        layer: Decoder layer (0-based) at whose input the tokens leave. A method that reads attention needs 1 or more,
            since layer `layer - 1` ranks the tokens; at 0 they leave before the decoder.
        criterion: What chooses the tokens: a method, its name, or a mapping with its name and parameters.
        keep_ratio: Fraction in [0, 1] kept of the image tokens that the row had originally; rounded half up, at least
            one token unless it is 0.
        keep_count: Number of image tokens kept instead of a ratio.
        keep: Any of `Ratio`, `Count` and `Mass` instead; with `Mass` the number of tokens follows each sample.
        attention_below: Act only on rows (and turns) whose text gives the image tokens that are left less than this
            share, in (0, 1], of its attention in the layer before: a sign that it has read them. The mean over the
            rows that `instruction` ranks by. None: act on all.
        method: In place of `criterion`, as `dataclasses.replace` hands it on.

    Attributes:
        layer: As given.
        method: What chooses the tokens.
        keep: How many stay.
        attention_below: As given.

    Raises:
        ValueError: On a value outside these ranges, an unknown method, if not exactly one of the three that say how
            many stay is given, or if the number or the layer does not go with the method.
    """

    layer: int
    method: Method
    keep: Keep
    attention_below: float | None

    def __init__(
        self,
        layer: int,
        criterion: str | Mapping[str, Any] | Method | None = None,
        keep_ratio: float | None = None,
        keep_count: int | None = None,
        keep: Keep | None = None,
        attention_below: float | None = None,
        *,
        method: Method | None = None,
    ) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"stage layer is {layer!r}; expected an integer of 0 or more")
        object.__setattr__(self, "layer", layer)
        given = method if criterion is None else criterion
        if given is None:
            raise ValueError(f"the stage at layer {layer} has no criterion; valid: {', '.join(METHODS)}")
        object.__setattr__(self, "method", read_method(given))
        object.__setattr__(self, "keep", _one_of(layer, keep_ratio, keep_count, keep))
        object.__setattr__(self, "attention_below", attention_below)
        self._check_waiting()
        if layer == 0 and self.reads_before:
            raise ValueError(
                f"the stage at layer 0 is before the decoder, where criterion {self.criterion!r}, which reads "
                f"{self.method.reads.value}, has nothing to read; give a layer of 1 or more, or a criterion that reads "
                f"neither attention nor keys: {', '.join(_without_attention())}"
            )
        attention = self.method.reads is Reads.ATTENTION
        if isinstance(self.keep, Mass) and not (attention and self.method.ranks):
            ranking = [name for name, method in METHODS.items() if method.reads is Reads.ATTENTION]
            why = "chooses by more than its scores" if attention else "reads no attention"
            raise ValueError(
                f"criterion {self.criterion!r} at layer {layer} {why}, so there is no mass to keep; "
                f"give keep_ratio, or a criterion that does: {', '.join(ranking)}"
            )

    def _check_waiting(self) -> None:
        if self.attention_below is None:
            return
        require_number("stage", "attention_below", self.attention_below)
        if not 0.0 < self.attention_below <= 1.0 or self.layer == 0 or isinstance(self.keep, Mass):
            raise ValueError(
                f"attention_below is {self.attention_below} for the stage at layer {self.layer} with {self.keep}; "
                "expected a share above 0, up to 1, at a layer of 1 or more, with keep_ratio or keep_count"
            )

    @classmethod
    def each_from_dict(cls, given: Any, where: str = "stage") -> list[PruningStage]:
        """One stage; where its layer is `{first: 2, last: 8, attention_below: 0.3}` one at each of these, of which all
        but the last wait: a row is reduced at the first layer where it has read its image, or else at the last.

        Raises:
            ValueError: As `from_dict`, or for a range that is none.
        """
        layers = given.get("layer") if isinstance(given, Mapping) else None
        if not isinstance(layers, Mapping):
            return [cls.from_dict(given, where)]
        keys = ("first", "last", "attention_below")
        check_keys(f"{where}.layer", layers, keys, needed=keys)
        first, last, below = (layers[key] for key in keys)
        if below is None or not (type(first) is type(last) is int and 0 < last - first < _LONGEST):
            raise ValueError(f"{where}.layer is {layers!r}; expected two layers by rising depth, and a share")
        stages = [{**given, "layer": layer, "attention_below": below} for layer in range(first, last)]
        return [cls.from_dict(stage, where) for stage in (*stages, {**given, "layer": last})]

    @classmethod
    def from_dict(cls, given: Any, where: str = "stage") -> PruningStage:
        """The inverse of `to_dict`; `where` names the stage in messages.

        Raises:
            ValueError: On an unknown key (the nearest valid one is named), a missing one or a wrong value.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} is {given!r}; expected a mapping with layer, criterion, keep_ratio")
        check_keys(where, given, _KEYS, needed=("layer", "criterion"))
        keep = given.get("keep")
        return cls(**{**given, "keep": None if keep is None else Mass.from_dict(keep, f"{where}.keep")})

    def at(self, layer: int) -> PruningStage:
        """The same at another layer."""
        return PruningStage(layer, self.method, keep=self.keep, attention_below=self.attention_below)

    def keeping(self, ratio: float) -> PruningStage:
        """The same with another keep ratio."""
        return PruningStage(self.layer, self.method, keep_ratio=ratio)

    @property
    def criterion(self) -> str:
        """What chooses the tokens, as a schedule names it."""
        return str(self.method)

    @property
    def keep_ratio(self) -> float | None:
        """Fraction kept of the original image tokens; None where another rule says how many."""
        return self.keep.ratio if isinstance(self.keep, Ratio) else None

    @property
    def keep_count(self) -> int | None:
        """Number of image tokens kept; None where another rule says how many."""
        return self.keep.count if isinstance(self.keep, Count) else None

    @property
    def removes_all(self) -> bool:
        """Whether no image token stays, so that nothing is chosen."""
        return self.keep in (Ratio(0.0), Count(0))

    @property
    def reads_before(self) -> bool:
        """Whether the attention or keys of the layer before are needed: to wait, or to choose, but not where every
        image token leaves.
        """
        return self.waits or self.ranks_before

    @property
    def ranks_before(self) -> bool:
        """Whether they are needed to choose."""
        return self.method.reads in (Reads.ATTENTION, Reads.KEYS) and not self.removes_all

    @property
    def waits(self) -> bool:
        """Whether it leaves rows that have not read their image as they are."""
        return self.attention_below is not None

    def most(self, image: Tensor) -> Tensor:
        """The most that stay of `image` tokens; long, of the same shape."""
        return image if self.waits else self.keep.most(image)

    def flops(self, widths: Widths, image_tokens: int, text_tokens: int, kept: int) -> float:
        """FLOPs of choosing, and of knowing whether to wait, of one sample; arguments as in `Method.flops`."""
        choosing = 0.0 if self.removes_all else self.method.flops(widths, image_tokens, text_tokens, kept)
        return choosing + (LOOKS.flops(widths, image_tokens, text_tokens, kept) if self.waits else 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML and JSON types; `attention_below` only where it waits."""
        waiting = {"attention_below": self.attention_below} if self.waits else {}
        return {"layer": self.layer, "criterion": self.method.to_dict(), **self.keep.to_dict(), **waiting}


def _one_of(layer: int, keep_ratio: float | None, keep_count: int | None, keep: Keep | None) -> Keep:
    if sum(size is not None for size in (keep_ratio, keep_count, keep)) != 1:
        raise ValueError(
            f"stage at layer {layer} has keep_ratio={keep_ratio}, keep_count={keep_count} and keep={keep}; "
            "give exactly one of them"
        )
    if keep is not None and not isinstance(keep, Keep):
        raise ValueError(f"keep is {keep!r} at layer {layer}; expected Ratio(0.5), Count(72) or Mass(0.9)")
    try:
        return keep or (Count(keep_count) if keep_ratio is None else Ratio(keep_ratio))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{error}, at layer {layer}") from error


def _without_attention() -> list[str]:
    return [name for name, method in METHODS.items() if method.reads not in (Reads.ATTENTION, Reads.KEYS)]
