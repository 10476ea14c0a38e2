"""What `install_pruning` leaves on a text decoder, and what a forward pass reports there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from himap_train.models.families.base import Family
from himap_train.pruning.learned.scorer import Lesson, Scorer
from himap_train.pruning.methods.base import Seen
from himap_train.pruning.schedule import PruningSchedule


@dataclass
class PruneCounts:
    """Image tokens of one forward pass, on the host.

    Attributes:
        images: (B, G) long, image tokens of each row and turn.
        kept_rows: For each stage (B,) long, those left after it.
    """

    images: Tensor
    kept_rows: list[Tensor] = field(default_factory=list)

    @property
    def image_rows(self) -> Tensor:
        """(B,) long, image tokens of each row."""
        return self.images.sum(1)

    @property
    def image_tokens(self) -> int:
        """Image tokens of the batch."""
        return int(self.image_rows.sum())

    @property
    def kept(self) -> list[int]:
        """Those left after each stage, of the batch."""
        return [int(rows.sum()) for rows in self.kept_rows]


@dataclass
class PruningTrace:
    """What the last prefill or training forward kept.

    Attributes:
        kept: Per stage a list with, per batch row, an ascending 1-D LongTensor of the columns of the batch as passed in
            that stay: all token kinds, no padding.
        watches: Whether stages from which nothing leaves are looked at too.
        shown: By a stage's layer what its method was shown, with its scores; where it watches.
    """

    kept: list[list[Tensor]] = field(default_factory=list)
    watches: bool = False
    shown: dict[int, Seen] = field(default_factory=dict)


@dataclass
class InstalledPruning:
    """What `install_pruning` leaves on a text decoder. Written by a forward pass, read by nothing in its backward.

    Attributes:
        schedule: What to remove where.
        family: Family of the model.
        image_token_id: The token in whose places image features stand.
        config: The decoder's stock config; it has a view of it, see `own_config`.
        ratios: Keep ratio of each layer while these are learned, (layers,) fp32 with a gradient; the schedule then has
            a stage at each layer from the first on. None otherwise.
        cpu_blocks: Whether SDPA runs in blocks on a CPU, see `cpu_attention`.
        last: Counts of the last prefill or training forward.
        traces: Those of `record_pruning`.
        learn: Takes what a backward pass teaches the scorer of each layer, see `foresight`; None where none learns.
    """

    schedule: PruningSchedule
    family: Family
    image_token_id: int
    config: Any
    ratios: Tensor | None = None
    cpu_blocks: bool = True
    last: PruneCounts | None = None
    traces: list[PruningTrace] = field(default_factory=list)
    learn: Callable[[int, Lesson], None] | None = None


def scorers_of(decoder: Any) -> dict[int, Scorer]:
    """What was trained to rank image tokens at which layer; see `give_scorers`."""
    found: dict[int, Scorer] = decoder.__dict__.get("himap_scorers", {})
    return found


def give_scorers(decoder: Any, scorers: dict[int, Scorer]) -> None:
    """Let a text decoder have these. They are no part of the model: neither in its parameters nor in its files."""
    decoder.himap_scorers = scorers
