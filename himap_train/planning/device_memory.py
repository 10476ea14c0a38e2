"""Memory of one GPU by part, for one device, DDP and each stage of ZeRO, and the largest batch that fits.

With N devices, T trained and F frozen parameters:
- one device, DDP: all weights, and trained weights, gradients and AdamW's two moments in fp32 (`16 T` bytes); DDP adds
  its buckets, a second copy of the gradients.
- ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054) as `ZeroStrategy` runs it: trained weights and their
  gradients in fp32, and beside the moments a fp32 copy of the process's own share (`12 T / N`). Stage 2 shards the
  gradients, stage 3 the weights too, the frozen ones included; then up to `stage3_max_live_parameters` are gathered at
  a time. Buckets are allocated in full.
- offload keeps the shards in the host's memory.

The optimizer's step needs a temporary as large as the trained weights it updates, when no activation is alive.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from himap_train.planning.activations import ActivationModel
from himap_train.planning.facts import Activations, Batch, ModelFacts, Numerics
from himap_train.pruning.names import nearest
from himap_train.pruning.schedule import PruningSchedule

GIB = 2**30
RESERVE = 2 * GIB
"""Bytes of a GPU for the CUDA context, libraries' workspaces and fragmentation."""
BUCKET = 50_000_000
"""Elements in one of DeepSpeed's communication buckets, as `ZeroStrategy` has it."""
LIVE = 1_000_000_000
"""DeepSpeed's default number of gathered elements under stage 3."""
_MOST_ROWS = 1 << 16
STRATEGIES = ("one device", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload")
_CONFIGURED = {
    "auto": "DDP",
    "single_device": "one device",
    "ddp": "DDP",
    "ddp_spawn": "DDP",
    "ddp_find_unused_parameters_true": "DDP",
    "ddp_find_unused_parameters_false": "DDP",
    "deepspeed_stage_1": "ZeRO-1",
    "deepspeed": "ZeRO-2",
    "deepspeed_stage_2": "ZeRO-2",
    "deepspeed_stage_3": "ZeRO-3",
    "deepspeed_stage_3_offload": "ZeRO-3 offload",
}


@dataclass(frozen=True)
class StaticMemory:
    """Bytes on one GPU that do not depend on the batch.

    Attributes:
        frozen: Frozen weights.
        trained: Trained weights.
        gradients: Their gradients.
        optimizer: Moments, and the fp32 copy of the trained weights that ZeRO keeps.
        buffers: Communication buckets and gathered weights.
        step: Temporary of the optimizer's step.
        host: In the host's memory, for this GPU.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    buffers: int
    step: int
    host: int = 0

    @property
    def held(self) -> int:
        """Alive all the time."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.buffers

    def peak(self, activations: Activations) -> int:
        """The most at any moment of a step."""
        return self.held + max(activations.peak, self.step)


def configured_strategy(strategy: str, devices: int) -> str:
    """Which of `STRATEGIES` a value of `trainer.strategy` is.

    Args:
        strategy: A name that Lightning knows.
        devices: All of the run.

    Raises:
        ValueError: The plan knows no memory of it.
    """
    if strategy not in _CONFIGURED:
        raise ValueError(f"trainer.strategy is {strategy!r}{nearest(strategy, tuple(_CONFIGURED))}")
    found = _CONFIGURED[strategy]
    return "one device" if found == "DDP" and devices == 1 else found


def frozen_bytes(facts: ModelFacts, numerics: Numerics, four_bit: bool = False) -> int:
    """Frozen weights; with `four_bit` the decoder's linear layers are quantised as bitsandbytes does.

    NF4 keeps a scale for 64 weights, with double quantisation in 8 bits and a little more: 4.13 bits a weight.
    """
    if not four_bit:
        return facts.frozen * numerics.element
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    return (facts.frozen - facts.quantisable) * numerics.element + int(facts.quantisable * bits / 8)


def static_memory(
    strategy: str, facts: ModelFacts, numerics: Numerics, devices: int, four_bit: bool = False
) -> StaticMemory:
    """Weights, gradients, optimizer and buffers of one of `STRATEGIES` on one GPU.

    Args:
        strategy: One of `STRATEGIES`.
        facts: Facts of the model.
        numerics: Bytes of an element.
        devices: All of the run.
        four_bit: Whether the frozen weights are quantised.
    """
    count, frozen = facts.trained, frozen_bytes(facts, numerics, four_bit)
    trained = count * numerics.trained
    whole = StaticMemory(frozen, trained, trained, 2 * trained, 0, trained)
    if four_bit:  # one layer's weights at a time in the precision of the run
        whole = replace(whole, buffers=facts.largest_linear * numerics.element)
    if strategy == "one device":
        return whole
    if strategy == "DDP":
        return replace(whole, buffers=whole.buffers + trained * (devices > 1))
    share = -(-count // devices)
    bucket = BUCKET * numerics.trained
    zero = replace(whole, optimizer=12 * share, step=4 * share, buffers=whole.buffers + 2 * bucket)
    if strategy == "ZeRO-1":
        return zero
    if strategy == "ZeRO-2":
        return replace(zero, gradients=share * numerics.trained)
    live = min(facts.frozen + count, LIVE) * numerics.element
    sharded = replace(
        zero, frozen=-(-frozen // devices), trained=share * numerics.trained, gradients=share * numerics.trained,
        buffers=whole.buffers + bucket + live,
    )  # fmt: skip
    if strategy == "ZeRO-3":
        return sharded
    host = sharded.frozen + sharded.trained + sharded.gradients + sharded.optimizer
    return replace(sharded, frozen=0, trained=0, gradients=0, optimizer=0, step=0, host=host)


def largest_batch(
    static: StaticMemory, predict: ActivationModel, schedule: PruningSchedule, batch: Batch, gpu_memory: int
) -> int:
    """Most rows on one GPU of `gpu_memory` bytes; 0 where not one fits."""
    room = gpu_memory - RESERVE
    tried = range(1, _MOST_ROWS + 1)
    return bisect_left(tried, True, key=lambda n: static.peak(predict(schedule, replace(batch, rows=n))) > room)
