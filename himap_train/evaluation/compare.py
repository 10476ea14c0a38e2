"""One model on one data set under several schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from himap_train.checkpoints.load import installed_schedule
from himap_train.data.records import Source
from himap_train.evaluation.evaluate import evaluate
from himap_train.evaluation.result import EvaluationResult
from himap_train.models.install import install_pruning, pruning_of, put_back, remove_pruning
from himap_train.models.stock import base_model
from himap_train.pruning.cost import Cost
from himap_train.pruning.schedule import PruningSchedule


@dataclass(frozen=True)
class Row:
    """One line of a table: a name, what was measured, and what the schedule costs a sample of mean length.

    That cost is None for data without images, and an upper bound where a stage keeps by attention mass; `result` has
    the measured one.
    """

    name: str
    result: EvaluationResult
    cost: Cost | None
    schedule: PruningSchedule = PruningSchedule()

    def to_dict(self) -> dict[str, Any]:
        """JSON types, without the predictions."""
        return {
            "name": self.name,
            "schedule": self.schedule.to_dict(),
            **{name: value for name, value in asdict(self.result).items() if name != "predictions"},
            "cost": asdict(self.cost) if self.cost else None,
        }


def evaluate_row(name: str, model: nn.Module, processor: Any, source: Source, **settings: Any) -> Row:
    """`evaluate`, whose arguments these are, under the schedule that is installed, with the cost of a sample of mean
    length.
    """
    result = evaluate(model, processor, source, **settings)
    schedule = installed_schedule(model)
    cost = None
    if result.image_tokens:
        tokens = {"image_tokens": round(result.image_tokens), "text_tokens": round(result.text_tokens)}
        cost = schedule.cost(base_model(model).config, **tokens)
    return Row(name, result, cost, schedule)


def compare(
    model: nn.Module,
    processor: Any,
    source: Source,
    schedules: Mapping[str, PruningSchedule | None],
    **settings: Any,
) -> list[Row]:
    """A row for each named schedule (None is the stock model); afterwards the model has the schedule that it had.

    All other arguments are those of `evaluate`.
    """
    before = pruning_of(model)
    rows = []
    try:
        for name, schedule in schedules.items():
            remove_pruning(model) if schedule is None else install_pruning(model, schedule)
            rows.append(evaluate_row(name, model, processor, source, **settings))
    finally:
        put_back(model, before)
    return rows
