"""What to remove where: stages and schedules.

A stage at layer `l` (0-based) removes image tokens at the input of layer `l`, ranked by the attention of layer `l - 1`.
The HiMAP paper (CVPR 2025, section 4) counts what is *removed* of the *survivors* (K1=2, R1=50 %, K2=8, R2=75 %); here
`keep_ratio` is what is *kept* of the *original* image tokens (0.5, then 0.125).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from himap_train.pruning.stage import CRITERIA, AttentionMass, PruningStage, check_keys, nearest

if TYPE_CHECKING:
    from himap_train.pruning.cost import Cost

__all__ = ["CRITERIA", "POSITIONS", "AttentionMass", "PruningSchedule", "PruningStage", "nearest"]

POSITIONS = ("keep", "renumber")
PRESET_LAYERS = 32
"""Decoder layers of LLaVA-1.5-7B, for which the published layers were chosen."""


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
            for first, second, unit in (
                (before.keep_count, after.keep_count, "tokens"),
                (before.most, _wanted(after), "of the original tokens"),
            ):
                if first is not None and second is not None and second > first:
                    raise ValueError(
                        f"the stage at layer {after.layer} keeps {second} {unit} after at most {first} at layer "
                        f"{before.layer}; both are counted against the original image tokens, so a later one cannot be "
                        "larger"
                    )

    @property
    def by_mass(self) -> bool:
        """Whether a stage keeps by attention mass, so that the number of tokens and the cost follow each sample."""
        return any(stage.keep is not None for stage in self.stages)

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
    def from_dict(cls, given: Mapping[str, Any]) -> PruningSchedule:
        """The inverse of `to_dict`; `{"preset": name}` is understood too.

        Raises:
            ValueError: On an unknown key (the nearest valid one is named) or a wrong value.
        """
        if set(given) == {"preset"}:
            return cls.from_preset(given["preset"])
        check_keys("schedule", given, cls)
        stages = enumerate(given.get("stages") or ())
        return cls(
            stages=tuple(PruningStage.from_dict(stage, where=f"stages[{number}]") for number, stage in stages),
            positions=given.get("positions", "keep"),
        )

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
            stages.append(replace(stage, layer=layer))
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


def _wanted(stage: PruningStage) -> float | None:
    """The fraction that must not exceed what the stage before leaves; an `at_most` of 1 binds nothing."""
    return stage.keep.at_least if stage.keep is not None and stage.keep.at_most == 1 else stage.most
