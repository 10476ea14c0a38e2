"""What the processes of a run know of one another."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def from_all(value: Any) -> list[Any]:
    """What each process has, in the order of ranks; all must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
