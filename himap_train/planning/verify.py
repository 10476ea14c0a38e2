"""Predictions beside measurements: training steps of two small models are run, and counted, on this machine's CPU.

One is the embedded LLaVA, the other has 100 million random parameters in LLaVA's proportions: 576 image tokens, a
12-layer decoder 768 wide. Each takes the same batch dense and pruned, with and without gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from himap_train.models.llava import base_llava, install_pruning
from himap_train.models.loading import EMBEDDED, load_config, load_llava, resolve_model
from himap_train.planning.activations import ActivationModel
from himap_train.planning.facts import ModelFacts, model_facts
from himap_train.planning.measure import measured_flops, measured_memory
from himap_train.planning.memory import static_memory
from himap_train.planning.quantities import Batch, Numerics
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.training_cost import tokens_of_image, training_flops
from himap_train.training.module import LlavaFineTuner, weights_dtype


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


@dataclass(frozen=True)
class Case:
    """A model and the batch that it takes.

    Attributes:
        name: For the table.
        config: Of the LLaVA.
        path: Of its weights; None for random ones.
        tuner: How it is trained.
        rows: Of the batch.
        text_tokens: Of a row.
        supervised: Of a row.
    """

    name: str
    config: LlavaConfig
    path: str | None
    tuner: LlavaFineTuner
    rows: int
    text_tokens: int
    supervised: int

    @property
    def batch(self) -> Batch:
        """As the plan sees it."""
        return Batch(self.rows, tokens_of_image(self.config), self.text_tokens, self.supervised)


def embedded_case() -> Case:
    """The LLaVA in this package."""
    tuner = LlavaFineTuner(EMBEDDED, lora_r=32, lora_alpha=64, lora_dropout=0.0)
    return Case("embedded", load_config(resolve_model(EMBEDDED)), EMBEDDED, tuner, 8, 40, 8)


def llava_100m_case() -> Case:
    """100 million random parameters."""
    vision = CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=2048, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, vision_feature_layer=-2)
    tuner = LlavaFineTuner(lora_r=16, lora_alpha=32, lora_dropout=0.05)
    return Case("100M", config, None, tuner, 2, 115, 60)


def verify(
    cases: Sequence[Case] | None = None, precisions: Sequence[str] = ("32-true", "bf16-mixed")
) -> list[Comparison]:
    """Run all settings of the cases; FLOPs are counted without autocast, which changes none.

    Args:
        cases: By default both.
        precisions: Of Lightning's.
    """
    rows: list[Comparison] = []
    for case in cases or (embedded_case(), llava_100m_case()):
        facts = model_facts(case.config, case.tuner)
        rows += _static(case, facts)
        schedules = {"dense": PruningSchedule(), "pruned": case.tuner.fitted_schedule(facts.layers)}
        for precision in precisions:
            for name, schedule in schedules.items():
                for checkpointing in (False, True):
                    setting = f"{name}, {'' if checkpointing else 'no '}checkpointing, {precision}"
                    found = _step(case, facts, schedule, checkpointing, precision)
                    rows += [Comparison(case.name, setting, *quantity) for quantity in found]
    return rows


def markdown_table(rows: Sequence[Comparison]) -> str:
    """As GitHub Markdown; FLOPs in GFLOP, memory in MB."""
    lines = ["| model | step | quantity | predicted | measured | error |", "|:--|:--|:--|--:|--:|--:|"]
    for row in rows:
        unit, scale = ("GFLOP", 1e9) if row.quantity == "FLOPs" else ("MB", 1e6)
        numbers = f"{row.predicted / scale:,.1f} {unit} | {row.measured / scale:,.1f} {unit} | {100 * row.error:+.1f} %"
        lines.append(f"| {row.model} | {row.setting} | {row.quantity} | {numbers} |")
    return "\n".join(lines)


def _static(case: Case, facts: ModelFacts) -> list[Comparison]:
    """Weights, gradients and moments, in bytes, after a real optimizer step."""
    model = _model(case, PruningSchedule(), False, "32-true")
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    state = [value for one in optimizer.state.values() for value in one.values() if value.ndim]
    plan = static_memory("one device", facts, Numerics.of("32-true"), 1)
    pairs = {
        "weights": (plan.frozen + plan.trained, _bytes(model.parameters())),
        "gradients": (plan.gradients, _bytes(p.grad for p in trained if p.grad is not None)),
        "optimizer": (plan.optimizer, _bytes(state)),
    }
    return [Comparison(case.name, "any", name, *pair) for name, pair in pairs.items()]


def _step(
    case: Case, facts: ModelFacts, schedule: PruningSchedule, checkpointing: bool, precision: str
) -> Iterator[tuple[str, float, float]]:
    """(quantity, predicted, measured) of one training step."""
    model, batch, inputs = _model(case, schedule, checkpointing, precision), case.batch, _inputs(case)
    attention, chunk = base_llava(model).config._attn_implementation or "sdpa", case.tuner.loss_chunk
    predict = ActivationModel(facts, Numerics.of(precision, on_cpu=True), attention, checkpointing, chunk)
    expected = predict(schedule, batch)
    mixed = weights_dtype(precision) if precision.endswith("mixed") else None
    found = measured_memory(model, inputs, chunk, mixed)
    yield "saved by forward", expected.saved, found.saved
    yield "peak activations", expected.peak, found.peak
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


def _model(case: Case, schedule: PruningSchedule, checkpointing: bool, precision: str) -> nn.Module:
    """As `LlavaFineTuner` sets it up, on weights or random ones."""
    torch.manual_seed(0)
    if case.path is None:
        base = LlavaForConditionalGeneration(deepcopy(case.config)).to(weights_dtype(precision))
    else:
        base = load_llava(case.path, dtype=weights_dtype(precision))[0]
    model = case.tuner.attach(base)
    if checkpointing:
        decoder: Any = base_llava(model).model.language_model
        decoder.activation_checkpointing_enable({"use_reentrant": False})
    return install_pruning(model, schedule).train()


def _inputs(case: Case) -> dict[str, Tensor]:
    """Rows of one image, a prompt and an answer, all of one length."""
    batch, image_id = case.batch, case.config.image_token_id
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        image_id + 1, case.config.text_config.vocab_size, (batch.rows, batch.length), generator=generator
    )
    ids[:, 1 : 1 + batch.image_tokens] = image_id
    labels = ids.clone()
    labels[:, : -batch.supervised] = -100
    size = case.config.vision_config.image_size
    pixels = torch.randn(batch.rows, 3, size, size, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
