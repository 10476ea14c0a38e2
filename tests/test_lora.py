"""LoRA reaches the decoder's linear layers and, on request, the projector; never the vision tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import tiny_llava

from himap_train.models.lora import attach_lora, trainable_report
from himap_train.models.stock import base_model

pytestmark = pytest.mark.core

DECODER_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def trained(model: PeftModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def lora_modules(model: PeftModel) -> set[str]:
    return {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained(model) if "lora_" in name}


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_default_targets_are_all_linear_layers_of_the_decoder_and_nothing_else(text: str) -> None:
    modules = lora_modules(attach_lora(tiny_llava(text, layers=3), r=4, alpha=8))
    assert len(modules) == 3 * len(DECODER_LINEAR)
    assert all(name.startswith("model.language_model.layers.") for name in modules)
    assert {name.rsplit(".", 1)[-1] for name in modules} == DECODER_LINEAR


@pytest.mark.parametrize("projector", ["train", "lora", "freeze"])
@pytest.mark.parametrize("targets", ["decoder-linear", ["q_proj", "v_proj"], r".*language_model.*\.(q|v)_proj"])
def test_vision_tower_is_never_trained(targets: str | list[str], projector: str) -> None:
    model = attach_lora(tiny_llava(), r=4, alpha=8, targets=targets, projector=projector)
    assert not [name for name in trained(model) if "vision_tower" in name]
    per_layer = len(DECODER_LINEAR) if targets == "decoder-linear" else 2
    decoder = [name for name in lora_modules(model) if "language_model" in name]
    assert len(decoder) == 6 * per_layer


def test_projector_modes() -> None:
    full = attach_lora(tiny_llava(), r=4, alpha=8, projector="train")
    assert {n.split("modules_to_save.default.")[1] for n in trained(full) if "multi_modal_projector" in n} == {
        "linear_1.weight",
        "linear_1.bias",
        "linear_2.weight",
        "linear_2.bias",
    }
    low_rank = attach_lora(tiny_llava(), r=4, alpha=8, projector="lora")
    assert all("lora_" in name for name in trained(low_rank))
    assert {n.rsplit(".", 1)[-1] for n in lora_modules(low_rank) if "projector" in n} == {"linear_1", "linear_2"}
    frozen = attach_lora(tiny_llava(), r=4, alpha=8, projector="freeze")
    assert not [name for name in trained(frozen) if "projector" in name]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "match nothing; the decoder has the linear layers down_proj, gate_proj, k_proj"),
        (["q_proj", "query"], r"\['query'\] match nothing"),
        ("q_proj", "match nothing"),
        ([], "match nothing"),
        (r".*\.q_proj", "outside the decoder, the first is 'model.vision_tower"),
        ("(", "not a valid regular expression"),
    ],
)
def test_wrong_targets_are_refused_with_what_there_is(targets: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_lora(tiny_llava(), r=4, alpha=8, targets=targets)


@pytest.mark.parametrize("wrong", [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"projector": "frozen"}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        attach_lora(tiny_llava(), **{"r": 4, "alpha": 8, **wrong})


def test_fresh_lora_changes_nothing_and_base_weights_stay() -> None:
    stock, model = tiny_llava(), attach_lora(tiny_llava(), r=4, alpha=8).eval()
    ids = torch.arange(5, 17)[None]
    assert torch.equal(stock(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_is_trained_is_fp32_over_half_precision_weights() -> None:
    model = attach_lora(tiny_llava().to(torch.bfloat16), r=4, alpha=8)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert base_model(model).model.vision_tower.dtype == torch.bfloat16


def test_report_counts_parts() -> None:
    model = tiny_llava()
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    everything = sum(p.numel() for p in model.parameters())
    lines = trainable_report(attach_lora(model, r=4, alpha=8)).splitlines()
    found = {line.split()[0]: line.split() for line in lines[1:]}
    assert found["projector"][1:] == [f"{projector:,}", "of", f"{projector:,}"]
    assert found["vision"][2] == "0"
    lora = int(found["lora"][1].replace(",", ""))
    assert found["all"][3] == f"{everything + lora:,}"
