"""What a training step really takes: FLOPs as PyTorch counts them, and the most bytes that were alive at once.

The predictions of this package are compared with these. Every tensor that an operation returns is followed until its
storage is freed, so a run gives the same number of bytes each time and no allocator's rounding is in it. What a kernel
allocates inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from himap_train.models.features import hidden_states
from himap_train.models.loss import supervised_loss
from himap_train.models.stock import base_model


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of all tensors made inside its block that are alive, and remembers the highest sum.

    Args:
        existing: Tensors that were there before and are not counted, such as parameters.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and follow what it returns."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._follow(value.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


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
        loss = _loss(model, batch, loss_chunk)
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
    _loss(model, batch, loss_chunk, autocast).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with AllocationCounter([*model.parameters(), *model.buffers(), *gradients]) as counter:
        mine = {name: tensor.clone() for name, tensor in batch.items() if name != "images"}
        mine["images"] = {name: tensor.clone() for name, tensor in batch["images"].items()}
        loss = _loss(model, mine, loss_chunk, autocast)
        saved = counter.alive
        loss.backward()
    model.zero_grad()
    return StepMemory(saved, counter.peak)


def _loss(model: nn.Module, batch: dict[str, Any], chunk: int, autocast: torch.dtype | None = None) -> Tensor:
    """As `LlavaFineTuner.training_step` computes it."""
    with nullcontext() if autocast is None else torch.autocast(batch["input_ids"].device.type, autocast):
        return supervised_loss(hidden_states(model, **batch), batch["labels"], base_model(model).lm_head, chunk)[0]
