"""Cached image features in families whose images have features of many shapes: kept behind the frozen projector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_examples import llava_record
from PIL import Image
from safetensors.torch import load_file
from test_feature_cache import Watch
from tiny_qwen import KINDS, save_qwen
from tiny_tiles import EVERY, TILED
from training_toys import finetune, quiet_trainer

from himap_train.data.module import LlavaDataModule
from himap_train.models.families import family_of
from himap_train.models.loading import load_config, load_llava, load_processor
from himap_train.models.stock import base_model
from himap_train.models.tower import tower_digest
from himap_train.training.callbacks.step_seeds import StepSeeds
from himap_train.training.module import LlavaFineTuner
from himap_train.training.run.feature_cache import fill_feature_cache
from himap_train.training.run.launch import AroundTraining, FineTuneTrainer

pytestmark = pytest.mark.core

SHAPES = [[(40, 25)], [(16, 16)], [], [(20, 50), (30, 30)], [(64, 20)], [(57, 57)]]
SCHEDULE = {"stages": [{"layer": 1, "criterion": "instruction", "keep_ratio": 0.5}]}

CACHED = [*KINDS, "vipllava", *(name for name in TILED if EVERY[name].family != "llava_onevision")]


@pytest.fixture
def records(tmp_path: Path) -> str:
    """Pictures of many shapes: one, none and several to a record."""
    made = []
    for number, sizes in enumerate(SHAPES):
        names = [f"{number}-{place}.png" for place in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(number))
            Image.fromarray(noise.to(torch.uint8).numpy(), "RGB").save(tmp_path / name)
        made.append(llava_record(str(number), names, "<image>\n" * len(names) + "What?", f"It is number {number}."))
    (tmp_path / "records.json").write_text(json.dumps(made))
    return str(tmp_path / "records.json")


def model_folder(name: str, folder: Path) -> str:
    """A small model and its processor."""
    folder.mkdir()
    return save_qwen(folder, name, layers=3) if name in KINDS else EVERY[name].folder(folder, 3)


class Counted(Watch):
    """Counts the calls of any family's vision tower."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        base = base_model(module.peft_model)
        family_of(base).vision(base).register_forward_pre_hook(self._count)


def fit(model: str, records: str, folder: Path, cache: Any, projector: Any = "freeze", **options: Any) -> Counted:
    """Two epochs; the cache is filled before, as the recipe does."""
    torch.manual_seed(0)
    schedule = options.pop("schedule", SCHEDULE)
    module = LlavaFineTuner(path=model, schedule=schedule, lora_r=4, lora_alpha=8, lora_lr=1e-2, projector=projector)
    processor = load_processor(model, load_config(model))
    data = LlavaDataModule(records, None, batch_size=2, processor=processor, cache_image_features=cache)
    watch, trainer = Counted(), quiet_trainer(folder, kind=FineTuneTrainer, max_epochs=2, **options)
    fill = AroundTraining(lambda: fill_feature_cache(trainer, module.peft_model, data), lambda: None)
    trainer.callbacks[:0] = [fill, StepSeeds(0), watch]
    trainer.fit(module, datamodule=data)
    return watch


@pytest.mark.parametrize("schedule", [SCHEDULE, None], ids=["pruned", "dense"])
@pytest.mark.parametrize("name", CACHED)
def test_training_is_the_same_and_no_step_runs_the_tower(
    name: str, records: str, tmp_path: Path, schedule: Any
) -> None:
    model = model_folder(name, tmp_path / "model")
    plain = fit(model, records, tmp_path / "plain", None, schedule=schedule)
    cached = fit(model, records, tmp_path / "cached", True, schedule=schedule)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-6) and len(set(plain.losses)) == 6
    assert plain.calls >= 6 and cached.calls == 0
    kept = list((tmp_path / "cached").rglob("*.safetensors"))
    tokens = {len(load_file(file)["features"]) for file in kept}
    assert len(kept) == sum(map(len, SHAPES)) and (len(tokens) > 1) == (name != "vipllava")


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", CACHED)
def test_half_precision(name: str, records: str, tmp_path: Path, precision: Any) -> None:
    model = model_folder(name, tmp_path / "model")
    losses = [fit(model, records, tmp_path / str(cache), cache, precision=precision).losses for cache in (None, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_what_makes_the_features_must_be_frozen(records: str, tmp_path: Path) -> None:
    model = model_folder("smolvlm", tmp_path / "model")
    expected = "keeps what the projector gives with family smolvlm.*is trained; set model.projector to freeze"
    with pytest.raises(ValueError, match=expected):
        fit(model, records, tmp_path / "run", True, projector="train")
    one = model_folder("llava_onevision", tmp_path / "one")
    with pytest.raises(ValueError, match="family llava_onevision, which cuts an image otherwise where its conv"):
        fit(one, records, tmp_path / "run", True)


def test_what_cannot_be_cached_is_refused_before_anything_is_loaded_and_by_rehearsals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.path", model_folder("smolvlm", tmp_path / "model"), "--data.cache_image_features", "true"]
    unseen = ["--model.path", "HuggingFaceTB/SmolVLM-500M-Instruct"]  # not on this machine
    for more in ([], ["--rehearse"], ["--rehearse", *unseen]):
        assert finetune(*options, "--model.projector", "train", "--output", str(tmp_path / "run"), *more) == 2
        said = capsys.readouterr()
        assert "and the projector is trained; set model.projector to freeze" in said.err and not said.out
    assert not (tmp_path / "run").exists()


def test_another_projector_has_features_of_its_own(tmp_path: Path) -> None:
    base, _ = load_llava(model_folder("smolvlm", tmp_path / "model"))
    before = tower_digest(base)
    with torch.no_grad():
        next(base.model.connector.parameters()).view(-1)[0] += 1e-3
    assert tower_digest(base) != before
