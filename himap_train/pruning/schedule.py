"""What to remove where: stages and schedules.

A stage at layer `l` (0-based) removes image tokens at the input of layer `l`, ranked by the attention of layer `l - 1`
where its method reads attention. The HiMAP paper (CVPR 2025, section 4) counts what is *removed* of the *survivors*
(K1=2, R1=50 %, K2=8, R2=75 %); here `keep_ratio` is what is *kept* of the *original* image tokens (0.5, then 0.125).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from himap_train.pruning.budget import at_budget
from himap_train.pruning.cost import Cost, schedule_cost
from himap_train.pruning.keep import Mass
from himap_train.pruning.methods.base import Reads
from himap_train.pruning.names import check_keys, field_names, nearest
from himap_train.pruning.presets import PRESETS
from himap_train.pruning.stage import PruningStage
from himap_train.structured import check_shape

POSITIONS = ("keep", "renumber")
_SHAPE = {"preset?": str, "stages?": list}  # the rest is looked at where it is used
PRESET_LAYERS = 32
"""Decoder layers of LLaVA-1.5-7B, for which the published layers were chosen."""


@dataclass(frozen=True)
class PruningSchedule:
    """All removals of one forward pass. Without stages the decoder is dense.

    Args:
        stages: In order of depth; the fraction kept never grows.
        positions: "keep" leaves survivors their original position numbers (HiMAP, FastV, VTW); "renumber" closes the
            gaps after each removal (PyramidDrop).
        enter: Image tokens are absent before this layer and then come in as the projector made them (late injection,
            HiDrop, arXiv 2602.23699); the text keeps the positions that it has beside them. 0: they are there from the
            start.

    Raises:
        ValueError: If layers are out of order, ratios or counts grow, `positions` is unknown, or `enter` lies behind a
            stage, or does not go with a stage's method or with renumbering.
    """

    stages: tuple[PruningStage, ...] = ()
    positions: str = "keep"
    enter: int = 0

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
            _check_falling(before, after)
        self._check_enter()

    def _check_enter(self) -> None:
        if isinstance(self.enter, bool) or not isinstance(self.enter, int) or self.enter < 0:
            raise ValueError(f"enter is {self.enter!r}; expected a layer, or 0 for image tokens from the start")
        if not self.enter:
            return
        if self.positions != "keep":
            raise ValueError(
                f"enter is {self.enter} with positions {self.positions!r}; image tokens that come in late have their "
                "places kept: give positions 'keep'"
            )
        for stage in self.stages:
            if stage.layer < self.enter:
                raise ValueError(
                    f"enter is {self.enter}, behind the stage at layer {stage.layer}, which would find no image "
                    f"tokens; give stages from layer {self.enter} on"
                )
            if stage.layer == self.enter and stage.reads_before:
                raise ValueError(
                    f"the stage at layer {stage.layer} reads {stage.method.reads.value}, in which there are no image "
                    f"tokens yet (enter is {self.enter}); give a layer of {self.enter + 1} or more"
                )

    @property
    def dense(self) -> bool:
        """Whether the decoder runs as it is."""
        return not self.stages and not self.enter

    @property
    def uses_places(self) -> bool:
        """Whether a stage's method looks at where tokens lie in their pictures."""
        return any(stage.method.uses_places and not stage.removes_all for stage in self.stages)

    @property
    def uses_tower(self) -> bool:
        """Whether a stage's method reads what the vision tower looks at."""
        return any(stage.method.reads is Reads.TOWER and not stage.removes_all for stage in self.stages)

    @property
    def by_sample(self) -> bool:
        """Whether a stage keeps by attention mass, or waits: the number of tokens and the cost follow each sample."""
        return any(isinstance(stage.keep, Mass) or stage.waits for stage in self.stages)

    @classmethod
    def from_preset(cls, name: str) -> PruningSchedule:
        """The schedule that a method publishes for a 32-layer LLaVA; see `himap_train.pruning.presets`.

        Raises:
            ValueError: If there is no such preset; the message names the nearest.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown{nearest(name, tuple(PRESETS))}")
        return cls.from_dict(PRESETS[name])

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> PruningSchedule:
        """The inverse of `to_dict`; `{"preset": name}` is understood too.

        Raises:
            ValueError: On an unknown key (the nearest valid one is named) or a wrong value.
        """
        check_shape(given, _SHAPE, "schedule")
        if set(given) == {"preset"}:
            return cls.from_preset(given["preset"])
        check_keys("schedule", given, field_names(cls))
        places = enumerate(given.get("stages") or ())
        stages = [PruningStage.each_from_dict(stage, where=f"stages[{number}]") for number, stage in places]
        return cls(
            stages=tuple(chain(*stages)),
            positions=given.get("positions", "keep"),
            enter=given.get("enter", 0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML and JSON types; `enter` only where it is not 0."""
        entering = {"enter": self.enter} if self.enter else {}
        return {"stages": [stage.to_dict() for stage in self.stages], "positions": self.positions, **entering}

    def validate_for(self, num_layers: int) -> None:
        """Check the stages against a decoder.

        Raises:
            ValueError: If a stage or `enter` lies at or behind the last layer.
        """
        places = [("stage at", stage.layer) for stage in self.stages] + [("image tokens enter at", self.enter)]
        for what, layer in places:
            if layer >= num_layers:
                raise ValueError(
                    f"{what} layer {layer}, but the decoder has layers 0 to {num_layers - 1}; choose a smaller "
                    f"layer, or scale the schedule with schedule.scaled_to({num_layers})"
                )

    def before(self, layer: int) -> PruningSchedule:
        """The same with the stages before a layer alone."""
        return replace(self, stages=tuple(stage for stage in self.stages if stage.layer < layer))

    def scaled_to(self, num_layers: int, reference_layers: int = PRESET_LAYERS) -> PruningSchedule:
        """The same schedule at the same relative depth of another decoder.

        Layers stay distinct, and those of 1 or more at least 1. On a decoder with too few layers for the stages, and
        where stages wait, those that would stand at one layer become the last of them.

        Raises:
            ValueError: If the decoder has no layer for the last stage.
        """

        def scaled_layer(layer: int) -> int:
            found = max(min(layer, 1), int(layer * num_layers / reference_layers + 0.5))
            return min(found, num_layers - 1) if layer < reference_layers else found  # rounding must not lead out

        behind = any(stage.layer > self.enter for stage in self.stages)
        enter = min(scaled_layer(self.enter), max(num_layers - 1 - behind, 0))
        stages, one_each = list[PruningStage](), dict[int, PruningStage]()
        for stage in self.stages:
            earliest, wish = enter + (stage.layer > self.enter), scaled_layer(stage.layer)
            one_each[max(earliest, wish)] = stage.at(max(earliest, wish))
            stages.append(stage.at(max(earliest, wish, stages[-1].layer + 1 if stages else 0)))
        if stages and (stages[-1].layer >= num_layers or any(stage.waits for stage in stages)):
            stages = list(one_each.values())
        scaled = replace(self, stages=tuple(stages), enter=enter)
        scaled.validate_for(num_layers)
        return scaled

    def cost(self, config: Any, image_tokens: int = 576, text_tokens: int = 115) -> Cost:
        """Prefill cost on a model of this `config` (of a LLaVA or a text decoder); see `himap_train.pruning.cost`."""
        return schedule_cost(self, config, image_tokens=image_tokens, text_tokens=text_tokens)

    def at_budget(
        self, config: Any, flops_ratio: float, image_tokens: int = 576, text_tokens: int = 115
    ) -> PruningSchedule:
        """The same layers and criteria with ratios that meet a budget; see `himap_train.pruning.budget`."""
        return at_budget(self, config, flops_ratio, image_tokens=image_tokens, text_tokens=text_tokens)


def _check_falling(before: PruningStage, after: PruningStage) -> None:
    """Refuse a stage that is to keep more than the one before it leaves."""
    for first, second, unit in (
        (before.keep_count, after.keep_count, "tokens"),
        (_most(before), _wanted(after), "of the original tokens"),
    ):
        if first is not None and second is not None and second > first:
            raise ValueError(
                f"the stage at layer {after.layer} keeps {second} {unit} after at most {first} at layer "
                f"{before.layer}; both are counted against the original image tokens, so a later one cannot be larger"
            )


def _most(stage: PruningStage) -> float | None:
    """The largest fraction of the original tokens that may stay; None where a count is given."""
    return stage.keep.at_most if isinstance(stage.keep, Mass) else stage.keep_ratio


def _wanted(stage: PruningStage) -> float | None:
    """The fraction that must not exceed what the stage before leaves; an `at_most` of 1 binds nothing."""
    return stage.keep.at_least if isinstance(stage.keep, Mass) and stage.keep.at_most == 1 else _most(stage)
