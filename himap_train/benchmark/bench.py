"""Measures rows: a method and dense in pairs, on one size and one shape of batch; and what could be saved at most.

That is the ratio of FLOPs, or of bytes where bytes are what a step waits for.
Decoding one token does two FLOPs for each weight that it reads, so it waits for memory: its bound is the ratio of the
bytes that it reads, weights and cache. `generate` is both at once and has no bound of its own.

The cost model counts attention in full, as papers do; a causal kernel skips what is hidden, nearly half. Attention is
what shrinks most, so by the FLOPs that are really run less can be saved: that is the causal bound.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from himap_train.benchmark.contenders import DENSE, Method, find_method, without_choice
from himap_train.benchmark.sizes import TOKENS_PER_IMAGE, Size, build_model
from himap_train.benchmark.tasks import (
    NEW_TOKENS,
    TrainingSteps,
    cache_bytes,
    inference_task,
    peak_bytes,
    prefilled_cache,
)
from himap_train.benchmark.timing import Clock, Spread, Task, time_pairs
from himap_train.benchmark.workload import Batch, Workload, make_batch
from himap_train.models.families import family_of_config
from himap_train.models.lora import attach_lora
from himap_train.models.training_cost import backward_of_attention, training_flops
from himap_train.models.versions import checkpoint_activations
from himap_train.pruning.cost import schedule_cost
from himap_train.pruning.schedule import PruningSchedule


@dataclass(frozen=True)
class Settings:
    """How everything is measured.

    Attributes:
        size: Shape of the model.
        whole: With a vision tower.
        dtype: Dtype of the weights.
        device: As torch names it.
        attention: The attention implementation.
        checkpointing: Gradient checkpointing in training.
        rounds: Pairs.
        seed: Seed of weights and inputs.
        clock: What reads the time on a CPU.
    """

    size: Size
    whole: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    attention: str = "sdpa"
    checkpointing: bool = False
    rounds: int = 5
    seed: int = 0
    clock: Clock = "wall"


class Bench:
    """A model and a batch, and rows measured on them. Inference first: training attaches LoRA to the model for good."""

    def __init__(self, settings: Settings, workload: Workload) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.workload = settings, workload
        model: Any = build_model(
            settings.size,
            whole=settings.whole,
            dtype=settings.dtype,
            device=settings.device,
            attention=settings.attention,
        )
        self.model: Any = model
        self.config: Any = model.config
        self.batch: Batch = make_batch(model, workload, settings.whole, settings.seed)
        self.weights = weight_bytes(model)
        self.steps: TrainingSteps | None = None
        self._peaks: dict[tuple[str, str], int] = {}

    def row(self, measure: str, name: str, each: Callable[[], Any] = lambda: None) -> dict[str, Any]:
        """Time `measure` of a method against dense in pairs.

        Args:
            measure: One of `MEASURES`.
            name: Of the method.
            each: Called after each pair.

        Returns:
            `measure`, `method`, `workload` and `layers`; `seconds` (of one token where
            tokens are decoded), `dense_seconds` and their `ratio` pair by pair, each a `Spread`; `bound`, what the
            ratio could be at least by FLOPs or bytes, None where there is no such bound, and `causal_bound`, where what
            the causal mask hides is no work; `efficiency` and `causal_efficiency`, bound / ratio: 1 where all of the
            promised saving arrives; `flops` of dense and of the method, mean of the samples; `peak`, most bytes alive
            at once beside the weights, and `kv`, bytes of the cache after the prefill (None in training), both also of
            dense as `dense_...`; `tokens_per_second` of the input, or generated ones, of the whole batch; `choosing`,
            the share of a prefill that choosing the tokens takes.
        """
        method, dense = (find_method(which, self.settings.size.layers) for which in (name, DENSE))
        ours, theirs = (self._task(measure, which) for which in (method, dense))
        how = self.settings
        pairs = time_pairs(theirs, ours, how.rounds, self.batch.input_ids.device, clock=how.clock, each=each)
        seconds, ratio = Spread.of(pairs.second), pairs.ratio
        flops, causal = (self._flops(measure, method.schedule, causal) for causal in (False, True))
        bound = flops[1] / flops[0] if flops else None
        if measure == "decode":
            bound = decode_ratio(method.schedule, self.config, self.workload, self.weights, how.dtype.itemsize)
        causal_bound = causal[1] / causal[0] if causal else None
        made = {"decode": self.workload.batch, "generate": self.workload.batch * NEW_TOKENS}
        row = {"measure": measure, "method": name, "workload": self.workload, "layers": how.size.layers}
        row |= {"seconds": seconds, "dense_seconds": Spread.of(pairs.first), "ratio": ratio, "flops": flops}
        row |= {"bound": bound, "efficiency": bound and bound / ratio.median}
        row |= {"causal_bound": causal_bound, "causal_efficiency": causal_bound and causal_bound / ratio.median}
        for side, one, task in (("", method, ours), ("dense_", dense, theirs)):
            cache = None if measure == "training_step" else prefilled_cache(self.model, one, self.batch)
            row[f"{side}peak"] = self._peak(measure, one, task)
            row[f"{side}kv"] = None if cache is None else cache_bytes(cache)
        row["tokens_per_second"] = made.get(measure, self.workload.tokens) / seconds.median
        row["choosing"] = self._choosing(method, ours) if measure == "prefill" else None
        return row

    def _choosing(self, method: Method, ours: Task) -> Spread | None:
        """What choosing takes of a prefill, in pairs with one that keeps as many tokens without choosing."""
        other, how = without_choice(method), self.settings
        if other is None:
            return None
        theirs, device = self._task("prefill", other), self.batch.input_ids.device
        return time_pairs(theirs, ours, how.rounds, device, clock=how.clock).ratio.share()

    def _task(self, measure: str, method: Method) -> Task:
        if measure != "training_step":
            return inference_task(measure, self.model, method, self.batch)
        if self.steps is None:
            self.steps = TrainingSteps(self._with_lora(), self.batch)
        return self.steps.task(method)

    def _with_lora(self) -> Any:
        rank, model = self.settings.size.lora_rank, self.model
        trained = attach_lora(model, r=rank, alpha=2 * rank, projector="train" if self.settings.whole else "freeze")
        if self.settings.checkpointing:
            checkpoint_activations(model.model.language_model)
        return trained.train()

    def _peak(self, measure: str, method: Method, task: Task) -> int:
        key = (measure, method.name)
        if key not in self._peaks:
            self._peaks[key] = peak_bytes(task, self.batch.input_ids.device, self.batch.with_weights(self.model))
        return self._peaks[key]

    def _flops(self, measure: str, schedule: PruningSchedule, causal: bool) -> tuple[float, float] | None:
        if measure not in ("training_step", "prefill"):
            return None
        lora = lora_parameters(self.model) if measure == "training_step" else [0] * self.settings.size.layers
        how: dict[str, Any] = {"whole": self.settings.whole, "checkpointing": self.settings.checkpointing}
        how |= {"lora_parameters": lora, "causal": causal, "attention": self.settings.attention}
        dense, pruned = (
            statistics.fmean(step_flops(measure, kind, self.config, sample, **how) for sample in self.workload.samples)
            for kind in (PruningSchedule(), schedule)
        )
        return dense, pruned


def lora_parameters(model: Any) -> Sequence[int]:
    """Trained parameters of each decoder layer."""
    return [
        sum(p.numel() for name, p in layer.named_parameters() if "lora_" in name)
        for layer in model.model.language_model.layers
    ]


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
    attention: str = "sdpa",
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
        attention: Its implementation, which decides what its backward costs.
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
        attention_backward=backward_of_attention(attention),
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


def weight_bytes(model: Any) -> int:
    """Bytes of the text decoder's layers and `lm_head`: what decoding a token reads beside the cache."""
    parts = (*model.model.language_model.layers.parameters(), *model.lm_head.parameters())
    return sum(part.nbytes for part in parts)
