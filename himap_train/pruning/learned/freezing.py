"""Learned keep ratios, one a layer, as a plain schedule with few stages that meets the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from himap_train.pruning.budget import at_strength, nearest, one_at_least
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

_FINEST, _OFF = 1e-4, 0.005
"""A tolerance below which all layers differ, and how far above its target a frozen schedule may be: a few tokens."""


def frozen_schedule(
    given: PruningSchedule,
    learned: Sequence[PruningStage],
    config: Any,
    target: float,
    sample: tuple[int, int],
    tolerance: float,
) -> PruningSchedule:
    """A plain schedule with few stages.

    Args:
        given: Stages that stay as they are, in front.
        learned: One at each layer behind them; their ratios never grow.
        config: As in `schedule.cost`.
        target: `flops_ratio` that it must have.
        sample: Image tokens and others of the sample that this is of.
        tolerance: Neighbouring layers whose ratios differ by less than this fraction of the original image tokens run
            on the same tokens, their mean; the whole is then scaled to the target again. Where so few leave that the
            target cannot be met so (a stage that is given may leave little to remove), a smaller one.
    """
    while True:
        stages = _levels(learned, share_left(given), sample[0], tolerance)
        at = partial(_scaled, given, PruningSchedule(tuple(stages)), sample[0])
        found = nearest(at, config, target, *sample)
        if tolerance <= _FINEST or found.cost(config, *sample).flops_ratio <= target + _OFF:
            return found
        tolerance /= 2


def share_left(schedule: PruningSchedule) -> float:
    """Share of the image tokens that is left behind all stages, whose ratios are known."""
    return (schedule.stages[-1].keep_ratio or 0.0) if schedule.stages else 1.0


def _levels(
    learned: Sequence[PruningStage], entering: float, image_tokens: int, tolerance: float
) -> list[PruningStage]:
    """A stage where a run of like ratios begins; less than half a token is none."""
    runs: list[list[float]] = [[entering]]
    begun: list[PruningStage] = []
    for stage in learned:
        ratio = stage.keep_ratio or 0.0
        if runs[-1][0] - ratio > tolerance:
            runs.append([])
            begun.append(stage)
        runs[-1].append(ratio)
    means = [sum(run) / len(run) for run in runs[1:]]
    return [
        PruningStage(stage.layer, stage.method, 0.0 if mean * image_tokens < 0.5 else mean)
        for stage, mean in zip(begun, means, strict=True)
    ]


def _scaled(given: PruningSchedule, learned: PruningSchedule, image_tokens: int, strength: float) -> PruningSchedule:
    """What is learned at a strength, behind what is given, without stages that would remove no whole token."""
    stages, whole = list(given.stages), torch.tensor(image_tokens)
    left = int(stages[-1].most(whole)) if stages else image_tokens
    for scaled in at_strength(learned, strength).stages:
        stage = one_at_least(scaled, image_tokens)
        if (count := int(stage.most(whole))) < left:
            stages.append(stage)
            left = count
    return replace(given, stages=tuple(stages))
