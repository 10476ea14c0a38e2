"""Accuracy of generated answers during training, pruned and dense."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, Trainer

from himap_train.data.module import LlavaDataModule
from himap_train.evaluation.compare import compare
from himap_train.pruning.schedule import PruningSchedule
from himap_train.ranges import require_possible

_SHOWN = 3
"""Answers that are printed at each validation."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How answers are generated and scored, during training and around it.

    Args:
        before: Evaluate before training too (dense, and pruned without training).
        after: Evaluate after training (pruned, and dense).
        schedule: Preset, mapping or `pruning.yaml` of the pruned rows, where it is not the one that is trained under.
        budgets: Further rows: the schedule of the pruned rows at each of these `flops_ratio`s, for the mean prompt.
        limit: Evaluate on the first records only.
        during: Validation records answered at each validation; 0 for none.
        batch_size: Questions in a batch.
        max_new_tokens: Where an answer is cut.
        metrics: Names of metrics; the first gives the score.
    """

    before: bool = True
    after: bool = True
    schedule: str | dict[str, Any] | None = None
    budgets: list[float] = field(default_factory=list)
    limit: int | None = None
    during: int = 64
    batch_size: int = 32
    max_new_tokens: int = 16
    metrics: list[str] = field(default_factory=lambda: ["exact"])

    def __post_init__(self) -> None:
        """Raise ValueError for a number that cannot be."""
        require_possible({f"evaluation.{name}": value for name, value in vars(self).items()})

    def for_data(self, data: LlavaDataModule, limit: int | None) -> dict[str, Any]:
        """Keyword arguments of `evaluate`."""
        return {
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "metrics": self.metrics,
            "limit": limit,
            "image_aspect_ratio": data.image_aspect_ratio,
            "image_background": data.image_background,
            "max_skipped": data.max_skipped,
            "num_workers": data.num_workers,
        }


class GenerationAccuracy(Callback):
    """Logs `val/accuracy` (under the schedule) and `val/accuracy_dense` at each validation, and prints some answers."""

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Answer the first records of the validation data; on several devices each answers a share."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        source = data.source("validation")
        if trainer.sanity_checking or source is None:
            return
        schedules: dict[str, PruningSchedule | None] = {"val/accuracy": pl_module.schedule}
        if not pl_module.schedule.dense:
            schedules["val/accuracy_dense"] = None
        limit = min(self.settings.during, data.limits["validation"] or self.settings.during)
        with trainer.precision_plugin.forward_context():
            rows = compare(
                pl_module.peft_model,
                pl_module.processor,
                source,
                schedules,
                progress=False,
                **self.settings.for_data(data, limit),
            )
        for row in rows:
            pl_module.log(row.name, row.result.overall.score, prog_bar=True)
        for shown in rows[0].result.predictions[:_SHOWN]:
            question, answers = shown.prompt.split("\n")[-1], " | ".join(dict.fromkeys(shown.answers))
            pl_module.print(f"  {question:.80} -> {shown.prediction!r:.80} (expected {answers!r:.80})")
