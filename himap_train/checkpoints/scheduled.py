"""Loading a checkpoint under the schedule that a command line asks for:

one meaning of `--schedule` for every recipe.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from himap_train.checkpoints.load import load_checkpoint
from himap_train.models.install import install_pruning, pruning_of
from himap_train.models.stock import base_model
from himap_train.pruning.reading import ScheduleArgument, fit_preset, is_preset, read_schedule
from himap_train.pruning.schedule import PruningSchedule

AS_SAVED = "as-saved"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load_with_schedule(
    checkpoint: str = "embedded", schedule: ScheduleArgument = AS_SAVED, dtype: Dtype = "auto", device: str = "auto"
) -> tuple[Any, Any]:
    """The model in evaluation mode on its device with its pruner installed, and its processor.

    Args:
        checkpoint: "embedded", a run or adapter folder, a merged folder, or any stock LLaVA (folder or hub name).
        schedule: as-saved, none, a preset (himap, fastv, ...), a pruning.yaml, or the stages inline.
        dtype: Dtype of the weights; "auto" as they are stored.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ...

    Raises:
        FileNotFoundError: The checkpoint or the schedule's file is not there.
        ValueError: The schedule is unknown or does not fit the decoder.
    """
    given = None if schedule == AS_SAVED else read_schedule(schedule)  # a misspelt name fails before weights are read
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if given is None:
        model, processor = load_checkpoint(checkpoint, dtype=dtype)
    else:
        model, processor = load_checkpoint(checkpoint, schedule=None, dtype=dtype)
        text_config: Any = base_model(model).config.text_config
        layers = text_config.num_hidden_layers
        install_pruning(model, fit_preset(given, layers) if is_preset(schedule) else given)
    placed: Any = model
    return placed.to(place).eval(), processor


def installed_schedule(model: nn.Module) -> PruningSchedule:
    """The schedule that is installed on a model, without stages where there is none."""
    pruning = pruning_of(model)
    return pruning.schedule if pruning else PruningSchedule()
