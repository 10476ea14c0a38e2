"""The rows of a run's table: what is measured before and after training, and at which budgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from himap_train.checkpoints.run_facts import ADAPTED, RUN_DENSE
from himap_train.data.module import LlavaDataModule
from himap_train.evaluation.budgeted import prompt_tokens, require_budget
from himap_train.evaluation.compare import Row, compare
from himap_train.models.loading import load_config, resolve_model
from himap_train.pruning.reading import fitted_schedule
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.callbacks.accuracy import EvaluationSettings
from himap_train.training.module import LlavaFineTuner
from himap_train.training.schedules.requirements import require_ratios

Schedules = dict[str, PruningSchedule | None]


@dataclass(frozen=True)
class MeasuredRows:
    """What a run measures around its training.

    Attributes:
        tuner: The model, loaded only for `measure`.
        data: The data of the run, set up.
        settings: What is measured, and how.
        learns_ratios: The schedule is one that training finds: before it there is none.
    """

    tuner: LlavaFineTuner
    data: LlavaDataModule
    settings: EvaluationSettings
    learns_ratios: bool = False

    def before(self) -> Schedules:
        """Names and schedules of what is measured before training."""
        if self.learns_ratios and not self.settings.schedule:
            return {"dense, not fine-tuned": None}
        name, schedule = "training-free pruned", self.schedule()
        return {"dense, not fine-tuned": None, name: schedule, **self._at_budgets(name, schedule)}

    def after(self) -> Schedules:
        """Names and schedules of what is measured after training."""
        schedule = self.schedule()
        if not self.tuner.schedule.dense:
            name, rows = ADAPTED, {ADAPTED: schedule, RUN_DENSE: None}
        else:
            name = "fine-tuned dense, then pruned"
            rows = {"fine-tuned dense": None, name: schedule}
        return {**rows, **self._at_budgets(name, schedule)}

    def measure(self, schedules: Schedules, trainer: Trainer) -> Iterator[Row]:
        """A row of the table for each schedule, as it is measured, in the trainer's precision."""
        found = self._source()
        if found is None:
            return
        source, limit = found
        settings = self.settings.for_data(self.data, limit)
        for name, schedule in schedules.items():
            if schedule is not None and schedule.dense:
                continue
            with trainer.precision_plugin.forward_context():
                rows = compare(self.tuner.peft_model, self.tuner.processor, source, {name: schedule}, **settings)
            yield from rows

    def shown(self) -> tuple[Any, PruningSchedule, dict[str, Any]]:
        """What a report takes samples of (where nothing is measured, the training data), under which schedule, how."""
        source, _ = self._source() or (self.data.source("train"), None)
        settings = self.settings.for_data(self.data, None)
        wanted = ("max_new_tokens", "image_aspect_ratio", "image_background")
        return source, self.schedule(), {name: settings[name] for name in wanted}

    def check_budgets(self) -> None:
        """Refuse budgets that cannot be met.

        Raises:
            ValueError: Naming the key, the budget and the least possible one.
        """
        if not self.settings.budgets:
            return
        schedule = self.schedule()
        require_ratios("evaluation.budgets", schedule)
        for budget in self.settings.budgets:
            require_budget("evaluation.budgets", budget)
        try:
            self._at_budgets("", schedule)
        except ValueError as error:
            raise ValueError(f"evaluation.budgets: {error}") from error

    def schedule(self) -> PruningSchedule:
        """The schedule of the pruned rows."""
        layers = model_config(self.tuner).text_config.num_hidden_layers
        given = self.settings.schedule
        return fitted_schedule(given, layers) if given else self.tuner.fitted_schedule(layers)

    def _at_budgets(self, name: str, schedule: PruningSchedule) -> Schedules:
        """A row for each of `evaluation.budgets`, for the mean prompt of the data that is measured."""
        found = self._source()
        if not self.settings.budgets or found is None:
            return {}
        source, limit = found
        tokens = prompt_tokens(source, self.data.processor, self.data.image_aspect_ratio, limit)
        config = model_config(self.tuner)
        return {f"{name} at {budget}": schedule.at_budget(config, budget, *tokens) for budget in self.settings.budgets}

    def _source(self) -> tuple[Any, int | None] | None:
        """The test data, or the validation data where there is none, and how many of its records are used."""
        split = next((split for split in ("test", "validation") if self.data.source(split) is not None), None)
        if split is None:
            return None
        limits = [limit for limit in (self.settings.limit, self.data.limits[split]) if limit is not None]
        return self.data.source(split), min(limits, default=None)


def model_config(tuner: LlavaFineTuner) -> Any:
    """The model's LlavaConfig, before and after it is loaded."""
    return load_config(resolve_model(tuner.path)) if tuner.llava is None else tuner.llava.config
