"""What a training step really takes: FLOPs as PyTorch counts them, and the most bytes that were alive at once.

The predictions of this package are compared with these.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from himap_train.allocations import AllocationCounter
from himap_train.models.features import hidden_states
from himap_train.models.loss import supervised_loss
from himap_train.models.stock import base_model


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step beside weights, gradients and optimizer.

    Attributes:
        saved: Alive when the forward pass has ended: what the backward pass needs.
        peak: The most that was alive at any moment of forward and backward.
    """

    saved: int
    peak: int


def measured_flops(model: nn.Module, batch: dict[str, Any], loss_chunk: int, backward: bool = True) -> int:
    """FLOPs of a step; attention runs product by product, because CPU flash attention has no entry in the counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = step_loss(model, batch, loss_chunk)
        if backward:
            loss.backward()
    model.zero_grad()
    return int(counter.get_total_flops())


def measured_memory(
    model: nn.Module, batch: dict[str, Any], loss_chunk: int, autocast: torch.dtype | None = None
) -> StepMemory:
    """Memory of a second micro-batch: gradients are there already, as in all but the first of an optimizer step.

    Args:
        model: A LLaVA with LoRA, in training mode; without CPU blocks, where it is to be compared with a plan.
        batch: `input_ids`, `attention_mask`, `labels` and `images`; they are counted too.
        loss_chunk: As in training.
        autocast: The dtype of mixed precision; None for none.
    """
    step_loss(model, batch, loss_chunk, autocast).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with AllocationCounter([*model.parameters(), *model.buffers(), *gradients]) as counter:
        mine = {name: tensor.clone() for name, tensor in batch.items() if name != "images"}
        mine["images"] = {name: tensor.clone() for name, tensor in batch["images"].items()}
        loss = step_loss(model, mine, loss_chunk, autocast)
        saved = counter.alive
        loss.backward()
    model.zero_grad()
    return StepMemory(saved, counter.peak)


def step_loss(model: nn.Module, batch: dict[str, Any], chunk: int, autocast: torch.dtype | None = None) -> Tensor:
    """The sum that `LlavaFineTuner.training_step` computes, over a batch of `input_ids`, `labels`, `images`..."""
    with nullcontext() if autocast is None else torch.autocast(batch["input_ids"].device.type, autocast):
        return supervised_loss(hidden_states(model, **batch), batch["labels"], base_model(model).lm_head, chunk)[0]
