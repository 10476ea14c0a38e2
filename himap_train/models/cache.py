"""What decoding must remember about a pruned prefill, kept on the cache so that it follows beams and batch reordering.

Layers from a stage on hold fewer tokens than the layers before it, and rows that kept fewer tokens than the longest
end in padding slots. The first layer of each stage carries which slots are real; the other layers of the stage share
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer


@dataclass
class StageFacts:
    """What the first layer of a stage remembers beside its keys and values.

    Attributes:
        slots: (B, L) bool, which cached tokens are real; None where all are.
        dropped: (B,) long, how many tokens of the row have left before this layer.
        renumber: Whether positions from this layer on are counted without the dropped tokens.
        uncounted: Tokens of the prompt, padding included, that a layer before the first removal would hold beside those
            that it holds. More than 0 in layer 0 alone, which generation asks how long the prompt is.
        unread: Whether some image was ranked by no text.
    """

    slots: Tensor | None
    dropped: Tensor
    renumber: bool = False
    uncounted: int = 0
    unread: bool = False

    def append(self, new: Tensor | None, number: int, batch: int, stored: int) -> Tensor | None:
        """Slots with `number` new tokens, the real ones of `new` (B, number), behind `stored`: (B, L + number)."""
        if self.slots is None and new is None:
            return None
        device = self.dropped.device
        if self.slots is None:
            self.slots = torch.ones(batch, stored, dtype=torch.bool, device=device)
        real = torch.ones(batch, number, dtype=torch.bool, device=device) if new is None else new
        self.slots = torch.cat([self.slots, real], dim=1)
        return self.slots

    def move(self, index: Tensor) -> None:
        """Rows follow their beams."""
        index = index.to(self.dropped.device)
        self.dropped = self.dropped[index]
        self.slots = None if self.slots is None else self.slots[index]


class _Stage(DynamicLayer):
    """Mixed into the class of a stage's first layer: its facts follow its keys and values."""

    facts: StageFacts

    def get_seq_length(self) -> int:
        """Tokens that have been passed in, those that left before this layer included."""
        stored: int = super().get_seq_length()
        return stored + self.facts.uncounted if stored else 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows follow their beams."""
        super().reorder_cache(beam_idx)
        self.facts.move(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.facts.move(torch.arange(self.facts.dropped.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self.facts.move(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        super().crop(tokens_to_remove)
        if self.facts.slots is not None and tokens_to_remove != 0:
            self.facts.slots = self.facts.slots[:, : -abs(tokens_to_remove)]

    def reset(self) -> None:
        """Forget everything: the next prefill may have its stages elsewhere."""
        super().reset()
        self.__class__ = type(self).__mro__[2]
        del self.facts

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_stage, (type(self).__mro__[2],), self.__dict__


@cache
def _stage_class(kind: type) -> type:
    return type(f"Stage{kind.__name__}", (_Stage, kind), {})


def _empty_stage(kind: type) -> Any:
    return object.__new__(_stage_class(kind))


def check_cache(cache: Cache) -> None:
    """Refuse caches that cannot hold layers of different lengths.

    A `StaticCache` could be given layers of different lengths; in the way is that generation makes one 4-D mask for all
    layers from the first one's slots (`prepare_inputs_for_generation`, as soon as `Cache.is_compileable`), so which
    slots of a shorter layer are padding never arrives here, and that its compiled step knows one shape.

    Raises:
        ValueError: With the way out.
    """
    if not isinstance(cache, Cache) or any(not isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ValueError(
            f"a pruned prefill cannot fill a {type(cache).__name__}: after a stage layers hold fewer tokens and other "
            "padding, and generate() would give all of them one length and one mask. Leave `cache_implementation` "
            "unset or pass a DynamicCache; under an empty schedule every cache works"
        )


def mark_stage(cache: Cache, layer: int, facts: StageFacts) -> None:
    """Make `layer` of an empty cache a stage's first layer. A quantised one stays quantised."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    found = cache.layers[layer]
    if not isinstance(found, QuantizedLayer):
        found = cache.layers[layer] = DynamicLayer()
    found.__class__ = _stage_class(type(found))
    cast(_Stage, found).facts = facts


@contextmanager
def as_stored(cache: Cache | None, layer: int | None) -> Iterator[None]:
    """Inside the block `layer` says how many tokens it holds: what a mask over them must know."""
    facts = None if cache is None or layer is None else stage_of(cache, layer)
    if facts is None or not facts.uncounted:
        yield
        return
    uncounted, facts.uncounted = facts.uncounted, 0
    try:
        yield
    finally:
        facts.uncounted = uncounted


def stage_of(cache: Cache, layer: int) -> StageFacts | None:
    """The facts of the stage that begins at `layer` of a cache which a pruned prefill filled."""
    found = cache.layers[layer] if layer < len(cache.layers) else None
    return found.facts if isinstance(found, _Stage) else None


def stored(cache: Cache, layer: int) -> int:
    """Tokens that a layer holds."""
    with as_stored(cache, layer):
        return int(cache.get_seq_length(layer))


def unread_images(cache: Cache) -> bool:
    """Whether some image of a pruned prefill was ranked by no text."""
    return any(isinstance(layer, _Stage) and layer.facts.unread for layer in cache.layers)
