"""The schedules of HiMAP's form at a budget, as a paper's grid search would try them."""

from __future__ import annotations

from typing import Any

from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

SHAPES = [(deep, share) for deep in (3, 4, 5) for share in (0.25, 0.5)] + [(4, 0.0), (5, 0.0)]
"""Layer of the second stage, and what it keeps of the first stage's tokens. The first is at layer 1."""


def himap_grid(config: Any, budget: float, image_tokens: int, text_tokens: int) -> list[PruningSchedule]:
    """By the instruction at layer 1 and by the image at a deeper one, ratios scaled to the budget; for 8 layers.

    Args:
        config: Hugging Face configuration of the model.
        budget: `flops_ratio` of a prefill.
        image_tokens: Image tokens of the sample that the budget is for.
        text_tokens: Its other tokens.

    Raises:
        ValueError: If a schedule cannot be scaled to the budget.
    """
    shallow = PruningStage(1, "instruction", 0.6)
    shapes = (PruningSchedule((shallow, PruningStage(deep, "image", 0.6 * share))) for deep, share in SHAPES)
    return [shape.at_budget(config, budget, image_tokens, text_tokens) for shape in shapes]
