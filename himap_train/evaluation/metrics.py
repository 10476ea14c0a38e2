"""The metrics by name. A new one is a small SampleMetric and a line here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from himap_train.evaluation.captions import CIDEr
from himap_train.evaluation.choice import CircularChoice, MultipleChoice, StrictChoice
from himap_train.evaluation.sample_metric import SampleMetric
from himap_train.evaluation.text import ANLS, GQA, ExactMatch, RelaxedAccuracy
from himap_train.evaluation.vqa import TextVQAAccuracy, VQAAccuracy
from himap_train.evaluation.yes_no import MME, POPE


class Unscored(SampleMetric):
    """Answers that are only written down, for a judge or a server: no score."""

    name = "none"
    reads_answers = False

    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """No number."""
        return (math.nan,)


METRICS: dict[str, type[SampleMetric]] = {
    metric.name: metric
    for metric in (
        ExactMatch,
        GQA,
        VQAAccuracy,
        TextVQAAccuracy,
        POPE,
        MME,
        RelaxedAccuracy,
        ANLS,
        MultipleChoice,
        StrictChoice,
        CircularChoice,
        CIDEr,
        Unscored,
    )
}


def make_metrics(names: Sequence[str]) -> list[SampleMetric]:
    """New metrics, in the order of the names; the first gives an evaluation its score.

    Raises:
        ValueError: no name, or one that does not exist.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(
            f"unknown metric {unknown}; choose from {', '.join(METRICS)}" if unknown else "name at least one metric"
        )
    return [METRICS[name]() for name in names]
