"""Precision under ZeRO: autocast, as without DeepSpeed, whose own casts trained weights to bfloat16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from torch import Tensor

_PRECISIONS = ("32-true", "bf16-mixed")


class ZeroPrecision(DeepSpeedPrecision):
    """Precision "32-true" or "bf16-mixed", as Lightning's other strategies understand them."""

    def __init__(self, precision: str, device: str) -> None:
        if precision not in _PRECISIONS:
            expected = " or ".join(_PRECISIONS)
            raise ValueError(f"trainer.precision={precision!r} does not go with DeepSpeed here; expected {expected}")
        super().__init__(precision)  # type: ignore[arg-type]
        self.device = device

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast."""
        return nullcontext() if self.precision == "32-true" else torch.autocast(self.device, torch.bfloat16)

    def convert_input(self, data: Any) -> Any:
        """As it is; autocast does the rest."""
        return data

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Through the engine, which must not divide by the window once more: Lightning has."""
        model.trainer.model.backward(tensor, scale_wrt_gas=False)
