"""`data.max_image_tokens`: images are made smaller for it, in training, in what is planned, and ever after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from recipes_cli import recipe_module, run_recipe
from tiny_qwen import KINDS, save_qwen
from tiny_tiles import EVERY, SIDE

from himap_train.checkpoints.load import load_checkpoint
from himap_train.data.encode import Encoder
from himap_train.data.module import LlavaDataModule
from himap_train.models.families.image_form import limit_images
from himap_train.models.loading import load_config, load_processor
from himap_train.training.init_adapter import processor_of

SIZES = [(16, 16), (40, 25), (64, 64), (200, 130), (300, 300), (31, 90)]


def _processor(folder: str) -> Any:
    return load_processor(folder, load_config(folder))


def _tokens(processor: Any, size: tuple[int, int]) -> int:
    """Of an encoded picture, and by its size alone, which must agree."""
    encoder = Encoder(processor)
    image = encoder.family.encode_image(processor, Image.new("RGB", size), "as_processor")
    counted = encoder.family.image_tokens(processor, image)
    assert encoder.family.tokens_of_size(processor, size, "as_processor") == counted
    return counted


@pytest.mark.parametrize("most", [1, 6, 13, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_qwen_images_have_no_more_tokens_and_small_ones_as_many_as_before(kind: str, most: int, tmp_path: Path) -> None:
    folder = save_qwen(tmp_path, kind)
    stock, limited = _processor(folder), limit_images(_processor(folder), most)
    before, now = ([_tokens(processor, size) for size in SIZES] for processor in (stock, limited))
    assert max(now) <= most
    assert [tokens for tokens, old in zip(now, before, strict=True) if old <= most] == [
        old for old in before if old <= most
    ]
    assert max(now) > most // 2 or now == before  # no smaller than they must be


@pytest.mark.parametrize(
    ("name", "tiles", "expected"),
    [
        *[("internvl", *fit) for fit in ((1, 1), (2, 1), (3, 3), (4, 4), (99, 7))],
        *[("smolvlm", *fit) for fit in ((1, 1), (4, 1), (5, 5), (9, 5), (10, 10), (99, 10))],
        ("idefics3", 9, 5),
    ],
)
def test_there_are_as_many_tiles_as_fit_with_their_thumbnail(
    name: str, tiles: int, expected: int, tmp_path: Path
) -> None:
    folder = EVERY[name].folder(tmp_path, 2)
    processor = _processor(folder)
    one = int(processor.settings["tile_tokens"])
    limit_images(processor, tiles * one + one - 1)
    assert max(_tokens(processor, size) for size in SIZES) == expected * one
    with pytest.raises(ValueError, match=rf"data.max_image_tokens is {one - 1}: .* one tile, has {one}"):
        limit_images(processor, one - 1)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_families_with_sizes_of_their_own_refuse(name: str, tmp_path: Path) -> None:
    processor = _processor(EVERY[name].folder(tmp_path, 2))
    with pytest.raises(ValueError, match=f"data.max_image_tokens is {SIDE}: images of family {name} .*prune them"):
        LlavaDataModule("embedded:train", max_image_tokens=SIDE, processor=processor)


def test_what_was_trained_on_small_images_is_asked_about_small_ones(tmp_path: Path) -> None:
    folder = save_qwen(tmp_path / "base", "qwen2_5_vl")
    for number in range(4):
        Image.new("RGB", (300, 300), (60 * number, 0, 90)).save(tmp_path / f"{number}.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    options = {
        "model.path": folder, "model.schedule": "{stages: [{layer: 2, criterion: uniform, keep_ratio: 0.5}]}",
        "model.lora_r": 2, "data.train": tmp_path / "data.json", "data.validation": "null", "data.batch_size": 2,
        "data.test": tmp_path / "data.json", "data.max_image_tokens": 6, "trainer.max_steps": 1,
        "trainer.accelerator": "cpu", "evaluation.before": "false", "output": tmp_path / "run", "loggers": "[]",
    }  # fmt: skip
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert recipe_module("finetune").main(argv) == 0
    rows = json.loads((tmp_path / "run/metrics.json").read_text())["rows"]
    assert [row["image_tokens"] for row in rows] == [4.0, 4.0]
    assert max(_tokens(_processor(folder), size) for size in SIZES) > 6
    exported = tmp_path / "exported"
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert (
        run_recipe("export", "--checkpoint", last, "--format", "adapter", "--output", exported, "--base", folder) == 0
    )
    merged = tmp_path / "merged"
    assert run_recipe("export", "--checkpoint", last, "--output", merged, "--base", folder) == 0
    for checkpoint in (tmp_path / "run/adapter", last, exported, merged):
        processor = load_checkpoint(checkpoint, base=None if checkpoint == merged else folder)[1]
        assert _tokens(processor, (300, 300)) == 4, checkpoint
    for start in (tmp_path / "run", last):
        assert _tokens(processor_of(folder, str(start)), (300, 300)) == 4, start


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_a_plan_knows_of_it(tmp_path: Path) -> None:
    planned = {}
    for most in ("null", "64"):
        file = tmp_path / f"{most}.json"
        config = str(Path(__file__).parents[1] / "configs/qwen2_vl_himap.yaml")
        argv = ["--config", config, "--data.max_image_tokens", most, "--text-tokens", "115", "--json", str(file)]
        assert recipe_module("plan").main(argv) == 0
        planned[most] = json.loads(file.read_text())["sides"][0]["flops"]["vision"]
    assert planned["64"] < planned["null"] / 4
    llava = str(Path(__file__).parents[1] / "configs/llava_himap.yaml")
    assert recipe_module("plan").main(["--config", llava, "--data.max_image_tokens", "64", "--text-tokens", "9"]) == 2
