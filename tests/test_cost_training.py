"""FLOPs of a training step against PyTorch's own counter over real forward and backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planning_toys import BATCH, toy_batch, toy_config, toy_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from himap_train import PruningSchedule, PruningStage
from himap_train.models.families.pixels import tower_flops
from himap_train.models.training_cost import FLASH_BACKWARD, training_flops
from himap_train.planning.facts import count
from himap_train.planning.verify import measured_flops

WITHIN = 0.02
HIMAP = PruningSchedule.from_preset("himap").scaled_to(8)
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"schedule": PruningSchedule()},
    "pruned": {"schedule": HIMAP},
    "dense-checkpointing": {"schedule": PruningSchedule(), "checkpointing": True},
    "pruned-checkpointing": {"schedule": HIMAP, "checkpointing": True},
    "gqa": {"schedule": HIMAP, "config": {"kv_heads": 2}},
    "qwen2": {"schedule": HIMAP, "config": {"text": "qwen2"}},
    "few-targets": {"schedule": HIMAP, "targets": ["q_proj", "v_proj"], "checkpointing": True},
    "large-rank": {"schedule": HIMAP, "r": 64},
    "frozen-projector": {"schedule": HIMAP, "projector": "freeze"},
    "chunked-loss": {"schedule": HIMAP, "chunk": 5},
    "random": {"schedule": PruningSchedule((PruningStage(2, "random", 0.25),))},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_flops_are_those_of_a_real_step(name: str) -> None:
    setting = dict(SETTINGS[name])
    config, schedule, chunk = toy_config(**setting.pop("config", {})), setting.pop("schedule"), setting.pop("chunk", 0)
    checkpointing = setting.pop("checkpointing", False)
    model = toy_model(config, schedule, checkpointing, **setting)
    facts = count(model, 0.0)
    cost = training_flops(
        schedule, config, BATCH.image_tokens, BATCH.text_tokens,
        lora_parameters=[layer.parameters for layer in facts.lora],
        supervised=BATCH.supervised,
        trains_projector=facts.trains_projector,
        ends_adapted=facts.ends_adapted,
        checkpointing=checkpointing,
        lm_head_passes=3 if chunk else 2,
        attention_backward=2,
    )  # fmt: skip
    assert BATCH.rows * cost.total == pytest.approx(measured_flops(model, toy_batch(), chunk), rel=WITHIN)


@pytest.mark.parametrize("layers", [1, 3])
def test_flops_of_the_vision_tower_are_those_of_a_real_forward(layers: int) -> None:
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=2, image_size=56,
        patch_size=14,
    )  # fmt: skip
    tower = CLIPVisionModel(config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(3, 3, 56, 56))
    assert 3 * tower_flops(config, 16) == counter.get_total_flops()


def test_a_training_step_by_hand() -> None:
    """One layer, width 128, MLP 352, 100 tokens, LoRA of 1000 parameters: forward, backward and forward again."""
    config = toy_config()
    config.text_config.num_hidden_layers = 1
    cost = training_flops(PruningSchedule(), config, 64, 36, lora_parameters=[1000], checkpointing=True)
    linear, attention, lora = 2 * 100 * (4 * 128**2 + 3 * 128 * 352), 4 * 100**2 * 128, 2 * 100 * 1000
    assert cost.forward == cost.recompute == linear + attention + lora
    assert cost.backward == linear + 2 * lora + FLASH_BACKWARD * attention
    assert cost.decoder == cost.forward + cost.backward + cost.recompute
    assert cost.lm_head == 0


def test_pruning_saves_as_much_in_training_as_in_the_prefill() -> None:
    config = toy_config()
    lora = [0] * 8
    pruned = training_flops(HIMAP, config, 576, 115, lora_parameters=lora)
    dense = training_flops(PruningSchedule(), config, 576, 115, lora_parameters=lora)
    prefill = HIMAP.cost(config, image_tokens=576, text_tokens=115).flops_ratio
    assert pruned.forward / dense.forward == pytest.approx(prefill)
    assert pruned.decoder / dense.decoder == pytest.approx(prefill, abs=0.05)
