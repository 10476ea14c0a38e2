"""What the saving could be at most: the ratio of FLOPs, or of bytes where bytes are what a step waits for.

Decoding one token does two FLOPs for each weight that it reads, so it waits for memory: its bound is the ratio of the
bytes that it reads, weights and cache. `generate` is both at once and has no bound of its own.

The cost model counts attention in full, as papers do; a causal kernel skips what is hidden, nearly half. Attention is
what shrinks most, so by the FLOPs that are really run less can be saved: that is the causal bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from himap_train.benchmark.sizes import TOKENS_PER_IMAGE
from himap_train.benchmark.workload import Workload
from himap_train.models.families import family_of_config
from himap_train.models.training_cost import training_flops
from himap_train.pruning.cost import schedule_cost
from himap_train.pruning.schedule import PruningSchedule


def step_flops(
    measure: str,
    schedule: PruningSchedule,
    config: Any,
    workload: Workload,
    *,
    lora_parameters: Sequence[int],
    whole: bool = False,
    checkpointing: bool = False,
    causal: bool = False,
) -> float:
    """FLOPs of a training step or a prefill of one sample; the vision tower is in it if the model is `whole`.

    Args:
        measure: "training_step" or "prefill".
        schedule: What is removed where.
        config: Configuration of the model.
        workload: Shape of the batch.
        lora_parameters: Those of each decoder layer.
        whole: Whether images go through the tower.
        checkpointing: Whether layers run again in the backward pass.
        causal: Leave out what the causal mask hides.
    """
    images = workload.image_tokens / TOKENS_PER_IMAGE if whole else 0
    if measure == "prefill":
        prefill = schedule_cost(schedule, config, workload.image_tokens, workload.text_tokens, causal=causal).flops
        return prefill + images * family_of_config(config).vision_flops(config, TOKENS_PER_IMAGE)
    step = training_flops(
        schedule,
        config,
        workload.image_tokens,
        workload.text_tokens,
        lora_parameters=lora_parameters,
        supervised=workload.answer,
        images=images,
        checkpointing=checkpointing,
        lm_head_passes=2,
        causal=causal,
    )
    return step.total


def decode_ratio(
    schedule: PruningSchedule, config: Any, workload: Workload, weights: int, bytes_per_value: int
) -> float:
    """Bytes that decoding a token reads, pruned / dense: all weights once, and the cache of each sample."""
    pruned, dense = (
        weights
        + sum(
            schedule_cost(
                kind, config, sample.image_tokens, sample.text_tokens, bytes_per_value=bytes_per_value
            ).kv_bytes
            for sample in workload.samples
        )
        for kind in (schedule, PruningSchedule())
    )
    return pruned / dense
