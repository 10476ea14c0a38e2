"""Which numbers of a config are possible, known before anything is loaded, from a command line or in Python.

Those of `pruning:` depend on one another and on the schedule; they are checked there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Test = Callable[[float], bool]


def _from(least: float) -> tuple[str, Test]:
    return f"{least} or more", lambda value: value >= least


def _whole(least: int, or_all: bool = False) -> tuple[str, Test]:
    also = ", or -1 for no limit" if or_all else ""
    return f"a whole number from {least} on{also}", lambda value: value >= least or (or_all and value == -1)


_ABOVE_0: tuple[str, Test] = ("above 0", lambda value: value > 0)
_SHARE: tuple[str, Test] = ("a share from 0 to 1", lambda value: 0 <= value <= 1)
_BELOW_1: tuple[str, Test] = ("from 0 to below 1", lambda value: 0 <= value < 1)
_SEED: tuple[str, Test] = ("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)
_BATCHES: tuple[str, Test] = (
    "a whole number from 0 on, or a share from 0 to 1",
    lambda value: value >= 0 and (value <= 1 or value == int(value)),
)

RANGES: dict[str, tuple[str, Test]] = {
    "seed_everything": _SEED,
    "save_every": _whole(1),
    "model.lora_r": _whole(1),
    "model.lora_alpha": _ABOVE_0,
    "model.lora_dropout": _BELOW_1,
    "model.lora_lr": _ABOVE_0,
    "model.projector_lr": _from(0),
    "model.vision_lr": _ABOVE_0,
    "model.decoder_lr": _ABOVE_0,
    "model.weight_decay": _from(0),
    "model.warmup_ratio": _SHARE,
    "model.betas": _BELOW_1,
    "model.loss_chunk": _whole(0),
    "data.batch_size": _whole(1),
    "data.eval_batch_size": _whole(1),
    "data.max_length": _whole(1),
    "data.max_image_tokens": _whole(1),
    "data.num_workers": _whole(0),
    "data.max_skipped": _from(0),
    "data.train_limit": _whole(1),
    "data.validation_limit": _whole(1),
    "data.validation": ("the name of data, or a share of data.train above 0 and below 1", lambda value: 0 < value < 1),
    "data.test_limit": _whole(1),
    "data.seed": _SEED,
    "data.pad_to_multiple_of": _whole(1),
    "evaluation.limit": _whole(1),
    "evaluation.during": _whole(0),
    "evaluation.batch_size": _whole(1),
    "evaluation.max_new_tokens": _whole(1),
    "trainer.max_steps": _whole(1, or_all=True),
    "trainer.min_steps": _whole(0),
    "trainer.max_epochs": _whole(1, or_all=True),
    "trainer.min_epochs": _whole(0),
    "trainer.num_nodes": _whole(1),
    "trainer.accumulate_grad_batches": _whole(1),
    "trainer.gradient_clip_val": _from(0),
    "trainer.log_every_n_steps": _whole(1),
    "trainer.check_val_every_n_epoch": _whole(1),
    "trainer.num_sanity_val_steps": _whole(0, or_all=True),
    "trainer.val_check_interval": (
        "a whole number from 1 on, or a share above 0 up to 1",
        lambda value: value > 0 and (value <= 1 or value == int(value)),
    ),
    "trainer.limit_train_batches": _BATCHES,
    "trainer.limit_val_batches": _BATCHES,
    "trainer.limit_test_batches": _BATCHES,
    "trainer.overfit_batches": _BATCHES,
}


def require_possible(config: Any) -> None:
    """Raise for the first number of a config that cannot be; null, and what is no number, is left to the types.

    Args:
        config: Gives a value for a dotted key, None for one that it lacks: `config.get("model.lora_lr")`.

    Raises:
        ValueError: Names key, value and what is allowed.
    """
    for key, (allowed, test) in RANGES.items():
        given = config.get(key)
        for value in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value) or not test(value):
                raise ValueError(f"{key} is {value}; expected {allowed}")
