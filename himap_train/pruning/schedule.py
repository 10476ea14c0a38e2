"""What to remove where: stages and schedules.

A stage at layer `l` (0-based) removes image tokens at the input of layer `l`, ranked by the attention of layer `l - 1`.
The HiMAP paper (CVPR 2025, section 4) counts what is *removed* of the *survivors* (K1=2, R1=50 %, K2=8, R2=75 %); here
`keep_ratio` is what is *kept* of the *original* image tokens (0.5, then 0.125).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from himap_train.pruning.cost import Cost

CRITERIA = ("instruction", "image", "image_debiased", "last_token", "random", "uniform")
POSITIONS = ("keep", "renumber")
PRESET_LAYERS = 32
"""Decoder layers of LLaVA-1.5-7B, for which the published layers were chosen."""


@dataclass(frozen=True)
class PruningStage:
    """One removal of image tokens.

    Args:
        layer: Decoder layer (0-based) at whose input the tokens leave; 1 or more, since layer `layer - 1` ranks them.
        criterion: What ranks the tokens, one of `CRITERIA`.
        keep_ratio: Fraction in [0, 1] kept of the image tokens that the row had originally; rounded half up, at least
            one token unless it is 0.
        keep_count: Number of image tokens kept instead of a ratio.

    Raises:
        ValueError: On a value outside these ranges, or if not exactly one of ratio and count is given.
    """

    layer: int
    criterion: str
    keep_ratio: float | None = None
    keep_count: int | None = None

    def __post_init__(self) -> None:
        """Check every field where it is set."""
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(
                f"stage layer is {self.layer!r}; expected an integer of 1 or more (the layer before ranks the tokens)"
            )
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion {self.criterion!r} is unknown{nearest(self.criterion, CRITERIA)}")
        if (self.keep_ratio is None) == (self.keep_count is None):
            raise ValueError(
                f"stage at layer {self.layer} has keep_ratio={self.keep_ratio} and keep_count={self.keep_count}; "
                "give exactly one of them"
            )
        if self.keep_ratio is not None and not 0.0 <= self.keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio is {self.keep_ratio} at layer {self.layer}; expected 0 to 1 (fraction kept)")
        if self.keep_count is not None and (not isinstance(self.keep_count, int) or self.keep_count < 0):
            raise ValueError(
                f"keep_count is {self.keep_count!r} at layer {self.layer}; expected an integer of 0 or more"
            )

    @property
    def needs_attention(self) -> bool:
        """Whether ranking reads attention: not for rules without scores, nor where every image token leaves."""
        return self.criterion not in ("random", "uniform") and self.keep_ratio != 0 and self.keep_count != 0

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML and JSON types; fields that are not set are left out."""
        fields = {"layer": self.layer, "criterion": self.criterion}
        optional = {"keep_ratio": self.keep_ratio, "keep_count": self.keep_count}
        return fields | {key: value for key, value in optional.items() if value is not None}


