"""How often a decoder would wait for a GPU, found on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import make_case
from tiny import tiny_llava
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from himap_train import PruningSchedule, install_pruning
from himap_train.models.features import hidden_states

WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "item", "index.Tensor")


class Tainted(TorchDispatchMode):
    """Follows what stems from the batch and the weights, as if it lay on a GPU, and counts operators that wait for it.

    Host tensors are those that come out of `Tensor.cpu`, which the test replaces, and what is made from them alone.
    """

    def __init__(self, device_tensors: list[Tensor]) -> None:
        super().__init__()
        self._alive = list(device_tensors)
        self._on_device = {tensor.untyped_storage().data_ptr() for tensor in device_tensors}
        self.waits: Counter[str] = Counter()
        self.transfers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        on_device = any(tensor.untyped_storage().data_ptr() in self._on_device for tensor in given)
        name = str(func).removeprefix("aten.")
        if on_device and name.startswith(WAITS):
            self.waits[name] += 1
        out = func(*args, **(kwargs or {}))
        if on_device:
            for value in tree_iter(out):
                if isinstance(value, Tensor):
                    self._alive.append(value)  # no address is used twice
                    self._on_device.add(value.untyped_storage().data_ptr())
        return out

    def to_host(self, tensor: Tensor) -> Tensor:
        """In place of `Tensor.cpu`."""
        self.transfers += 1
        host = torch.tensor(tensor.tolist(), dtype=tensor.dtype) if tensor.numel() else tensor
        self._alive.append(host)
        self._on_device.discard(host.untyped_storage().data_ptr())
        return host


@contextmanager
def tainted(model: Any, tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[Tainted]:
    mode = Tainted([*model.parameters(), *model.buffers(), *tensors])

    def cpu(tensor: Tensor) -> Tensor:
        waits = mode.waits.copy()
        host = mode.to_host(tensor)
        mode.waits = waits  # reading it out is the transfer that is counted already
        return host

    with monkeypatch.context() as patch, mode:
        patch.setattr(Tensor, "cpu", cpu)
        yield mode


def forward_waits(plan: PruningSchedule, labels: bool, patch: pytest.MonkeyPatch) -> Tainted:
    """What one forward pass of a ragged batch waits for."""
    model = install_pruning(tiny_llava(), plan)
    case = make_case(model, ["t3 i16 t4 a2", "t1 i9 t2 a1", "t4 a3"])
    tensors = [case.input_ids, case.attention_mask, case.labels, *case.features]
    with torch.set_grad_enabled(labels), tainted(model, tensors, patch) as mode:
        hidden_states(model, **case.inputs(labels))
    return mode
