"""The group `pruning:` of a config: how the schedule changes while a model is trained under it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from himap_train.models.foresight import learned_layers
from himap_train.pruning.reading import read_schedule
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.schedules.curriculum import Curriculum, CurriculumSteps
from himap_train.training.schedules.dense_steps import DenseStepPlan, DenseSteps
from himap_train.training.schedules.elastic import Elastic, ElasticSteps
from himap_train.training.schedules.learn_ranking import RankingSettings
from himap_train.training.schedules.learnable import Learnable
from himap_train.training.schedules.per_step import StepPlan

MODES = ("learnable", "elastic", "curriculum", "dense_steps")
"""Modes, of which a run has one at most."""


@dataclass(frozen=True)
class PruningSettings:
    """How the schedule changes during training; `model.schedule` is what is saved and evaluated.

    Args:
        learnable: Keep ratios that the loss decides, under a budget; null for those of `model.schedule`.
        elastic: Another budget in every step, for one checkpoint that serves all of them; null for one schedule.
        curriculum: From dense, or through other schedules, to the schedule over the first part of training; null for
            the schedule from the start.
        dense_steps: Some steps dense, taught by the pruned model, for one that is served dense; null for none.
        learn_ranking: How stages whose criterion is `learned` (of `model.schedule`, or of `learnable.start` before its
            `first_layer`) learn, where not by the defaults.
        image_tokens: Image tokens of the prompt that budgets are for; null for the training data's mean.
        text_tokens: Its other tokens, without the last answer, which no prefill has; null for the training data's mean.
    """

    learnable: Learnable | None = None
    elastic: Elastic | None = None
    curriculum: Curriculum | None = None
    dense_steps: DenseSteps | None = None
    learn_ranking: RankingSettings | None = None
    image_tokens: int | None = None
    text_tokens: int | None = None

    def check(self, schedule: PruningSchedule) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            ValueError: Naming the key, what was found and what is valid.
        """
        given = [name for name in MODES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"pruning.{' and pruning.'.join(given)} both decide what each step keeps; set all but one to null"
            )
        if (self.image_tokens is None) != (self.text_tokens is None):
            raise ValueError(
                f"pruning.image_tokens is {self.image_tokens} and pruning.text_tokens {self.text_tokens}; give both, "
                "or neither for the means of the training data"
            )
        for key, value in (("image_tokens", self.image_tokens), ("text_tokens", self.text_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"pruning.{key} is {value}; expected 1 or more tokens")
        for name in given:
            getattr(self, name).check(schedule)
        if self.learn_ranking is not None:
            self.learn_ranking.check(self._ranking(schedule))

    def ranking(self, schedule: PruningSchedule) -> RankingSettings | None:
        """How the ranking learns, where the schedule has a stage that ranks by it."""
        return (self.learn_ranking or RankingSettings()) if learned_layers(self._ranking(schedule)) else None

    def _ranking(self, schedule: PruningSchedule) -> PruningSchedule:
        """What may have a ranking that learns: where keep ratios are learned, what they start from."""
        start = self.learnable and self.learnable.start
        return read_schedule(start) if start else schedule

    def tokens(self, measured: tuple[int, int] | None) -> tuple[int, int]:
        """Image and text tokens of the sample that budgets are for.

        Raises:
            ValueError: They are not given, and nobody could measure them.
        """
        if self.image_tokens is not None and self.text_tokens is not None:
            return self.image_tokens, self.text_tokens
        if measured is None:
            raise ValueError(
                "a budget needs to know how long a typical sample is, which nobody has measured; set "
                "pruning.image_tokens and pruning.text_tokens"
            )
        return measured

    def check_possible(self, schedule: PruningSchedule, config: Any, measured: tuple[int, int] | None) -> None:
        """Raise ValueError for budgets that a model of this config cannot meet with its schedule."""
        settings = self.learnable or self.elastic
        if settings is not None:
            settings.check_possible(schedule, config, self.tokens(measured))

    def plan(
        self, schedule: PruningSchedule, config: Any, seed: int, total: int, tokens: tuple[int, int] | None
    ) -> StepPlan:
        """What each optimizer step runs.

        Args:
            schedule: The model's own.
            config: Configuration of the model.
            seed: Seed of the run.
            total: Optimizer steps of the run.
            tokens: Image and text tokens of a typical sample, measured; for elastic training.
        """
        if self.elastic is not None:
            return ElasticSteps(self.elastic, schedule, config, seed, self.tokens(tokens))
        if self.dense_steps is not None:
            return DenseStepPlan(self.dense_steps, schedule, seed)
        assert self.curriculum is not None
        layers = getattr(config, "text_config", config).num_hidden_layers
        return CurriculumSteps(self.curriculum, schedule, total, layers)


def setting_names(group: type = PruningSettings, prefix: str = "pruning") -> Iterator[str]:
    """All keys of the group, those of its modes too: a parser knows them only once a mode is given."""
    hints = get_type_hints(group)
    for entry in fields(group):
        yield f"{prefix}.{entry.name}"
        for kind in get_args(hints[entry.name]):
            if is_dataclass(kind) and isinstance(kind, type):
                yield from setting_names(kind, f"{prefix}.{entry.name}")
