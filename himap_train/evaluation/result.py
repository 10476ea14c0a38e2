"""What an evaluation hands back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from himap_train.evaluation.sample_metric import GroupScore
from himap_train.evaluation.token_counts import Measured


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


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        metric: Name of the first metric, which gives `overall`, `types` and the predictions' scores.
        overall: Mean score, standard error (clustered by scene or image) and number of samples.
        types: The same for each question type.
        figures: All figures of all metrics.
        image_tokens: Mean number of image tokens of a sample.
        text_tokens: Mean number of its other prompt tokens.
        kept: Mean number of image tokens after each stage; empty when dense.
        kept_sd: Its standard deviation over samples, which have numbers of their own where a stage keeps by attention
            mass or images differ in size.
        flops_ratio: Ratio of the whole prefill, from what each sample kept; None where no sample has an image.
        image_only_flops_ratio: The same of image tokens alone.
        seconds: Wall time.
        predictions: Every answer, in the order of the source.
        skipped: Records that could not be used, and why.
        image_tokens_per_layer: Image tokens of a sample averaged over layers, as papers count them; None where no
            sample has an image.
    """

    metric: str
    overall: GroupScore
    types: dict[str, GroupScore]
    figures: dict[str, float]
    image_tokens: float
    text_tokens: float
    kept: tuple[float, ...]
    kept_sd: tuple[float, ...]
    flops_ratio: Measured | None
    image_only_flops_ratio: Measured | None
    seconds: float
    predictions: list[Prediction] = field(repr=False)
    skipped: list[str] = field(default_factory=list)
    image_tokens_per_layer: Measured | None = None

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
