"""The four things that are timed, as tasks on one model: a training step, the prefill, decoding, `generate`; memory.

Prefill and decoding run without LoRA, as a merged checkpoint does; the training step is that of `LlavaFineTuner`:
`hidden_states`, the loss at supervised positions alone, AdamW over LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from himap_train.allocations import AllocationCounter
from himap_train.benchmark.contenders import Method
from himap_train.benchmark.timing import Task
from himap_train.benchmark.workload import Batch
from himap_train.models.features import hidden_states
from himap_train.models.loss import supervised_loss
from himap_train.models.stock import base_model
from himap_train.models.versions import CACHE

NEW_TOKENS = 64
"""Tokens that `generate` adds."""
DECODED = 16
"""Tokens of a timed stretch of decoding."""


def inference_task(measure: str, model: nn.Module, method: Method, batch: Batch) -> Task:
    """Prefill, decode or generate, of a model in evaluation mode."""
    base: Any = base_model(model)
    state: dict[str, Any] = {}

    @contextmanager
    def within() -> Iterator[None]:
        with torch.no_grad(), method.active(model):
            yield

    def prepare() -> None:
        if measure == "decode":
            state["cache"] = _prefill(base, batch, method.peer)[CACHE]

    def run() -> None:
        if measure == "decode":
            _decode(base, state["cache"], batch)
        elif measure == "generate":
            _generate(base, batch)
        else:
            _prefill(base, batch, method.peer)

    return Task(run, within, prepare, DECODED if measure == "decode" else 1)


@torch.no_grad()
def prefilled_cache(model: nn.Module, method: Method, batch: Batch) -> Any:
    """The KV cache after a prefill."""
    with method.active(model):
        return _prefill(base_model(model), batch, method.peer)[CACHE]


def _prefill(model: Any, batch: Batch, peer: bool) -> Any:
    extra = {"image_token_mask": _image_mask(model, batch)} if peer else {}
    return model(input_ids=batch.input_ids, **batch.images(), use_cache=True, logits_to_keep=1, **extra)


def _decode(model: Any, cache: Any, batch: Batch) -> None:
    token, mask = batch.input_ids[:, -1:], batch.given.get("attention_mask")
    for _ in range(DECODED):
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        token = model(input_ids=token, attention_mask=mask, use_cache=True, **{CACHE: cache}).logits.argmax(-1)


def _generate(model: Any, batch: Batch) -> Any:
    return model.generate(
        input_ids=batch.input_ids, **batch.images(), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
    )


def _image_mask(model: Any, batch: Batch) -> Any:
    return batch.input_ids == model.config.image_token_id


class TrainingSteps:
    """Steps on one model with LoRA, in training mode, and one batch; all methods share its weights and optimizer."""

    def __init__(self, model: PeftModel, batch: Batch) -> None:
        self.model = model
        self.batch = batch
        self.device = batch.input_ids.device
        self.dtype = base_model(model).dtype
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def task(self, method: Method) -> Task:
        """One step of a method."""
        return Task(partial(self._step, method.peer), lambda: method.active(self.model))

    def _step(self, peer: bool) -> None:
        base, batch = base_model(self.model), self.batch
        # Frozen weights that are not fp32 mean mixed precision: LoRA always is.
        mixed = nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)
        with mixed:
            if peer:
                masks = {"image_token_mask": _image_mask(base, batch), "supervised_mask": batch.labels != -100}
                given: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
                hidden = base.model(**given, **batch.images(), **masks).last_hidden_state
            else:
                given = {"input_ids": batch.input_ids, "labels": batch.labels}
                hidden = hidden_states(self.model, **given, **batch.for_states())
            total, count = supervised_loss(hidden, batch.labels, base.lm_head)
        (total / count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for feature in self.batch.features:
            feature.grad = None


def peak_bytes(task: Task, device: torch.device, held: Iterable[Tensor]) -> int:
    """The most bytes that are alive at once in one run of a task that has run before, beside what is `held`.

    On a GPU by the allocator's own statistics. On the CPU every tensor that an operation returns is followed until it
    is freed, which gives the same number each time; what a kernel allocates inside itself is not seen.

    Args:
        task: What to run.
        device: Where it runs.
        held: Weights, inputs and what else is there before and not counted.
    """
    with task.within():
        task.prepare()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            task.run()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with AllocationCounter(held) as counter:
            task.run()
        return counter.peak


def cache_bytes(cache: Any) -> int:
    """Keys and values of all layers."""
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
