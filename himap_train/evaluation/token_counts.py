"""How many tokens the samples of an evaluation had and kept, and what that cost: means and spreads over samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

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
        image: Image tokens of a sample.
        text: Its other prompt tokens.
        kept: Image tokens after each stage; empty when dense.
        image_per_layer: Image tokens that a layer runs on, averaged over all layers.
        flops_ratio: Ratio of the whole prefill; None where no sample has an image.
        image_only_flops_ratio: The paper's, image tokens alone; None where no sample has an image.
        per_layer: Image tokens averaged over layers; None where no sample has an image.
    """

    image: Measured
    text: Measured
    kept: tuple[Measured, ...]
    image_per_layer: Measured
    flops_ratio: Measured | None
    image_only_flops_ratio: Measured | None
    per_layer: Measured | None


def measured_tokens(samples: Sequence[SampleTokens], schedule: PruningSchedule, config: Any) -> MeasuredTokens:
    """Means and spreads over samples.

    Args:
        samples: At least one.
        schedule: That they ran under.
        config: Hugging Face configuration of the model.
    """

    @cache
    def cost(sample: SampleTokens) -> Cost:
        return schedule_cost(schedule, config, sample.image, sample.text, kept=sample.kept)

    costs = [cost(sample) for sample in samples] if any(sample.image for sample in samples) else []
    per_layer = [statistics.fmean(one.image_tokens_per_layer) for one in costs] or [0.0]
    return MeasuredTokens(
        image=Measured.of([sample.image for sample in samples]),
        text=Measured.of([sample.text for sample in samples]),
        kept=tuple(Measured.of(counts) for counts in zip(*(sample.kept for sample in samples), strict=True)),
        image_per_layer=Measured.of(per_layer),
        flops_ratio=Measured.of([one.flops_ratio for one in costs]) if costs else None,
        image_only_flops_ratio=Measured.of([one.image_only_flops_ratio for one in costs]) if costs else None,
        per_layer=Measured.of([statistics.fmean(one.image_tokens_per_layer) for one in costs]) if costs else None,
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
    found = measured_tokens(shown, schedule, config) if shown else None
    if found is None or found.flops_ratio is None or found.image_only_flops_ratio is None:
        return text
    counts = " -> ".join(f"{count.mean:.1f}" for count in (found.image, *found.kept))
    return (
        f"{text}; image tokens {counts}, {found.image_per_layer.mean:.1f} averaged over layers; others "
        f"{found.text.mean:.1f}; flops_ratio {found.flops_ratio.mean:.3f}, of image tokens alone "
        f"{found.image_only_flops_ratio.mean:.3f}"
    )
