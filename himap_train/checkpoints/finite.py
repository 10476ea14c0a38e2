"""Weights that are numbers: what is nan or inf is neither saved nor scored."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """A loss, a gradient or a weight is nan or inf."""


def not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first tensor with a nan or inf in it, and how many of its values are; None where all are numbers."""
    for name, tensor in named:
        if tensor.is_floating_point() and not tensor.is_meta:
            # The sum of a large weight may overflow, that of its zeros cannot.
            if tensor.numel() and not bool(torch.isfinite(tensor.detach().mul(0).sum())):
                wrong = int((~torch.isfinite(tensor)).sum())
                return f"{name} ({wrong} of its {tensor.numel()} values are nan or inf)"
    return None


def require_finite(named: Iterable[tuple[str, Tensor]], where: str, way_out: str) -> None:
    """Raise where a tensor holds nan or inf.

    Args:
        named: Names and tensors.
        where: What holds them, for the message.
        way_out: What the user can do.

    Raises:
        NonFiniteError: Names the tensor.
    """
    found = not_finite(named)
    if found:
        raise NonFiniteError(f"{where} holds a weight that is no number: {found}. {way_out}")
