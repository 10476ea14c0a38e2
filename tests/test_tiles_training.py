"""Families that cut pictures into tiles, through training, evaluation, adapters, export, planning and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_examples import encode_prompt
from PIL import Image
from recipes_cli import run_recipe
from tiny_tiles import EVERY, IMAGE_ID, PLAIN, TILED
from torch.utils.flop_counter import FlopCounterMode
from training_toys import finetune, run_main
from transformers import AutoModelForImageTextToText

from himap_train.checkpoints.export import export_merged
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.data.encode import Encoder
from himap_train.data.records import Conversation, Turn
from himap_train.models.families import family_of, family_of_config
from himap_train.models.install import install_pruning, pruning_of
from himap_train.models.loading import load_llava, stock_model
from himap_train.models.lora import attach_lora, trainable_report
from himap_train.models.published import find_config
from himap_train.models.stock import base_model
from himap_train.models.tower import check_frozen, tower_facts
from himap_train.models.training_cost import tokens_of_image
from himap_train.pruning.reading import read_schedule
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

pytestmark = pytest.mark.core

SCHEDULE = {"stages": [{"layer": 1, "criterion": "instruction", "keep_ratio": 0.5}]}


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy(), "RGB")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every family's model and processor on disk."""
    return {name: tiny.folder(tmp_path_factory.mktemp(name), 3) for name, tiny in EVERY.items()}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA JSON of pictures of many shapes: one, several, none."""
    folder = tmp_path_factory.mktemp("data")
    made = []
    for number, sizes in enumerate([((40, 25),), ((16, 16),), (), ((20, 50), (30, 30)), ((64, 20),), ((9, 9),)]):
        names = [f"{number}-{place}.png" for place in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            noise(size, number).save(folder / name)
        turns = [
            {"from": "human", "value": "<image>\n" * len(names) + "What is it?"},
            {"from": "gpt", "value": f"It is number {number}."},
        ]
        image = {} if not names else {"image": names[0] if len(names) == 1 else names}
        made.append({"id": str(number), "conversations": turns, **image})
    (folder / "records.json").write_text(json.dumps(made))
    return folder


@pytest.mark.parametrize("projector", ["train", "lora", "freeze"])
@pytest.mark.parametrize("name", EVERY)
def test_lora_is_in_the_decoder_and_the_projector_alone(name: str, projector: Any, folders: Any) -> None:
    model = attach_lora(load_llava(folders[name])[0], r=4, alpha=8, projector=projector)
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [key for key in trained if f".{EVERY[name].tower}." in key or "image_newline" in key]
    in_projector = [key for key in trained if f".{EVERY[name].projector}." in key]
    assert bool(in_projector) == (projector != "freeze")
    linear = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in in_projector if "lora_" in key}
    layers = {"proj"} if EVERY[name].family == "smolvlm" else {"linear_1", "linear_2"}
    assert linear == (layers if projector == "lora" else set())
    decoder = {key.split(".lora_")[0] for key in trained if f".{EVERY[name].decoder}." in key}
    assert len(decoder) == 3 * 7 and all("lora_" in key for key in trained if f".{EVERY[name].decoder}." in key)
    assert "projector" in trainable_report(model)


@torch.no_grad()
def logits(model: Any, processor: Any) -> torch.Tensor:
    conversation = Conversation("a", (noise((40, 25)),), (Turn("user", "<image>\nWhat?"),))
    sample = Encoder(processor).encode_prompt(conversation)
    return model(input_ids=sample["input_ids"][None], **sample["images"][0]).logits


@pytest.mark.parametrize("projector", ["train", "lora"])
@pytest.mark.parametrize("name", EVERY)
def test_an_adapter_is_saved_loaded_and_merged(name: str, projector: Any, folders: Any, tmp_path: Path) -> None:
    model, processor = load_llava(folders[name])
    torch.manual_seed(0)
    model = install_pruning(attach_lora(model, r=4, alpha=8, projector=projector).eval(), read_schedule(SCHEDULE))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "adapter", read_schedule(SCHEDULE), processor)
    again, _ = load_checkpoint(tmp_path / "adapter")
    assert pruning_of(again).schedule.to_dict()["stages"] == SCHEDULE["stages"]
    expected = logits(model, processor)
    torch.testing.assert_close(logits(again, processor), expected, atol=1e-4, rtol=1e-4)
    merged = export_merged(tmp_path / "adapter", tmp_path / "merged")
    stock, wrong = stock_model(merged)
    assert not any(wrong.values()) and type(stock) is type(base_model(model))
    opened, reader = load_checkpoint(merged)
    assert pruning_of(opened).schedule.to_dict()["stages"] == SCHEDULE["stages"]
    torch.testing.assert_close(logits(opened, reader), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", EVERY)
def test_the_recipe_trains_evaluates_and_answers(name: str, folders: Any, records: Path, tmp_path: Path) -> None:
    config = {
        "output": str(tmp_path / "run"),
        "model": {"path": folders[name], "schedule": SCHEDULE, "lora_r": 4, "lora_alpha": 8, "lora_lr": 1e-2},
        "data": {
            "train": str(records / "records.json"), "validation": str(records / "records.json"),
            "test": str(records / "records.json"), "image_folder": str(records), "batch_size": 2, "max_length": 400,
            "group_by_length": True,
        },
        "trainer": {
            "accelerator": "cpu", "max_steps": 4, "max_epochs": -1, "val_check_interval": 2, "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
        "evaluation": {"limit": 4, "during": 2, "max_new_tokens": 2},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert finetune("--config", str(tmp_path / "config.json")) == 0
    rows = json.loads((tmp_path / "run/metrics.json").read_text())["rows"]
    assert [bool(row["schedule"]["stages"]) for row in rows] == [False, True, True, False]
    model, processor = load_checkpoint(tmp_path / "run")
    before = dict(load_llava(folders[name])[0].model.get_submodule(EVERY[name].projector).named_parameters())
    after = base_model(model).model.get_submodule(EVERY[name].projector).modules_to_save["default"].named_parameters()
    assert all(not torch.equal(value, before[key]) for key, value in after)
    conversation = Conversation("a", (noise((40, 25)),), (Turn("user", "<image>\nWhat?"),))
    sample = encode_prompt(conversation, processor)
    made = model.generate(input_ids=sample["input_ids"][None], **sample["images"][0], max_new_tokens=3)
    assert made.shape[1] > len(sample["input_ids"])
    assert pruning_of(model).last.kept == [round(0.5 * int((sample["input_ids"] == IMAGE_ID).sum()) + 1e-6)]


@pytest.mark.parametrize("name", TILED)
def test_features_of_a_trained_projector_and_padding_are_refused_by_the_familys_name(
    name: str, folders: Any, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f" with family {EVERY[name].family}"):
        check_frozen(load_llava(folders[name])[0])
    options = [
        "--model.path", folders[name], "--data.train", str(records / "records.json"), "--data.image_folder",
        str(records), "--data.image_aspect_ratio", "pad", "--output", str(tmp_path / "run"), "--trainer.accelerator",
        "cpu", "--trainer.max_steps", "1",
    ]  # fmt: skip
    assert finetune(*options) == 2
    assert f"'pad' does not go with family {EVERY[name].family}" in capsys.readouterr().err


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_llavas_other_towers_can_have_their_features_cached(name: str, folders: Any) -> None:
    model, processor = load_llava(folders[name])
    check_frozen(freeze(model))
    images = Encoder(processor).encode(Conversation("a", (noise((40, 25)),), _TALK))["images"][0]
    family: Any = family_of(model)
    found = family.project(model, family.tower_features(model, images))
    features = model.get_image_features(**images).pooler_output
    assert torch.equal(found.flatten(0, 1), torch.cat(list(features)))
    facts = tower_facts(model, processor.image_processor, "as_processor", "32-true")
    assert facts["select_strategy"] == ("full" if name == "siglip-full" else "default")


def freeze(model: Any) -> Any:
    model.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", EVERY)
def test_flops_of_tower_and_projector_are_those_that_run(name: str, folders: Any) -> None:
    model, processor = load_llava(folders[name], attn_implementation="eager")
    family = family_of(model)
    # Sizes whose tokens tell how many tiles they came from.
    for size in ((31, 31) if name == "llava_onevision" else (33, 33), (16, 16)):
        picture = noise(size)
        image = Encoder(processor).encode(Conversation("a", (picture,), _TALK))["images"][0]
        tokens = family.image_tokens(processor, image)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            family.encode_images(model, image)
        counts = {module: sum(ops.values()) for module, ops in counter.flop_counts.items()}
        tower, projector = (
            counts[type(model.model.get_submodule(part)).__name__]
            for part in (EVERY[name].tower, EVERY[name].projector)
        )
        assert tower == pytest.approx(family.vision_flops(model.config, tokens), rel=0.02)
        assert projector == pytest.approx(sum(family.projector_flops(model.config, tokens)), rel=0.01)


_TALK = (Turn("user", "<image>\nWhat?"), Turn("assistant", "Red."))


@pytest.mark.parametrize(
    ("path", "tokens", "crops", "billions"),
    [
        ("llava-hf/llava-v1.6-mistral-7b-hf", 2340, 5, (7.0, 8.2)),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", 2340, 5, (7.0, 8.2)),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", 2929, 5, (7.0, 8.2)),
        ("OpenGVLab/InternVL3-8B-hf", 3328, 13, (7.0, 8.2)),
        ("HuggingFaceTB/SmolVLM-500M-Instruct", 832, 13, (0.507482304, 0.507482304)),  # as its model page says
    ],
)
def test_a_plan_is_made_for_a_photo(
    path: str, tokens: int, crops: int, billions: tuple[float, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the published architectures, without a hub: 640 x 480 pixels."""
    config, where = find_config(path)
    family = family_of_config(config)
    assert "its published architecture" in where and config.architectures[0].startswith(type(config).__name__[:-6])
    assert tokens_of_image(config) == tokens
    one = 3 * (448 if family.name == "internvl" else config.vision_config.image_size) ** 2
    assert family.vision_sizes(config, tokens).pixels == crops * one
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
    assert billions[0] <= parameters / 1e9 <= billions[1]
    assert run_main("plan", "--model.path", path, "--text_tokens", "100") == 0
    assert f"{tokens} -> {round(tokens / 2 + 0.01)} -> " in capsys.readouterr().out


