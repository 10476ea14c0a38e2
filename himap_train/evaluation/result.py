"""What an evaluation hands back: answers, scores, and the tokens that the samples had and kept, with what that cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from himap_train.evaluation.sample_metric import GroupScore
from himap_train.pruning.cost import Cost, schedule_cost
from himap_train.pruning.schedule import PruningSchedule


@dataclass(frozen=True)
class SampleTokens:
    """Tokens of one prompt that was run: image tokens, all others, and image tokens left after each stage."""

    image: int
    text: int
    kept: tuple[int, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Mean and standard deviation of a figure over samples."""

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Mean and spread of at least one value."""
        return cls(statistics.fmean(values), statistics.pstdev(values))


@dataclass(frozen=True)
class MeasuredTokens:
    """Tokens and prefill cost of the samples, by what each of them kept.

    Attributes:
        image_tokens: Mean number of image tokens of a sample.
        text_tokens: Mean number of its other prompt tokens.
        kept: Mean number of image tokens after each stage; empty when dense.
        kept_sd: Its standard deviation over samples, which have numbers of their own where a stage keeps by attention
            mass or images differ in size.
        flops_ratio: Ratio of the whole prefill; None where no sample has an image.
        image_only_flops_ratio: The paper's, image tokens alone; None where no sample has an image.
        image_tokens_per_layer: Image tokens of a sample averaged over layers, as papers count them; None where no
            sample has an image.
    """

    image_tokens: float
    text_tokens: float
    kept: tuple[float, ...]
    kept_sd: tuple[float, ...]
    flops_ratio: Measured | None
    image_only_flops_ratio: Measured | None
    image_tokens_per_layer: Measured | None


def measured_tokens(samples: Sequence[SampleTokens], schedule: PruningSchedule, config: Any) -> MeasuredTokens:
    """Means and spreads over samples; of the ratios over those with images.

    Args:
        samples: At least one.
        schedule: That they ran under.
        config: Hugging Face configuration of the model.
    """

    @cache
    def cost(sample: SampleTokens) -> Cost:
        return schedule_cost(schedule, config, sample.image, sample.text, kept=sample.kept)

    costs = [cost(sample) for sample in samples if sample.image]  # text alone has nothing to save
    stages = [Measured.of(counts) for counts in zip(*(sample.kept for sample in samples), strict=True)]
    return MeasuredTokens(
        image_tokens=statistics.fmean(sample.image for sample in samples),
        text_tokens=statistics.fmean(sample.text for sample in samples),
        kept=tuple(stage.mean for stage in stages),
        kept_sd=tuple(stage.sd for stage in stages),
        flops_ratio=Measured.of([one.flops_ratio for one in costs]) if costs else None,
        image_only_flops_ratio=Measured.of([one.image_only_flops_ratio for one in costs]) if costs else None,
        image_tokens_per_layer=(
            Measured.of([statistics.fmean(cost(one).image_tokens_per_layer) for one in samples]) if costs else None
        ),
    )


def report(samples: Sequence[SampleTokens], schedule: PruningSchedule, config: Any) -> str:
    """What a published score needs beside it: tokens and cost, measured on the prompts with images, and the schedule.

    Args:
        samples: Prompts that were run.
        schedule: That they ran under.
        config: Hugging Face configuration of the model.
    """
    shown = [sample for sample in samples if sample.image]
    text = f"{len(samples)} prompts, {len(samples) - len(shown)} without an image; schedule {schedule.to_dict()}"
    if not shown:
        return text
    found: Any = measured_tokens(shown, schedule, config)
    counts = " -> ".join(f"{count:.1f}" for count in (found.image_tokens, *found.kept))
    return (
        f"{text}; image tokens {counts}, {found.image_tokens_per_layer.mean:.1f} averaged over layers; others "
        f"{found.text_tokens:.1f}; flops_ratio {found.flops_ratio.mean:.3f}, of image tokens alone "
        f"{found.image_only_flops_ratio.mean:.3f}"
    )


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
