"""One row of the table: what was measured of a method beside dense, and what it could have been at best."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from himap_train.benchmark.timing import Spread
from himap_train.benchmark.workload import Workload


@dataclass(frozen=True)
class Row:
    """What was measured of a method beside dense.

    Attributes:
        measure: What was timed.
        method: Its name.
        why: Why it costs what it costs.
        workload: Shape of the batch.
        layers: Depth of the decoder.
        seconds: Time of the method; of one token where tokens are decoded.
        dense_seconds: Time of dense in the same pairs.
        ratio: Pair by pair.
        bound: What the ratio could be at least, by FLOPs or bytes; None where there is no such bound.
        causal_bound: The same where what the causal mask hides is no work; None but for FLOPs.
        flops: FLOPs of dense and of the method, mean of the samples; None where bytes are what counts.
        peak: Most bytes alive at once beside the weights.
        dense_peak: The same of dense.
        kv: Bytes of the cache after the prefill; None in training.
        dense_kv: The same of dense.
        tokens_per_second: Tokens of the input, or generated ones; of the whole batch.
        choosing: Share of the prefill that choosing the tokens takes; None for what is no prefill, or chooses nothing.
    """

    measure: str
    method: str
    why: str
    workload: Workload
    layers: int
    seconds: Spread
    dense_seconds: Spread
    ratio: Spread
    bound: float | None
    causal_bound: float | None
    flops: tuple[float, float] | None
    peak: int
    dense_peak: int
    kv: int | None
    dense_kv: int | None
    tokens_per_second: float
    choosing: Spread | None = None

    @property
    def efficiency(self) -> float | None:
        """Bound / time ratio: 1 where all of the promised saving arrives."""
        return None if self.bound is None else self.bound / self.ratio.median

    @property
    def causal_efficiency(self) -> float | None:
        """The same of the causal bound."""
        return None if self.causal_bound is None else self.causal_bound / self.ratio.median

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self) | {"efficiency": self.efficiency, "causal_efficiency": self.causal_efficiency}
