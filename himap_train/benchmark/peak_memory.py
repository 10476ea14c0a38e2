"""The most bytes that are alive at once while something runs, beside weights and inputs; and the bytes of a cache.

On a GPU by the allocator's own statistics. On the CPU every tensor that an operation returns is followed until it is
freed, which gives the same number each time; what a kernel allocates inside itself is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from himap_train.allocations import AllocationCounter
from himap_train.benchmark.timing import Task


def peak_bytes(task: Task, device: torch.device, held: Iterable[Tensor]) -> int:
    """Bytes of one run of a task that has run before.

    Args:
        task: What to run.
        device: Where it runs.
        held: Weights, inputs and what else is there before and not counted.
    """
    with task.within():
        task.prepare()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            task.run()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with AllocationCounter(held) as counter:
            task.run()
        return counter.peak


def cache_bytes(cache: Any) -> int:
    """Keys and values of all layers."""
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the text decoder's layers and `lm_head`: what decoding a token reads beside the cache."""
    base: Any = model
    parts = (*base.model.language_model.layers.parameters(), *base.lm_head.parameters())
    return sum(part.numel() * part.element_size() for part in parts)
