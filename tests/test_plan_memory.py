"""Memory predictions against what real steps on a CPU allocate, byte by byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from planning_toys import BATCH, toy_batch, toy_config, toy_model
from torch import nn

from himap_train import PruningSchedule, PruningStage
from himap_train.allocations import AllocationCounter
from himap_train.models.features import hidden_states
from himap_train.models.loss import supervised_loss
from himap_train.models.stock import base_model
from himap_train.planning.activations import ActivationModel
from himap_train.planning.cases import embedded_case
from himap_train.planning.device_memory import (
    GIB,
    RESERVE,
    STRATEGIES,
    configured_strategy,
    largest_batch,
    static_memory,
)
from himap_train.planning.facts import Batch, Numerics, count, model_facts
from himap_train.planning.verify import markdown_table, measured_memory, verify
from himap_train.training.module import LlavaFineTuner

PEAK, SAVED = 0.045, 0.03
DENSE, HIMAP = PruningSchedule(), PruningSchedule.from_preset("himap").scaled_to(8)
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"schedule": DENSE},
    "dense-checkpointing": {"schedule": DENSE, "checkpointing": True},
    "dropout": {"schedule": DENSE, "dropout": 0.05},
    "dropout-checkpointing": {"schedule": HIMAP, "dropout": 0.05, "checkpointing": True},
    "mixed": {"schedule": HIMAP, "precision": "bf16-mixed"},
    "mixed-dropout-checkpointing": {
        "schedule": HIMAP, "precision": "bf16-mixed", "dropout": 0.05, "checkpointing": True,
    },
    "eager": {"schedule": HIMAP, "config": {"attn": "eager"}},
    "eager-mixed-checkpointing": {
        "schedule": DENSE, "precision": "bf16-mixed", "config": {"attn": "eager"}, "checkpointing": True,
    },
    "gqa": {"schedule": DENSE, "config": {"kv_heads": 2}},
    "attention-targets": {"schedule": HIMAP, "targets": ["q_proj", "v_proj"]},
    "one-target": {"schedule": HIMAP, "targets": ["down_proj"], "checkpointing": True},
    "frozen-projector": {"schedule": HIMAP, "projector": "freeze"},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_activations_are_those_of_a_real_step(name: str) -> None:
    setting = dict(SETTINGS[name])
    schedule, precision = setting.pop("schedule"), setting.pop("precision", "32-true")
    config, checkpointing = toy_config(**setting.pop("config", {})), setting.pop("checkpointing", False)
    attention, mixed = config._attn_implementation, torch.bfloat16 if precision == "bf16-mixed" else None
    model = toy_model(config, schedule, checkpointing, mixed or torch.float32, **setting)
    saved, peak = measured_memory(model, toy_batch(), 0, mixed)
    numerics = Numerics.of(precision, on_cpu=True)
    predict = ActivationModel(count(model, setting.get("dropout", 0.0)), numerics, attention, checkpointing, 0)
    predicted = predict(schedule, BATCH)
    assert predicted.saved == pytest.approx(saved, rel=SAVED)
    assert predicted.peak == pytest.approx(peak, rel=PEAK)


def test_what_is_saved_is_what_autograd_holds() -> None:
    """The allocation counter against the other way to count: autograd's own saved tensors, each storage once."""
    model, inputs = toy_model(toy_config(), DENSE), toy_batch()
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        supervised_loss(hidden_states(model, **inputs), inputs["labels"], base_model(model).lm_head, 0)
    flat = dict(inputs)
    images = flat.pop("images")
    held |= {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in (*flat.values(), *images.values())
    }
    assert measured_memory(model, inputs, 0)[0] == pytest.approx(sum(s.nbytes() for s in held.values()), rel=0.01)


def test_allocation_counter_by_hand() -> None:
    old = torch.zeros(1000)
    with AllocationCounter([old]) as counter:
        first = old + 1
        view = first.view(10, 100)
        old.add_(1)
        second = torch.cat([view, view])
        assert counter.alive == 3 * 4000
        del first, view
        assert counter.alive == 2 * 4000
        del second
    assert (counter.alive, counter.peak) == (0, 3 * 4000)


def test_embedded_model_as_predicted() -> None:
    """FLOPs and peak within 5 %, what is saved within 4 %, weights, gradients, optimizer to the byte, in 8 settings."""
    rows = verify([embedded_case()])
    assert len(rows) == 3 + 4 * 3 + 4 * 2
    limits = {"FLOPs": 0.05, "saved by forward": 0.04, "peak activations": 0.05}
    wrong = [row for row in rows if abs(row.error) > limits.get(row.quantity, 0.0)]
    assert not wrong, markdown_table(wrong)


