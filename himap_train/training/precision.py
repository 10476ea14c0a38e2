"""What Lightning's names of precisions mean."""

from __future__ import annotations

from typing import Any

import torch

_WEIGHTS = {"bf16": torch.bfloat16, "16": torch.float16}


def weights_dtype(precision: str) -> torch.dtype:
    """Dtype of the frozen weights under one of Lightning's precisions."""
    return _WEIGHTS.get(precision.split("-")[0], torch.float32)


def full_precision(name: Any) -> Any:
    """One of Lightning's precisions; it takes `bf16`, `16`, `32` and `64` for longer names."""
    return {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "64": "64-true"}.get(str(name), name)
