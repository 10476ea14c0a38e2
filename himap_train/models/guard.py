"""Checks that pruning really happened, in every step, and that a checkpoint fits.

A pruner that silently does nothing costs a training run: HiMAP's own reference trains dense under gradient
checkpointing, and Lightning's DeepSpeed strategy strips hooks from every module at each validation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from himap_train.pruning.schedule import PruningSchedule


def check_ran(pruning: Any, before: Any) -> None:
    """Raise unless a pruned prefill or training forward has run, and left no more tokens than the schedule says.

    Args:
        pruning: What is installed, not under a dense schedule.
        before: `.last` of it before the forward.

    Raises:
        RuntimeError: Naming what was found.
    """
    last = pruning.last
    if last is None or last is before:
        raise RuntimeError(
            "a prefill ran, but nothing was pruned: the decoder's forward was replaced; call install_pruning again"
        )
    turns = (last.images > 0).sum(1)  # in each the image token that a text is predicted from stays
    for stage, kept in zip(pruning.schedule.stages, last.kept_rows, strict=False):
        most = stage.most(last.images).sum(1) + turns
        if bool((kept > most).any()):
            raise RuntimeError(
                f"the stage at layer {stage.layer} left {kept.tolist()} image tokens of {last.image_rows.tolist()}, at "
                f"most {most.tolist()} are scheduled"
            )


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
    if not found or (pruning is None and not schedule.stages):
        return
    if pruning is None or pruning.schedule != schedule:
        raise RuntimeError(f"the model has lost its pruner or runs another schedule than {schedule}; found {pruning}")
    if not schedule.stages:
        return
    check_ran(pruning, before)
    if pruning.last.image_tokens != found or len(pruning.last.kept) != len(schedule.stages):
        raise RuntimeError(
            f"the batch has {found} image tokens and the schedule {len(schedule.stages)} stages, but the pruner saw "
            f"{pruning.last.image_tokens} tokens and ran {len(pruning.last.kept)} stages"
        )


def check_trained_weights(found: set[str], expected: set[str]) -> None:
    """Raise unless a checkpoint holds exactly the weights that are trained.

    Raises:
        ValueError: Some are missing from it, or it holds others; renamed ones are both.
    """
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        raise ValueError(
            f"the checkpoint does not fit this model: {len(missing)} trained weights are missing from it "
            f"{missing[:3]}, {len(unknown)} are unknown {unknown[:3]}; use the config that it was trained with"
        )