def facts(**tuner: Any) -> Any:
    return model_facts(toy_config(), LlavaFineTuner(lora_r=4, lora_alpha=8, **tuner))


def test_meta_device_counts_what_is_real() -> None:
    for projector in ("train", "lora", "freeze"):
        real = count(toy_model(toy_config(), DENSE, projector=projector), 0.05)
        planned = facts(projector=projector)
        assert replace(planned, config=None) == replace(real, config=None)
        assert planned.trained == sum(trained for _, trained in planned.parts.values()) > 0
        assert planned.trains_projector == (projector != "freeze")


def test_strategies_by_hand() -> None:
    """T trained and F frozen parameters, bf16-mixed, 8 devices: the sums of the ZeRO paper with LoRA."""
    known, mixed = facts(), Numerics.of("bf16-mixed")
    trained, frozen = known.trained, known.frozen
    plans = {name: static_memory(name, known, mixed, 8) for name in STRATEGIES}
    one, ddp, zero1, zero2, zero3, offload = plans.values()
    assert (one.frozen, one.trained, one.gradients, one.optimizer, one.buffers) == (
        2 * frozen, 4 * trained, 4 * trained, 8 * trained, 0,
    )  # fmt: skip
    assert ddp.held == one.held + 4 * trained
    share = -(-trained // 8)
    assert (zero1.trained, zero1.gradients, zero1.optimizer) == (4 * trained, 4 * trained, 12 * share)
    assert (zero2.gradients, zero2.frozen) == (4 * share, 2 * frozen)
    assert (zero3.frozen, zero3.trained) == (-(-2 * frozen // 8), 4 * share)
    assert offload.frozen + offload.trained + offload.gradients + offload.optimizer == 0
    assert offload.host == zero3.frozen + zero3.trained + zero3.gradients + zero3.optimizer


def test_quantised_weights() -> None:
    known, mixed = facts(), Numerics.of("bf16-mixed")
    linear = sum(m.weight.numel() for m in _decoder_linear())
    assert known.quantisable == linear
    whole, nf4 = (static_memory("one device", known, mixed, 1, four_bit).frozen for four_bit in (False, True))
    assert whole - nf4 == pytest.approx(linear * (2 - 4.127 / 8), rel=1e-4)


def _decoder_linear() -> list[nn.Linear]:
    decoder = base_model(toy_model(toy_config(), DENSE)).model.language_model
    return [m for name, m in decoder.layers.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]


@pytest.mark.parametrize("schedule", [DENSE, HIMAP], ids=["dense", "pruned"])
def test_largest_batch_fits_and_one_more_does_not(schedule: PruningSchedule) -> None:
    known = facts()
    static = static_memory("one device", known, Numerics.of("32-true"), 1)
    predict = ActivationModel(known, Numerics.of("32-true"), "sdpa", False, 1024)
    room = RESERVE + GIB
    rows = largest_batch(static, predict, schedule, BATCH, room)
    peaks = [static.peak(predict(schedule, replace(BATCH, rows=rows + more))) for more in (0, 1)]
    assert peaks[0] <= GIB < peaks[1]
    assert largest_batch(static, predict, schedule, BATCH, RESERVE) == 0


def test_optimizer_step_is_a_moment_too() -> None:
    known = facts()
    static = static_memory("one device", known, Numerics.of("32-true"), 1)
    predict = ActivationModel(known, Numerics.of("32-true"), "sdpa", True, 1024)
    small = predict(DENSE, Batch(1, 0, 2, 1, 0))
    assert static.peak(replace(small, peak=0)) == static.held + 4 * known.trained


def test_ranking_by_image_rows_costs_more_than_by_the_last_token() -> None:
    predict = ActivationModel(facts(), Numerics.of("32-true"), "sdpa", False, 1024)
    size = {
        criterion: predict(PruningSchedule((PruningStage(2, criterion, 0.5),)), BATCH).ranking
        for criterion in ("image", "instruction", "last_token", "random")
    }
    assert size["image"] > size["instruction"] > size["last_token"] > size["random"] == 0


@pytest.mark.parametrize(
    ("name", "devices", "found"),
    [
        ("auto", 1, "one device"),
        ("auto", 8, "DDP"),
        ("ddp", 2, "DDP"),
        ("deepspeed_stage_3_offload", 2, STRATEGIES[-1]),
    ],
)
def test_configured_strategy(name: str, devices: int, found: str) -> None:
    assert configured_strategy(name, devices) == found


def test_unknown_strategy_lists_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"'deepspeed_stage2'; did you mean 'deepspeed_stage_2'\? valid: .*ddp"):
        configured_strategy("deepspeed_stage2", 8)
