"""The schedule at a budget (`flops_ratio`) for the samples at hand: one checkpoint, run at the cost that is wanted."""

from __future__ import annotations

from typing import Any

from torch import nn

from himap_train.checkpoints.load import AS_SAVED, installed_schedule
from himap_train.data.check import spread_over
from himap_train.data.encode import Encoder
from himap_train.data.records import RecordError, Source
from himap_train.evaluation.questions import source_length
from himap_train.models.families.base import AspectRatio
from himap_train.models.install import change_schedule
from himap_train.models.stock import base_model
from himap_train.pruning.reading import ScheduleArgument, read_schedule

SAMPLES = 256
"""Records of which those with images tell the mean length that a budget is for."""


def require_budget(key: str, budget: float) -> None:
    """Raise ValueError unless `budget` is a share of the dense FLOPs."""
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"{key} is {budget}; expected a flops_ratio above 0 and at most 1 (dense)")


def check_budget_argument(budget: float | None, schedule: ScheduleArgument) -> None:
    """Refuse a `--budget` that cannot be, before anything is loaded.

    Raises:
        ValueError: It is no share, or goes with a dense schedule.
    """
    if budget is None:
        return
    require_budget("--budget", budget)
    if schedule != AS_SAVED and not read_schedule(schedule).stages:
        raise ValueError(
            f"--budget {budget} with --schedule none: a dense schedule has no layers to remove tokens at; leave one of "
            "the two out, or name the layers with --schedule himap"
        )


def run_at_budget(model: nn.Module, budget: float, image_tokens: int, text_tokens: int) -> None:
    """Let a model run its schedule at a budget.

    Args:
        model: With a schedule installed.
        budget: `flops_ratio` of the prefill.
        image_tokens: Image tokens of the sample that the budget is for.
        text_tokens: Its other tokens.

    Raises:
        ValueError: The schedule is dense or has fixed counts, or the budget is below the least possible.
    """
    require_stages(model, budget)
    schedule = installed_schedule(model)
    change_schedule(model, schedule.at_budget(base_model(model).config, budget, image_tokens, text_tokens))


def require_stages(model: nn.Module, budget: float) -> None:
    """Raise ValueError unless the installed schedule has layers to meet a budget at."""
    if not installed_schedule(model).stages:
        raise ValueError(
            f"--budget {budget}: this checkpoint was saved without a schedule, so there are no layers to remove tokens "
            "at; name them with --schedule, such as --schedule himap"
        )


def prompt_tokens(
    source: Source,
    processor: Any,
    image_aspect_ratio: AspectRatio | None = None,
    limit: int | None = None,
) -> tuple[int, int]:
    """Image tokens and other tokens of a prompt with images on average, over `SAMPLES` records spread over the source.

    Args:
        source: Conversations.
        processor: Processor of the model.
        image_aspect_ratio: As in `evaluate`.
        limit: Only the first so many records.

    Raises:
        ValueError: None of them can be used, or none has an image.
    """
    encoder = Encoder(processor, None, image_aspect_ratio)
    image = text = count = 0
    for index in spread_over(source, source_length(source, limit), SAMPLES):
        try:
            images, others = encoder.prompt_tokens(source[int(index)])
        except RecordError:
            continue  # the evaluation reports it
        if images:
            image, text, count = image + images, text + others, count + 1
    if not count:
        raise ValueError(
            "a budget is a share of what samples with images cost, and none of the usable records that were looked at "
            "has an image; leave the budget out for this data"
        )
    return round(image / count), round(text / count)
