"""Predictions beside measurements: training steps of two small models are run, and counted, on this machine's CPU.

One is the embedded LLaVA, the other has 100 million random parameters in LLaVA's proportions: 576 image tokens, a
12-layer decoder 768 wide. Each takes the same batch dense and pruned, with and without gradient checkpointing. FLOPs
are those that PyTorch counts, bytes the most that were alive at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from himap_train.allocations import AllocationCounter
from himap_train.evaluation.tables import markdown_lines
from himap_train.models.features import hidden_states
from himap_train.models.loss import supervised_loss
from himap_train.models.stock import base_model
from himap_train.models.training_cost import training_flops
from himap_train.planning.activations import ActivationModel
from himap_train.planning.cases import Case, build_model, embedded_case, inputs_of, llava_100m_case
from himap_train.planning.device_memory import static_memory
from himap_train.planning.facts import ModelFacts, Numerics, model_facts
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.precision import weights_dtype


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
        model: Which.
        setting: Schedule, checkpointing, precision.
        quantity: What is compared.
        predicted: By the plan.
        measured: In a real step.
    """

    model: str
    setting: str
    quantity: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative; positive where the plan asks for more than is needed."""
        return self.predicted / self.measured - 1


def verify(cases: Sequence[Case] | None = None) -> list[Comparison]:
    """Run all settings of the cases, by default both; FLOPs are counted without autocast, which changes none."""
    rows: list[Comparison] = []
    for case in cases or (embedded_case(), llava_100m_case()):
        facts = model_facts(case.config, case.tuner)
        rows += _static(case, facts)
        schedules = {"dense": PruningSchedule(), "pruned": case.tuner.fitted_schedule(facts.layers)}
        for precision in ("32-true", "bf16-mixed"):
            for name, schedule in schedules.items():
                for checkpointing in (False, True):
                    setting = f"{name}, {'' if checkpointing else 'no '}checkpointing, {precision}"
                    found = _step(case, facts, schedule, checkpointing, precision)
                    rows += [Comparison(case.name, setting, *quantity) for quantity in found]
    return rows


def markdown_table(rows: Sequence[Comparison]) -> str:
    """As GitHub Markdown; FLOPs in GFLOP, memory in MB."""
    lines = []
    for row in rows:
        unit, scale = ("GFLOP", 1e9) if row.quantity == "FLOPs" else ("MB", 1e6)
        numbers = [f"{value / scale:,.1f} {unit}" for value in (row.predicted, row.measured)]
        lines.append([row.model, row.setting, row.quantity, *numbers, f"{100 * row.error:+.1f} %"])
    return markdown_lines(["model", "step", "quantity", "predicted", "measured", "error"], lines)


def _static(case: Case, facts: ModelFacts) -> list[Comparison]:
    """Weights, gradients and moments, in bytes, after a real optimizer step."""
    model = build_model(case, PruningSchedule(), False, "32-true")
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    state = [value for one in optimizer.state.values() for value in one.values() if value.ndim]
    plan = static_memory("one device", facts, Numerics.of("32-true"), 1)
    pairs = {
        "weights": (plan.frozen + plan.trained, sum(p.nbytes for p in model.parameters())),
        "gradients": (plan.gradients, sum(p.grad.nbytes for p in trained if p.grad is not None)),
        "optimizer": (plan.optimizer, sum(value.nbytes for value in state)),
    }
    return [Comparison(case.name, "any", name, *pair) for name, pair in pairs.items()]


def _step(
    case: Case, facts: ModelFacts, schedule: PruningSchedule, checkpointing: bool, precision: str
) -> Iterator[tuple[str, float, float]]:
    """(quantity, predicted, measured) of one training step."""
    model, batch, inputs = build_model(case, schedule, checkpointing, precision), case.batch, inputs_of(case)
    attention, chunk = base_model(model).config._attn_implementation or "sdpa", case.tuner.loss_chunk
    predict = ActivationModel(facts, Numerics.of(precision, on_cpu=True), attention, checkpointing, chunk)
    expected = predict(schedule, batch)
    mixed = weights_dtype(precision) if precision.endswith("mixed") else None
    saved, peak = measured_memory(model, inputs, chunk, mixed)
    yield "saved by forward", expected.saved, saved
    yield "peak activations", expected.peak, peak
    if mixed is None:
        cost = training_flops(
            schedule, facts.config, batch.image_tokens, batch.text_tokens,
            lora_parameters=[lora.parameters for lora in facts.lora],
            supervised=batch.supervised,
            trains_projector=facts.trains_projector,
            ends_adapted=facts.ends_adapted,
            checkpointing=checkpointing,
            lm_head_passes=2,
            attention_backward=2,
        )  # fmt: skip
        yield "FLOPs", batch.rows * cost.total, measured_flops(model, inputs, chunk)


def measured_flops(model: nn.Module, batch: dict[str, Any], loss_chunk: int, backward: bool = True) -> int:
    """FLOPs of a step; attention runs product by product, because CPU flash attention has no entry in the counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = step_loss(model, batch, loss_chunk)
        if backward:
            loss.backward()
    model.zero_grad()
    return int(counter.get_total_flops())


def measured_memory(
    model: nn.Module, batch: dict[str, Any], loss_chunk: int, autocast: torch.dtype | None = None
) -> tuple[int, int]:
    """Bytes of a second micro-batch beside weights, gradients and optimizer: gradients are there already, as in all but
    the first of an optimizer step.

    Args:
        model: A LLaVA with LoRA, in training mode; without CPU blocks, where it is to be compared with a plan.
        batch: `input_ids`, `attention_mask`, `labels` and `images`; they are counted too.
        loss_chunk: As in training.
        autocast: The dtype of mixed precision; None for none.

    Returns:
        What is alive when the forward pass has ended, which is what the backward pass needs; the most at any moment.
    """
    step_loss(model, batch, loss_chunk, autocast).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with AllocationCounter([*model.parameters(), *model.buffers(), *gradients]) as counter:
        mine = {name: tensor.clone() for name, tensor in batch.items() if name != "images"}
        mine["images"] = {name: tensor.clone() for name, tensor in batch["images"].items()}
        loss = step_loss(model, mine, loss_chunk, autocast)
        saved = counter.alive
        loss.backward()
    model.zero_grad()
    return saved, counter.peak


def step_loss(model: nn.Module, batch: dict[str, Any], chunk: int, autocast: torch.dtype | None = None) -> Tensor:
    """The sum that `LlavaFineTuner.training_step` computes, over a batch of `input_ids`, `labels`, `images`..."""
    with nullcontext() if autocast is None else torch.autocast(batch["input_ids"].device.type, autocast):
        return supervised_loss(hidden_states(model, **batch), batch["labels"], base_model(model).lm_head, chunk)[0]
