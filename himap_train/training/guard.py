"""Checks in every step that pruning really happened.

A pruner that silently does nothing costs a training run: HiMAP's own reference trains dense under gradient
checkpointing, and Lightning's DeepSpeed strategy strips hooks from every module at each validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.loss import IGNORED


def check_pruned(schedule: PruningSchedule, pruning: Any, before: Any, image_tokens: Tensor) -> None:
    """Raise unless the forward that just ended pruned as `schedule` says.

    Args:
        schedule: What was asked for.
        pruning: `pruning_of(model)` after the forward, or None.
        before: `.last` of it before the forward; the same object afterwards means that no pruned forward ran.
        image_tokens: (B, S) bool, the batch's image tokens.

    Raises:
        RuntimeError: Naming what was found.
    """
    found = int(image_tokens.sum())
    if not schedule.stages or not found:
        return
    if pruning is None or pruning.schedule != schedule:
        raise RuntimeError(f"the model has lost its pruner or runs another schedule than {schedule}; found {pruning}")
    if pruning.last is None or pruning.last is before:
        raise RuntimeError(f"a batch with {found} image tokens ran, but nothing was pruned: the forward was replaced")
    if pruning.last.image_tokens != found or len(pruning.last.kept) != len(schedule.stages):
        raise RuntimeError(
            f"the batch has {found} image tokens and the schedule {len(schedule.stages)} stages, but the pruner saw "
            f"{pruning.last.image_tokens} tokens and ran {len(pruning.last.kept)} stages"
        )


def check_predicting_rows(image_tokens: Tensor, labels: Tensor, ids: Sequence[str] | None = None) -> None:
    """Raise where an image token is the row that predicts a supervised token: pruning could remove that row.

    Args:
        image_tokens: (B, S) bool.
        labels: (B, S), -100 where nothing is supervised; row i predicts label i + 1.
        ids: Names of the samples, for the message.

    Raises:
        ValueError: Naming the first such sample.
    """
    bad = image_tokens[:, :-1] & (labels[:, 1:] != IGNORED)
    if bad.any():
        row = int(torch.nonzero(bad.any(dim=1))[0])
        raise ValueError(
            f"sample {ids[row] if ids else row}: an answer starts right after an image token, which pruning may "
            "remove; put text between image and answer (the chat template's role marker does)"
        )
