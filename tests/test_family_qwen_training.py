"""Qwen-VL trained, asked and planned: LoRA beside the tower, steps through the module, FLOPs held to a counter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_examples import image_folder, llava_record
from tiny_qwen import KINDS, VALUES, make_case, save_qwen, tiny_qwen
from torch.utils.flop_counter import FlopCounterMode
from training_toys import quiet_trainer, run_main, tuner
from transformers import AutoModelForImageTextToText

from himap_train import PruningSchedule, install_pruning, load_llava
from himap_train.data.module import LlavaDataModule
from himap_train.data.sources import open_source
from himap_train.evaluation.evaluate import evaluate
from himap_train.models.families import family_of, family_of_config
from himap_train.models.features import encode_nothing, hidden_states
from himap_train.models.lora import attach_lora, trainable_report
from himap_train.models.published import find_config
from himap_train.models.stock import base_model
from himap_train.models.tower import check_frozen

pytestmark = pytest.mark.core

STAGES = {
    "stages": [
        {"layer": 0, "criterion": "stride", "keep_ratio": 0.75},
        {"layer": 2, "criterion": "instruction", "keep_ratio": 0.5},
    ]
}
PUBLISHED = {  # parameters, as the hub counts them
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
}


def trained(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_qwen(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA file: one image, none, two turns; pictures lie beside it."""
    folder = tmp_path_factory.mktemp("records")
    image_folder(folder, tuple(f"{number}.png" for number in range(4)))
    made = [
        llava_record(f"r{n}", f"{n}.png", "<image>\nWhich colour?", f"Colour {n}", "Sure?", "Yes") for n in range(4)
    ]
    made += [llava_record("text", None, "Hi", "Hello"), llava_record("last", "0.png", "What?\n<image>", "A square")]
    (folder / "train.json").write_text(json.dumps(made))
    return folder / "train.json"


# LoRA.


@pytest.mark.parametrize("targets", ["decoder-linear", ["q_proj", "v_proj", "down_proj"]])
@pytest.mark.parametrize("projector", ["train", "lora", "freeze"])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_leaves_the_tower_and_takes_the_mergers(kind: str, projector: str, targets: Any) -> None:
    """Towers have layers of the decoder's names too; the mergers stand below the tower."""
    model = attach_lora(tiny_qwen(kind), r=4, alpha=8, targets=targets, projector=projector)
    names, mergers = trained(model), family_of(base_model(model)).projector_names
    below = [name for name in names if ".visual." in name]
    assert all(any(f"{merger}." in name for merger in mergers) for name in below)
    assert all(any(f"{merger}." in name for name in below) == (projector != "freeze") for merger in mergers)
    assert all(("lora_" in name) == (projector == "lora") for name in below)
    if projector == "train":
        assert len(below) == len([name for name, _ in tiny_qwen(kind).named_parameters() if "merger" in name])
    linear = 7 if targets == "decoder-linear" else 3
    assert len([name for name in names if "language_model" in name]) == 6 * linear * 2
    report = trainable_report(model)
    assert "vision tower" in report and "0 of" in next(line for line in report.splitlines() if "vision tower" in line)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_tower_feeds_an_fp32_merger_under_autocast(kind: str) -> None:
    model = attach_lora(tiny_qwen(kind).to(torch.bfloat16), r=4, alpha=8)
    install_pruning(model, PruningSchedule.from_dict(STAGES))
    case = make_case(["t3 i3x4 t4 a3", "t5 a2"])
    with torch.autocast("cpu", torch.bfloat16):
        states = hidden_states(
            model, input_ids=case.input_ids, attention_mask=case.attention_mask, images=case.images(),
            labels=case.labels,
        )  # fmt: skip
        states.float().pow(2).sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_can_be_encoded(kind: str) -> None:
    model = tiny_qwen(kind)
    encoded = encode_nothing(model)
    assert [part.shape for part in encoded.pooler_output] == [(1, 48)]


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_a_trained_projector_are_not_cached(kind: str) -> None:
    family = family_of(tiny_qwen(kind)).name
    with pytest.raises(ValueError, match=f"with family {family}, and the projector is trained; set model.projector"):
        check_frozen(tiny_qwen(kind))


# A run.


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_steps_and_an_evaluation(checkpoint: str, records: Path, checkpointing: bool, tmp_path: Path) -> None:
    module = tuner(checkpoint, schedule=STAGES, gradient_checkpointing=checkpointing)
    data = LlavaDataModule(str(records), str(records), batch_size=3, max_length=200)
    data.processor = load_llava(checkpoint)[1]
    losses: list[float] = []
    module.log = lambda name, value, **_: losses.append(float(value)) if name == "train/loss" else None  # type: ignore[method-assign]
    quiet_trainer(tmp_path, max_steps=12).fit(module, data)
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    result = evaluate(module.peft_model, data.processor, open_source(str(records)), max_new_tokens=2, progress=False)
    assert len(result.predictions) == 6
    stock = AutoModelForImageTextToText.from_pretrained(checkpoint)
    mergers = family_of(stock).projector_names
    for name, parameter in stock.model.visual.named_parameters(prefix="model.visual"):
        path = next((merger for merger in mergers if name.startswith(f"{merger}.")), None)
        copied = name if path is None else name.replace(path, f"{path}.modules_to_save.default")
        now = base_model(module.peft_model).get_parameter(copied)
        assert torch.equal(now.detach(), parameter) == (path is None), name


# Sizes.


@pytest.mark.parametrize("grid", [(3, 4), (7, 5), (1, 9)])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_tower_and_mergers_equal_those_counted(kind: str, grid: tuple[int, int]) -> None:
    model = tiny_qwen(kind, attn="eager")
    family, tokens = family_of(model), grid[0] * grid[1]
    pixels = torch.randn(4 * tokens, VALUES)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.visual(pixels, grid_thw=torch.tensor([[1, 2 * grid[0], 2 * grid[1]]]))
    predicted = family.vision_flops(model.config, tokens) + sum(family.projector_flops(model.config, tokens))
    # Windows at the border of an image have fewer patches than are counted here.
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.05 if kind == "qwen2_5_vl" else 0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_known_without_the_hub(name: str) -> None:
    config, where = find_config(name)
    assert where == f"{name} cannot be reached: its published architecture"
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    family = family_of_config(config)
    assert family.tokens_of_config(config) == (300 if "Qwen3" in name else 391)  # 640x480 by 32 and by 28
    for projector in family.projector_names:
        model.get_submodule(projector)


@pytest.mark.parametrize("config", ["qwen2_vl_himap", "qwen3_vl_himap"])
def test_its_config_can_be_planned(config: str, tmp_path: Path) -> None:
    file, path = tmp_path / "plan.json", Path(__file__).parents[1] / "configs" / f"{config}.yaml"
    assert run_main("plan", "--config", str(path), "--text-tokens", "115", "--json", str(file)) == 0
    dense, pruned = json.loads(file.read_text())["sides"]
    assert pruned["flops"]["vision"] == dense["flops"]["vision"] > 0
    assert pruned["prefill"]["flops_ratio"] < 0.7