@dataclass(frozen=True)
class PruningSchedule:
    """All removals of one forward pass. Without stages the decoder is dense.

    Args:
        stages: In order of depth; the fraction kept never grows.
        positions: "keep" leaves survivors their original position numbers (HiMAP, FastV, VTW); "renumber" closes the
            gaps after each removal (PyramidDrop).

    Raises:
        ValueError: If layers are out of order, ratios or counts grow, or `positions` is unknown.
    """

    stages: tuple[PruningStage, ...] = ()
    positions: str = "keep"

    def __post_init__(self) -> None:
        """Check what one stage alone cannot know."""
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}{nearest(str(self.positions), POSITIONS)}")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.layer <= before.layer:
                raise ValueError(
                    f"stage at layer {after.layer} follows the one at layer {before.layer}; list stages by rising layer"
                )
            for field in ("keep_ratio", "keep_count"):
                first, second = getattr(before, field), getattr(after, field)
                if first is not None and second is not None and second > first:
                    raise ValueError(
                        f"{field} grows from {first} at layer {before.layer} to {second} at layer {after.layer}; "
                        "both are counted against the original image tokens, so a later one cannot be larger"
                    )

    @classmethod
    def from_preset(cls, name: str) -> PruningSchedule:
        """The schedule that a method publishes for a 32-layer LLaVA; see `himap_train.pruning.presets`.

        Raises:
            ValueError: If there is no such preset; the message names the nearest.
        """
        from himap_train.pruning.presets import PRESETS

        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown{nearest(name, tuple(PRESETS))}")
        return PRESETS[name]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PruningSchedule:
        """The inverse of `to_dict`; `{"preset": name}` is understood too.

        Raises:
            ValueError: On an unknown key (the nearest valid one is named) or a wrong value.
        """
        if set(fields) == {"preset"}:
            return cls.from_preset(fields["preset"])
        _check_keys("schedule", fields, ("stages", "positions"))
        stages = []
        for number, stage in enumerate(fields.get("stages") or ()):
            if not isinstance(stage, Mapping):
                raise ValueError(f"stages[{number}] is {stage!r}; expected a mapping with layer, criterion, keep_ratio")
            _check_keys(f"stages[{number}]", stage, ("layer", "criterion", "keep_ratio", "keep_count"))
            for key in ("layer", "criterion"):
                if key not in stage:
                    raise ValueError(f"stages[{number}] has no {key!r}; found {sorted(stage)}")
            stages.append(PruningStage(**stage))
        return cls(stages=tuple(stages), positions=fields.get("positions", "keep"))

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML and JSON types."""
        return {"stages": [stage.to_dict() for stage in self.stages], "positions": self.positions}

    def validate_for(self, num_layers: int) -> None:
        """Check the stages against a decoder.

        Raises:
            ValueError: If a stage lies at or behind the last layer.
        """
        for stage in self.stages:
            if stage.layer >= num_layers:
                raise ValueError(
                    f"stage at layer {stage.layer}, but the decoder has layers 0 to {num_layers - 1}; choose a smaller "
                    f"layer, or scale the schedule with schedule.scaled_to({num_layers})"
                )

    def scaled_to(self, num_layers: int, reference_layers: int = PRESET_LAYERS) -> PruningSchedule:
        """The same schedule at the same relative depth of another decoder; layers stay distinct and at least 1.

        Raises:
            ValueError: If the decoder has too few layers for the stages.
        """
        stages: list[PruningStage] = []
        for stage in self.stages:
            lowest = stages[-1].layer + 1 if stages else 1
            layer = max(lowest, int(stage.layer * num_layers / reference_layers + 0.5))
            stages.append(PruningStage(layer, stage.criterion, stage.keep_ratio, stage.keep_count))
        scaled = PruningSchedule(tuple(stages), self.positions)
        scaled.validate_for(num_layers)
        return scaled

    def cost(self, config: Any, image_tokens: int = 576, text_tokens: int = 115) -> Cost:
        """Prefill cost on a model of this `config` (of a LLaVA or a text decoder); see `himap_train.pruning.cost`."""
        from himap_train.pruning.cost import schedule_cost

        return schedule_cost(self, config, image_tokens=image_tokens, text_tokens=text_tokens)

    def at_budget(
        self, config: Any, flops_ratio: float, image_tokens: int = 576, text_tokens: int = 115
    ) -> PruningSchedule:
        """The same layers and criteria with ratios that meet a budget; see `himap_train.pruning.budget`."""
        from himap_train.pruning.budget import at_budget

        return at_budget(self, config, flops_ratio, image_tokens=image_tokens, text_tokens=text_tokens)


def nearest(name: str, valid: tuple[str, ...]) -> str:
    """The tail of an error message: the nearest valid name, and all of them."""
    close = difflib.get_close_matches(str(name), valid, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" valid: {', '.join(valid)}"


def _check_keys(where: str, fields: Mapping[str, Any], valid: tuple[str, ...]) -> None:
    for key in fields:
        if key not in valid:
            raise ValueError(f"{where} has the unknown key {key!r}{nearest(str(key), valid)}")