@pytest.mark.parametrize("name", TILED)
def test_kept_tokens_are_drawn_over_the_picture(name: str, folders: Any, tmp_path: Path) -> None:
    noise((40, 25)).save(tmp_path / "photo.png")
    options = ["--checkpoint", folders[name], "--image", tmp_path / "photo.png", "--question", "What?"]
    schedule = json.dumps({"stages": [{"layer": 0, "criterion": "first-k", "keep_ratio": 0.5}]})
    drawn = tmp_path / "kept.png"
    assert run_recipe("generate", *options, "--max-new-tokens", 2, "--schedule", schedule, "--show-kept", drawn) == 0
    width, height = Image.open(drawn).size
    assert width == 12 + 2 * (336 + 12) and height == 12 + 2 * (210 + 12 + 30)  # two views, one stage


@pytest.mark.parametrize("trained", ["vision", "decoder"])
@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_a_part_that_is_trained_in_place_meets_the_others_in_one_dtype(name: str, trained: str, folders: Any) -> None:
    """Their stock forward gives image features the tower's dtype; frozen weights are bf16 under bf16-mixed."""
    model, processor = load_llava(folders[name], dtype="bfloat16")
    peft_model = attach_lora(model, r=2, alpha=4, **{trained: "train"})
    install_pruning(peft_model, PruningSchedule((PruningStage(1, "instruction", 0.5),)))
    sample = Encoder(processor).encode(Conversation("a", (noise((40, 25)),), _TALK))
    with torch.autocast("cpu", torch.bfloat16):
        loss = peft_model.train()(
            input_ids=sample["input_ids"][None], labels=sample["labels"][None], **sample["images"][0]
        ).loss
    loss.backward()
    part = {"vision": model.model.vision_model, "decoder": model.model.text_model}[trained]
    assert any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())
