"""Which schedules are searched, each of them at the budget.

A point of the space is n layers and n - 1 splits in [0, 1]: what a stage keeps of what the stage before it kept. The
first ratio is not searched: `schedule.at_budget` bends the shape (1, s1, s1 s2, ...) until it meets the budget, which
reaches every falling sequence of ratios that does. So all candidates cost the same and only their loss is compared.
Degenerate shapes are inside: equal layers or a split of 1 give fewer stages, a split of 0 removes every image token.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from himap_train.pruning.budget import check_budget
from himap_train.pruning.cost import image_tokens_per_layer
from himap_train.pruning.methods import read_method
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

TOLERANCE = 0.01
"""How far a candidate's `flops_ratio` may be from the budget, relative to it; counts are whole tokens."""


@dataclass(frozen=True)
class Point:
    """One candidate before it is brought to the budget.

    Attributes:
        layers: Those of the stages, in any order.
        splits: One fewer; in [0, 1].
        criteria: One a stage, by depth.
    """

    layers: tuple[int, ...]
    splits: tuple[float, ...]
    criteria: tuple[str, ...]


class Space:
    """Schedules of one decoder that meet one budget.

    Args:
        config: Configuration of the model, as in `schedule.cost`.
        budget: The `flops_ratio` of the sample below.
        image_tokens: Image tokens of a sample.
        text_tokens: Its other tokens.
        stages: Most removals.
        criteria: One a stage, by depth; with `free_criteria` any of them at each stage. None: `instruction` at the
            first, `image` at the others, as HiMAP has it. Where one of them reads nothing of the layer before, stages
            before the decoder (layer 0) are searched too.
        free_criteria: Search the criteria too.
        ranked: Layers at which the model has a learned ranking, the only ones where that can choose.

    Raises:
        ValueError: Unknown criterion or wrong number of them, more stages than the decoder has places for, or a budget
            that it cannot meet.
    """

    def __init__(
        self,
        config: Any,
        budget: float,
        image_tokens: int,
        text_tokens: int,
        stages: int = 2,
        criteria: Sequence[str] | None = None,
        free_criteria: bool = False,
        ranked: Collection[int] = (),
    ) -> None:
        self.config, self.ranked = config, ranked
        self.budget, self.tokens = budget, {"image_tokens": image_tokens, "text_tokens": text_tokens}
        self.num_layers: int = getattr(config, "text_config", config).num_hidden_layers
        if not 1 <= stages < self.num_layers:
            raise ValueError(
                f"{stages} stages in a decoder of {self.num_layers} layers; give 1 to {self.num_layers - 1} (a stage "
                "takes tokens away before a layer, and the layer before it ranks them)"
            )
        self.stages, self.free_criteria = stages, free_criteria
        self._known: dict[PruningSchedule, PruningSchedule | None] = {}  # methods propose the same again and again
        self.criteria = tuple(criteria or ("instruction", *["image"] * (stages - 1)))
        _check_criteria(self.criteria, stages, free_criteria)
        if not ranked and any(read_method(name).learns for name in self.criteria):
            raise ValueError("this checkpoint has no learned ranking; leave the criterion learned out of --criteria")
        self.earliest = 1 if all(_reads_before(criterion) for criterion in self.criteria) else 0
        check_budget(budget, self.least(self.earliest), first_layer=self.earliest)
        if budget == 1.0:
            raise ValueError("the budget 1.0 is dense: there is nothing to search; give less")
        self.deepest_first = max(
            layer for layer in range(self.earliest, self.num_layers) if self.least(layer) <= budget
        )

    def point(self, layers: Sequence[int], splits: Sequence[float], criteria: Sequence[str] | None = None) -> Point:
        """A point; where criteria are free and none are given, each stage has the first that can choose there."""
        if not criteria and self.free_criteria:
            fits = [[one for one in self.criteria if self._chooses_at(at, one)] for at in sorted(layers)]
            criteria = [(fitting or self.criteria)[0] for fitting in fits]
        return Point(tuple(layers), tuple(splits), tuple(criteria or self.criteria))

    def _chooses_at(self, layer: int, criterion: str) -> bool:
        return not (layer == 0 and _reads_before(criterion)) and (
            layer in self.ranked or not read_method(criterion).learns
        )

    def schedule(self, point: Point) -> PruningSchedule | None:
        """The schedule at the budget, ratios to four digits, stages that remove nothing left out.

        Returns:
            None where the first layer is too deep for the budget, a criterion has nothing there that it could read or
            rank by, or whole tokens miss the budget by more than `TOLERANCE`.
        """
        if not all(itertools.starmap(self._chooses_at, zip(sorted(point.layers), point.criteria, strict=True))):
            return None
        shape = _shape(point)
        if shape not in self._known:
            self._known[shape] = self._at_budget(shape)
        return self._known[shape]

    def _at_budget(self, shape: PruningSchedule) -> PruningSchedule | None:
        if shape.stages[0].layer > self.deepest_first:
            return None
        found = self._whole_tokens(shape.at_budget(self.config, self.budget, **self.tokens))
        return found if self.meets_budget(found) else None

    def meets_budget(self, schedule: PruningSchedule) -> bool:
        """Whether `flops_ratio` is within `TOLERANCE` of the budget."""
        return abs(self.flops_ratio(schedule) - self.budget) <= TOLERANCE * self.budget

    def flops_ratio(self, schedule: PruningSchedule) -> float:
        """Ratio of the sample that the space is for."""
        return schedule.cost(self.config, **self.tokens).flops_ratio

    def layer_counts(self, schedule: PruningSchedule) -> tuple[int, ...]:
        """Image tokens that each layer runs on."""
        return image_tokens_per_layer(schedule, self.num_layers, self.tokens["image_tokens"])

    def least(self, first_layer: int) -> float:
        """Ratio where no image token is left from this layer on."""
        nothing = PruningSchedule((PruningStage(first_layer, "instruction", 0.0),))
        return self.flops_ratio(nothing)

    def _whole_tokens(self, schedule: PruningSchedule) -> PruningSchedule:
        """Ratios that stand for whole tokens of the sample, so that equal schedules are equal objects."""
        counts, before = self.layer_counts(schedule), self.tokens["image_tokens"]
        stages: list[PruningStage] = []
        for stage in schedule.stages:
            left = counts[stage.layer]
            if left < before:
                stages.append(stage.keeping(round(left / self.tokens["image_tokens"], 4)))
            before = left
        return replace(schedule, stages=tuple(stages))


def _reads_before(criterion: str) -> bool:
    """Whether it needs a layer before the stage."""
    return PruningStage(1, criterion, 0.5).reads_before


def _shape(point: Point) -> PruningSchedule:
    """Ratios 1, s1, s1 s2, ... at the layers by depth; of equal layers the last ratio and criterion count."""
    ratio, by_layer = 1.0, {}
    for number, layer in enumerate(sorted(point.layers)):
        ratio *= point.splits[number - 1] if number else 1.0
        by_layer[layer] = PruningStage(layer, point.criteria[number], ratio)
    return PruningSchedule(tuple(by_layer.values()))


def _check_criteria(criteria: tuple[str, ...], stages: int, free: bool) -> None:
    for criterion in criteria:
        read_method(criterion)
    if not free and len(criteria) != stages:
        raise ValueError(
            f"{len(criteria)} criteria ({', '.join(criteria)}) for {stages} stages; give one a stage by depth, or "
            "--free-criteria to let the search choose among them at each stage"
        )
