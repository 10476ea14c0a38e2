"""What an evaluation hands back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from himap_train.evaluation.sample_metric import GroupScore
from himap_train.evaluation.token_counts import MeasuredTokens


@dataclass(frozen=True)
class Prediction:
    """One answer, as it is written to predictions.jsonl; `score` is NaN where one alone has none (captions)."""

    index: int
    id: str
    type: str
    prompt: str
    prediction: str
    answers: list[str]
    score: float


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(MeasuredTokens):
    """What an evaluation found, beside the tokens of its samples and what they cost.

    Attributes:
        metric: Name of the first metric, which gives `overall`, `types` and the predictions' scores.
        overall: Mean score, standard error (clustered by scene or image) and number of samples.
        types: The same for each question type.
        figures: All figures of all metrics.
        seconds: Wall time.
        predictions: Every answer, in the order of the source.
        skipped: Records that could not be used, and why.
    """

    metric: str
    overall: GroupScore
    types: dict[str, GroupScore]
    figures: dict[str, float]
    seconds: float
    predictions: list[Prediction] = field(repr=False)
    skipped: list[str] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The overall mean score."""
        return self.overall.score

    @property
    def standard_error(self) -> float:
        """Standard error of `score`."""
        return self.overall.standard_error

    def to_dict(self) -> dict[str, Any]:
        """JSON types, without the predictions."""
        return {name: value for name, value in asdict(self).items() if name != "predictions"}
