"""Learned keep ratios: the loss decides at which layers image tokens leave, the budget how many.

Three parts of a run. The budget falls from dense to its target over `warmup` of the steps; until `until` the ratios
learn together with LoRA; then they are frozen to a plain schedule with few stages, to which LoRA adapts in the rest.
What learns is `KeepRatios` in `himap_train.pruning.learned`, what gives it a gradient `marginal` there, what runs it
step by step `himap_train.training.callbacks.learn_ratios`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from himap_train.pruning.keep import Count
from himap_train.pruning.learned.ratios import KeepRatios
from himap_train.pruning.methods.base import Method
from himap_train.pruning.reading import fitted_schedule
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.schedules.requirements import require_positive, require_share


@dataclass(frozen=True)
class Learnable:
    """Learn the keep ratio of every layer, instead of a `model.schedule`, which must be null.

    Args:
        budget: `flops_ratio` of the whole prefill, text included, that is met in the end.
        first_layer: First layer at whose input tokens may leave.
        switch_layer: From this layer on `deep` ranks, before it `shallow`; null: where the criterion of `start`
            changes, without a start at a quarter of the depth.
        shallow: Criterion of the shallow layers; null: that of the first stage of `start`, without one "instruction".
        deep: Criterion of the deep layers; null: that of the last stage of `start`, without one "image".
        warmup: Share of the optimizer steps over which the budget falls from 1.
        until: Share of the steps after which the ratios are frozen.
        step_size: How far the log shares move in a step.
        start: Where the shares start, and by what tokens rank: a schedule as for `model.schedule`, such as one of
            search_schedule.py; null: all layers alike, and HiMAP's criteria. Stages before `first_layer` are not
            learned, but stay, and a ranking of theirs learns beside: with `divprune` or `learned` at layer 0 the loss
            decides where what that leaves goes.
        tolerance: Neighbouring layers whose ratios differ by less share a stage when they are frozen.
    """

    budget: float
    first_layer: int = 2
    switch_layer: int | None = None
    shallow: str | None = None
    deep: str | None = None
    warmup: float = 0.2
    until: float = 0.6
    step_size: float = 0.05
    start: str | dict[str, Any] | None = None
    tolerance: float = 0.03

    def check(self, schedule: PruningSchedule) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            ValueError: Naming the key, what was found and what is valid.
        """
        key = "pruning.learnable"
        if schedule.stages:
            fixed = " with a fixed count" if any(isinstance(stage.keep, Count) for stage in schedule.stages) else ""
            raise ValueError(
                f"{key}.budget and model.schedule{fixed} both say how many tokens stay; set model.schedule to null, "
                f"and the criteria in {key}.shallow and {key}.deep"
            )
        require_share(f"{key}.warmup", self.warmup)
        require_share(f"{key}.until", self.until)
        if not self.warmup < self.until:
            raise ValueError(
                f"{key}.until is {self.until} and {key}.warmup {self.warmup}: nothing is left to learn at the budget; "
                "give an `until` above `warmup`"
            )
        require_positive(f"{key}.step_size", self.step_size)
        require_share(f"{key}.tolerance", self.tolerance)

    def _start(self, layers: int) -> PruningSchedule | None:
        return None if self.start is None else fitted_schedule(self.start, layers)

    def given(self, layers: int) -> PruningSchedule:
        """What stands before the first layer that learns, in a decoder of so many layers."""
        return (self._start(layers) or PruningSchedule()).before(self.first_layer)

    def check_possible(self, schedule: PruningSchedule, config: Any, tokens: tuple[int, int]) -> None:
        """Refuse layers that a decoder does not have and a budget that it cannot meet; as `ratios`, before training."""
        self.ratios(config, tokens)

    def ratios(self, config: Any, tokens: tuple[int, int]) -> KeepRatios:
        """What learns, for a model of this config and a typical sample of so many image and text tokens.

        Raises:
            ValueError: A layer outside the decoder, an unknown criterion, or a budget that cannot be met.
        """
        layers = config.text_config.num_hidden_layers
        start = self._start(layers)
        try:
            ranks = self._switch_and_criteria(start, layers)
            return KeepRatios(config, self.budget, self.first_layer, *ranks, *tokens, self.step_size, start)
        except ValueError as error:
            raise ValueError(
                f"pruning.learnable: {error} (for a sample of {tokens[0]} image and {tokens[1]} text tokens)"
            ) from error

    def _switch_and_criteria(
        self, start: PruningSchedule | None, layers: int
    ) -> tuple[int, str | Method, str | Method]:
        """What is given; for the rest what ranks in `start`, or in HiMAP."""
        shallow: str | Method
        deep: str | Method
        learned = [] if start is None else [stage for stage in start.stages if stage.layer >= self.first_layer]
        if not learned:
            switch, shallow, deep = max(self.first_layer, layers // 4), "instruction", "image"
        else:
            found = [stage.method for stage in learned]
            changes = [after.layer for before, after in pairwise(learned) if after.method != before.method]
            if len(changes) > 1 and None in (self.switch_layer, self.shallow, self.deep):
                raise ValueError(
                    f"start ranks by {', '.join(map(str, found))} in turn; what is learned ranks by one criterion "
                    "before a layer and by one from there on: give switch_layer, shallow and deep, or another start"
                )
            switch, shallow, deep = changes[0] if changes else self.first_layer, found[0], found[-1]
        given = self.switch_layer
        return switch if given is None else given, self.shallow or shallow, self.deep or deep
