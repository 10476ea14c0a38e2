"""Optimizer groups and the learning-rate schedule of LLaVA-1.5's fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from himap_train.models.families import family_of
from himap_train.models.lora import parameter_group
from himap_train.models.stock import base_model


def parameter_groups(model: nn.Module, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as AdamW groups: each part with its own of the `rates`, biases and norms without decay.

    Each group has a `name` (for learning-rate plots). LoRA on projector or tower runs at the rate of that part.

    Raises:
        ValueError: Nothing is trainable.
    """
    family = family_of(base_model(model))
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = parameter_group(name, family)
        if part not in rates:
            raise ValueError(f"{name} is trainable but belongs to none of {', '.join(rates)}; it has no learning rate")
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # ZeRO-3 leaves a spread weight flat
        key = part if decays else f"{part}-no-decay"
        empty = {"params": [], "lr": rates[part], "weight_decay": weight_decay if decays else 0.0, "name": key}
        groups.setdefault(key, empty)["params"].append(parameter)
    if not groups:
        raise ValueError(
            "nothing is trainable: attach LoRA or train a part (model.decoder, model.projector, model.vision_tower)"
        )
    return list(groups.values())


def cosine_with_warmup(optimizer: torch.optim.Optimizer, total_steps: float, warmup_ratio: float) -> LambdaLR:
    """Linear warm-up over `warmup_ratio` of the optimizer steps (rounded up, as LLaVA does), then a cosine to zero.

    Raises:
        ValueError: The number of steps is not known, as with an endless loader and no `max_steps`.
    """
    if math.isinf(total_steps) or total_steps < 1:
        raise ValueError(
            f"the cosine schedule needs the number of optimizer steps and found {total_steps}; set trainer.max_steps"
        )
    warmup = math.ceil(warmup_ratio * total_steps)
    return get_cosine_schedule_with_warmup(optimizer, warmup, int(total_steps))
