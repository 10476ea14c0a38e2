"""Decoder layers through `torch.compile`, each on its own: all layers of a stage have one shape and share one code.

The layers are compiled and not the decoder, because between them token counts come from the batch, and because one
layer compiles in seconds where 32 take minutes. Nothing is left on a module: names in the state dict, hooks, PEFT, deep
copies and pickles stay as they are, and `remove_pruning` takes it all away.

What runs as it is: the layer before a stage, which reports scores to a collector (compiled code cannot do that under
gradient checkpointing); decoding, where every token has a length of its own; and, unless asked for, all without
gradients: evaluation batches have many lengths, and each would be compiled for one use.

Code is made for one shape and used for no other. Shapes beyond the first `MOST` run uncompiled, after a warning.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

MOST = 48
"""Shapes: a schedule with two stages has three for each length of its batches."""


class CompiledLayers:
    """Calls decoder layers, compiled.

    Args:
        backend: As `torch.compile` takes it.
        inference: Also without gradients: the prefill.
        most: Shapes that are compiled.
        multiple: Up to which the lengths behind a stage are rounded with padding, as those of the batches are.
    """

    def __init__(
        self,
        backend: str | Callable[..., Any] = "inductor",
        inference: bool = False,
        most: int = MOST,
        multiple: int = 1,
    ) -> None:
        self.backend, self.inference, self.most, self.multiple = backend, inference, most, multiple
        self._shapes: set[tuple[Any, ...]] = set()
        config: Any = torch._dynamo.config
        # Each shape has its code, so the number of shapes is the limit; dynamo's own would be 8.
        config.recompile_limit = max(config.recompile_limit, 2 * most)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * most)
        # DDP's optimizer cuts large graphs so that gradients are sent early. A layer is small enough as it is.
        config.optimize_ddp = False
        self._compiled = torch.compile(_call, backend=backend, dynamic=False)

    def __getstate__(self) -> dict[str, Any]:
        """Compiled code is not copied: a copy compiles again."""
        return {name: getattr(self, name) for name in ("backend", "inference", "most", "multiple")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As made anew."""
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, layer: nn.Module, hidden: Tensor, given: dict[str, Any]) -> Tensor:
        """What `layer(hidden, **given)` returns, to rounding.

        Args:
            layer: A decoder layer.
            hidden: (B, L, D).
            given: Its keyword arguments. A KV cache is an empty one.
        """
        if not self._takes(layer, hidden, given):
            return layer(hidden, **given)
        cache = given.get("past_key_values")
        if cache is None:
            return self._compiled(layer, hidden, given)
        new, attention = _NewKeys(), cast(Any, layer.self_attn)
        hidden = self._compiled(layer, hidden, given | {"past_key_values": new})
        if new.keys is not None:
            cache.update(new.keys, new.values, attention.layer_idx)
        return hidden

    def rounded(self, length: int) -> int:
        """How long the rows are to be whose longest has `length` tokens."""
        return -(-length // self.multiple) * self.multiple if self._on() else length

    def _on(self) -> bool:
        return self.inference or torch.is_grad_enabled()

    def _takes(self, layer: nn.Module, hidden: Tensor, given: dict[str, Any]) -> bool:
        if given.get("score_collector") is not None or not self._on():
            return False
        mask = given.get("attention_mask")
        wants = (torch.is_grad_enabled(), hidden.requires_grad, layer.training)
        shape = (hidden.shape, None if mask is None else mask.shape, *wants)
        if shape not in self._shapes and len(self._shapes) < self.most:
            self._shapes.add(shape)
        elif shape not in self._shapes:
            warnings.warn(
                f"{self.most} shapes of decoder layers are compiled; others run uncompiled. Let batches have fewer "
                "lengths (data.group_by_length with data.pad_to_multiple_of), or leave model.compile off",
                stacklevel=2,
            )
        return shape in self._shapes


class _NewKeys:
    """Stands for an empty KV cache inside compiled code, which would else be made for each layer's number."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """As `Cache.update` of an empty layer."""
        self.keys, self.values = keys, values
        return keys, values


def _call(layer: nn.Module, hidden: Tensor, given: dict[str, Any]) -> Tensor:
    """What is compiled. A function of the layer, so that the code belongs to none of them."""
    return layer(hidden, **given)


def require_compiler(device: str) -> None:
    """Raises ValueError where `torch.compile` could not build code on this machine, with the way out.

    Args:
        device: Type of the device that would run it.
    """
    on_cpu = device == "cpu"
    names = _cpp_compilers() if on_cpu else [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    lacking = None
    if not any(shutil.which(name) for name in names if name):
        lacking = f"a {'C++' if on_cpu else 'C'} compiler, and none of {', '.join(filter(None, names))} is on the PATH"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacking = f"Python's headers, and there is no Python.h in {sysconfig.get_path('include')}"
    elif not on_cpu and find_spec("triton") is None:
        lacking = "the package triton, which is not installed"
    if lacking:
        raise ValueError(
            f"torch.compile needs {lacking}. Install it (Debian: apt install g++ python3-dev; conda: "
            "conda install gxx_linux-64), or run uncompiled: --model.compile false, of the benchmark --compile false"
        )


def _cpp_compilers() -> list[str]:
    from torch._inductor import config

    found: Any = config.cpp.cxx
    return [name for name in (found if isinstance(found, tuple | list) else [found]) if name]
