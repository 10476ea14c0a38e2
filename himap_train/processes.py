"""What the processes of a run know of one another."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist


def from_all(value: Any) -> list[Any]:
    """What each process has, in the order of ranks; all must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def require_one_process() -> None:
    """Raise ValueError where a launcher has started several: each would do everything, and write the same files."""
    if (number := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
        raise ValueError(
            f"this runs in one process, and {number} were started; for several GPUs: accelerate launch -m lmms_eval "
            "--model himap ... (docs/benchmarks.md)"
        )
