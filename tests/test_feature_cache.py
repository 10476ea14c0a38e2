"""Cached image features: the same training without the vision tower, and what spoils or fills a cache."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from data_examples import image_folder, llava_record
from lightning.pytorch import Callback
from PIL import Image
from processes import dead_process, in_processes
from tiny import IMAGE_TOKENS, tiny_processor
from training_toys import SCHEDULE, collate, finetune, quiet_trainer, sample, tuner

from himap_train import storage
from himap_train.data.cached import DamagedFeaturesError, FeatureStore
from himap_train.data.images import content_digest
from himap_train.data.module import LlavaDataModule
from himap_train.models.families import family_of
from himap_train.models.stock import base_model
from himap_train.models.tower import facts_key, tower_facts
from himap_train.training.callbacks.step_seeds import StepSeeds
from himap_train.training.run.feature_cache import fill_feature_cache
from himap_train.training.run.launch import AroundTraining, FineTuneTrainer

NAMES = tuple(f"{letter}.png" for letter in "abcdef")
DIGESTS = tuple(f"{number:064x}" for number in (1, 2, 3))


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Nine records: one image, two images and text alone in turn; rows of one batch differ in all three."""
    image_folder(tmp_path, NAMES)
    records = []
    for i in range(9):
        names = [NAMES[i % 6], NAMES[(i + 1) % 6]][: i % 3]
        records.append(llava_record(str(i), names, "<image>\n" * len(names) + "What?", "x" * (i * 7 % 30 + 1)))
    (tmp_path / "data.json").write_text(json.dumps(records))
    return str(tmp_path / "data.json")


class Watch(Callback):
    """Losses of all steps and calls of the vision tower within them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validated: list[float] = []
        self.calls = self.features = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        base_model(module.peft_model).model.vision_tower.register_forward_pre_hook(self._count)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.features += batch.get("image_features") is not None

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validated += [float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/loss")]

    def _count(self, *_: Any) -> None:
        self.calls += 1


def fit(tiny: str, data: str, folder: Path, cache: Any, **options: Any) -> Watch:
    """Two epochs; the cache is filled before, as the recipe does."""
    torch.manual_seed(0)
    model = tuner(tiny, **options.pop("model", {}))
    loading = {"cache_image_features": cache, "processor": tiny_processor(), **options.pop("loading", {})}
    module = LlavaDataModule(data, options.pop("validation", None), batch_size=2, **loading)
    watch = Watch()
    trainer = quiet_trainer(folder, kind=FineTuneTrainer, max_epochs=2, **options)
    fill = AroundTraining(lambda: fill_feature_cache(trainer, model.peft_model, module), lambda: None)
    trainer.callbacks[:0] = [fill, StepSeeds(0), watch]
    trainer.fit(model, datamodule=module)
    return watch


def files(folder: Path) -> list[Path]:
    """One for each image."""
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("schedule", [SCHEDULE, None], ids=["pruned", "dense"])
def test_training_is_the_same_to_the_bit_and_no_step_runs_the_tower(
    tiny_path: str, data: str, tmp_path: Path, schedule: Any
) -> None:
    """Batches with no image, one and several to a row."""
    plain = fit(tiny_path, data, tmp_path, None, model={"schedule": schedule})
    cached = fit(tiny_path, data, tmp_path, str(tmp_path / "cache"), model={"schedule": schedule})
    assert cached.losses == plain.losses and len(plain.losses) == 10
    assert (plain.calls, cached.calls) == (10, 0)
    assert (plain.features, cached.features) == (0, 10)
    assert len(files(tmp_path / "cache")) == len(NAMES)


def test_validation_images_that_stay_the_same_are_cached_too(tiny_path: str, data: str, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), (1, 2, 3)).save(tmp_path / "other.png")
    record = llava_record("v", ["other.png"], "<image>\nWhat?", "It is.")
    (tmp_path / "validation.json").write_text(json.dumps([record]))
    given: dict[str, Any] = {"validation": str(tmp_path / "validation.json"), "limit_val_batches": 1.0}
    plain, cached = (fit(tiny_path, data, tmp_path, cache, **given) for cache in (None, True))
    assert cached.validated == plain.validated and len(plain.validated) >= 2
    assert plain.calls > 10 and cached.calls == 0
    assert len(files(tmp_path / "image_features")) == len(NAMES) + 1
    more = [llava_record(name, [name], "<image>\nWhat?", "It is.") for name in ("other.png", *NAMES[:5], "last.png")]
    Image.new("RGB", (50, 40), (3, 2, 1)).save(tmp_path / "last.png")
    (tmp_path / "validation.json").write_text(json.dumps(more))
    few: dict[str, Any] = given | {"limit_val_batches": 2}  # of two each: the last is never looked at
    assert fit(tiny_path, data, tmp_path, str(tmp_path / "few"), **few).calls == 0
    assert len(files(tmp_path / "few")) == len(NAMES) + 1
    # A broken record at their end has the next one in its place.
    broken = [*more[:3], llava_record("broken", ["none.png"], "<image>\nWhat?", "It is."), more[6], *more[3:6]]
    (tmp_path / "validation.json").write_text(json.dumps(broken))
    few["loading"] = {"max_skipped": 1}
    assert fit(tiny_path, data, tmp_path, str(tmp_path / "few"), **few).calls == 0
    assert len(files(tmp_path / "few")) == len(NAMES) + 2
    given["validation"] = "embedded:validation?scenes=4"
    drawn = fit(tiny_path, data, tmp_path, True, **given)
    assert drawn.calls > 0 and len(files(tmp_path / "image_features")) == len(NAMES) + 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_keeps_the_bits_and_half_the_bytes(
    tiny_path: str, data: str, tmp_path: Path, precision: Any
) -> None:
    kwargs: dict[str, Any] = {"precision": precision, "model": {"projector": "freeze"}}
    plain, cached = (fit(tiny_path, data, tmp_path, cache, **kwargs) for cache in (None, True))
    assert cached.losses == plain.losses
    facts = json.loads(next((tmp_path / "image_features").rglob("tower.json")).read_text())
    assert facts["dtype"] == "torch.bfloat16"


def tower_features(base: Any, pixels: torch.Tensor) -> torch.Tensor:
    return family_of(base).tower_features(base, {"pixel_values": pixels})


def project(base: Any, features: torch.Tensor) -> torch.Tensor:
    return family_of(base).project(base, features)


def encode(base: Any, pixels: torch.Tensor) -> torch.Tensor:
    """As the stock model does it."""
    return torch.stack(list(base.get_image_features(pixel_values=pixels).pooler_output))


@pytest.mark.parametrize("layers", [-2, [-2, -1]])
def test_two_halves_are_the_stock_whole(tiny_path: str, layers: Any) -> None:
    model = tuner(tiny_path)
    model.configure_model()
    base, pixels = base_model(model.peft_model), torch.randn(3, 3, 32, 32)
    if layers == -2:
        assert torch.equal(project(base, tower_features(base, pixels)), encode(base, pixels))
    base.config.vision_feature_layer = layers
    seen: list[torch.Tensor] = []
    base.model.multi_modal_projector.forward = lambda features: seen.append(features) or features
    base.model.get_image_features(pixel_values=pixels)
    assert torch.equal(tower_features(base, pixels), seen[0])


def test_autocast_stores_what_the_projector_would_round_to(tiny_path: str) -> None:
    """With weights in fp32 the tower's residual stream is fp32 there, its product with the projector bf16."""
    model = tuner(tiny_path)
    model.configure_model()
    base, pixels = base_model(model.peft_model), torch.randn(3, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = tower_features(base, pixels)
        assert features.dtype == torch.bfloat16
        assert torch.equal(project(base, features), encode(base, pixels))


def test_batch_of_text_alone_runs_the_same_modules(tiny_path: str) -> None:
    """Or other ranks would wait for it under ZeRO-3, and DDP would miss gradients."""
    model = tuner(tiny_path)
    model.configure_model()
    base, calls = base_model(model.peft_model), list[str]()
    for name in ("vision_tower", "multi_modal_projector"):
        getattr(base.model, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    for image in (True, False):
        batch = collate([sample(0, image=image)])
        features = torch.randn(int(image) * IMAGE_TOKENS, 32)
        model.zero_grad()
        model.batch_loss({**batch, "images": {}, "image_features": features})[0].backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert (calls, missing) == (["multi_modal_projector"], [])
        calls.clear()


def test_second_run_computes_nothing(
    tiny_path: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tiny_path, data, tmp_path, str(tmp_path / "cache"))
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    assert f"0 images are there, {6 * 16 * 32 * 4 / 1e6:.1f} MB to write" in capsys.readouterr().out
    fit(tiny_path, data, tmp_path, str(tmp_path / "cache"))
    assert "6 images are there, 0.0 MB to write" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path)} == before


def test_what_a_killed_run_left_half_written_goes(tiny_path: str, data: str, tmp_path: Path) -> None:
    """And what others are writing, here or on other machines, stays."""
    fit(tiny_path, data, tmp_path, str(tmp_path / "cache"))
    folder = files(tmp_path)[0].parent
    gone = folder / f".x.safetensors.{storage._HOST}@{dead_process()}.tmp"
    running, elsewhere = folder / f".x.safetensors.{storage._HOST}@1.tmp", folder / ".x.safetensors.other-host@9.tmp"
    for path in (gone, running, elsewhere):
        path.write_bytes(b"half")
    fit(tiny_path, data, tmp_path, str(tmp_path / "cache"))
    assert not gone.exists() and running.exists() and elsewhere.exists()


def test_a_changed_image_is_computed_again(tiny_path: str, data: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fit(tiny_path, data, tmp_path, str(cache))
    Image.new("RGB", (50, 40), (1, 2, 3)).save(tmp_path / NAMES[0])
    plain, cached = fit(tiny_path, data, tmp_path, None), fit(tiny_path, data, tmp_path, str(cache))
    assert cached.losses == plain.losses and len(files(cache)) == len(NAMES) + 1


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_computed_again(tiny_path: str, data: str, tmp_path: Path, damage: str) -> None:
    """One that is too short before the run starts; flipped bits when they are read, then by a resumed run."""
    cache = tmp_path / "cache"
    expected = fit(tiny_path, data, tmp_path, str(cache)).losses
    file = files(cache)[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content[:-1000] if damage == "cut" else content)
    if damage == "flipped":
        with pytest.raises(DamagedFeaturesError, match=f"{file.name} is damaged and was deleted.* Resume the run"):
            fit(tiny_path, data, tmp_path, str(cache))
    assert fit(tiny_path, data, tmp_path, str(cache)).losses == expected
    assert len(files(cache)) == len(NAMES)


def test_too_small_a_disk_is_refused_with_figures(
    tiny_path: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    needed = 6 * IMAGE_TOKENS * 32 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed - 1))
    expected = r"6 distinct images, 96 tokens x 32 x 4 bytes = 0.0 MB .* They do not fit: .* or set it to null"
    with pytest.raises(ValueError, match=expected):
        fit(tiny_path, data, tmp_path, str(tmp_path / "cache"))
    assert not files(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed))
    Image.new("RGB", (50, 40), (1, 2, 3)).save(tmp_path / "other.png")
    record = llava_record("v", ["other.png"], "<image>\nWhat?", "It is.")
    (tmp_path / "validation.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match="7 distinct images.*data.validation_limit"):  # before a file is written
        fit(tiny_path, data, tmp_path, True, validation=str(tmp_path / "validation.json"), limit_val_batches=1.0)
    assert not files(tmp_path)
    fit(tiny_path, data, tmp_path, str(tmp_path / "cache"))


def test_a_disk_that_fills_up_ends_the_run_and_leaves_whole_files(
    tiny_path: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("himap_train.data.cached.save_file", full)
    with pytest.raises(OSError, match="No space left on device.*Free some space and resume, or set data.cache_image"):
        fit(tiny_path, data, tmp_path, str(tmp_path / "cache"))
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["tower.json"]


def test_what_cannot_be_cached_is_refused(tiny_path: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"varied anew in each epoch.*embedded:train\?scenes=4&fixed=1"):
        fit(tiny_path, "embedded:train?scenes=4", tmp_path, True)
    model = tuner(tiny_path)
    module = LlavaDataModule(data, None, cache_image_features=True, processor=tiny_processor())
    module.setup("fit")
    model.configure_model()
    tower = base_model(model.peft_model).model.vision_tower
    next(tower.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="needs a frozen vision tower; 1 of its tensors are trained"):
        fill_feature_cache(quiet_trainer(tmp_path), model.peft_model, module)


def test_scenes_that_stay_the_same(tiny_path: str, tmp_path: Path) -> None:
    """Drawn images have no file: their pixels are what they are known by."""
    source = "embedded:train?scenes=4&fixed=1"
    assert fit(tiny_path, source, tmp_path, True).losses == fit(tiny_path, source, tmp_path, None).losses
    assert len(files(tmp_path / "image_features")) == 4


def test_broken_image_is_skipped_as_without_cache(tiny_path: str, data: str, tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).write_bytes(b"no image")
    plain = fit(tiny_path, data, tmp_path, None, loading={"max_skipped": 4})
    cached = fit(tiny_path, data, tmp_path, True, loading={"max_skipped": 4})
    assert cached.losses == plain.losses and len(files(tmp_path / "image_features")) == len(NAMES) - 1


def test_workers_read_features(tiny_path: str, data: str, tmp_path: Path) -> None:
    plain = fit(tiny_path, data, tmp_path, None)
    assert fit(tiny_path, data, tmp_path, True, loading={"num_workers": 2}).losses == plain.losses


def test_key_holds_all_that_decides_the_features(tiny_path: str) -> None:
    model = tuner(tiny_path)
    model.configure_model()
    base, processor = base_model(model.peft_model), tiny_processor().image_processor
    keys = [facts_key(tower_facts(base, processor, "pad", "32-true"))]
    assert facts_key(tower_facts(base, processor, "pad", "32-true")) == keys[0]
    keys.append(facts_key(tower_facts(base, processor, "as_processor", "32-true")))
    keys.append(facts_key(tower_facts(base, processor, "pad", "bf16-mixed")))
    processor.image_mean = [0.5, 0.5, 0.5]
    keys.append(facts_key(tower_facts(base, processor, "pad", "32-true")))
    base.config.vision_feature_layer = -1
    keys.append(facts_key(tower_facts(base, processor, "pad", "32-true")))
    base.config.vision_feature_select_strategy = "full"
    keys.append(facts_key(tower_facts(base, processor, "pad", "32-true")))
    with torch.no_grad():
        next(base.model.vision_tower.parameters()).view(-1)[0] += 1e-3
    keys.append(facts_key(tower_facts(base, processor, "pad", "32-true")))
    base.model.vision_tower.bfloat16()
    keys.append(facts_key(tower_facts(base, processor, "pad", "32-true")))
    assert len(set(keys)) == len(keys)


def test_images_are_known_by_content(tmp_path: Path) -> None:
    image_folder(tmp_path, ("a.png", "b.png"))
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    a, b, copy = (content_digest(tmp_path / name, "") for name in ("a.png", "b.png", "copy.png"))
    assert a == copy == content_digest((tmp_path / "a.png").read_bytes(), "") != b
    flat, tall = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert content_digest(flat, "") != content_digest(tall, "") == content_digest(tall.copy(), "")


def test_two_processes_fill_one_folder(tmp_path: Path) -> None:
    """Without knowing of one another: each writes all images while the other reads."""
    values = {f"{number:064x}": torch.full((2, 3), float(number)) for number in range(40)}

    def write() -> int:
        store = FeatureStore(tmp_path, 3, torch.float32)
        for digest, features in values.items():
            if not store.holds(digest, 2):
                store.write(digest, features)
        return sum(torch.equal(store.read(digest)["features"], features) for digest, features in values.items())

    assert in_processes(2, write) == [40, 40]
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]


def test_store_reads_what_it_wrote(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "new", 8, torch.bfloat16)
    batch = torch.randn(3, 4, 8).bfloat16()
    for digest, features in zip(DIGESTS, batch, strict=True):
        store.write(digest, features)
    other = FeatureStore(tmp_path / "new", 8, torch.bfloat16)
    assert all(other.holds(digest, 4) for digest in DIGESTS)
    assert all(
        torch.equal(other.read(digest)["features"], values) for digest, values in zip(DIGESTS, batch, strict=True)
    )
    assert not other.holds(f"{9:064x}", 4) and not other.holds(DIGESTS[0], 99) and other.none().shape == (0, 8)


def test_command_line_fills_and_resumes(
    tiny_path: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model.path", tiny_path, "--data.train", data, "--data.validation", "null", "--data.batch_size", "2"]
    common += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--evaluation.before", "false"]
    common += ["--evaluation.after", "false", "--output", str(tmp_path / "run"), "--model.lora_r", "4"]
    assert finetune(*common, "--data.cache_image_features", "true") == 0
    assert len(files(tmp_path / "run" / "image_features")) == len(NAMES)
    assert "6 distinct images, 96 tokens x 32 x 4 bytes" in capsys.readouterr().out
    assert finetune(*common, "--data.cache_image_features", "null", "--resume") == 0


def written(folder: Path, digest: str = DIGESTS[0]) -> tuple[FeatureStore, Path]:
    store = FeatureStore(folder, 8, torch.float32)
    store.write(digest, torch.ones(4, 8))
    return store, store.file(digest)


def test_files_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        _, path = written(tmp_path)
        (tmp_path / "neighbour").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "neighbour").stat().st_mode) == 0o640


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_what_cannot_be_read_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store, path = written(tmp_path)

    def refused(*args: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("himap_train.data.cached.safe_open", refused)
        with pytest.raises(OSError, match=f"{path.name}: {os.strerror(code)}. Nothing was deleted") as caught:
            store.read(DIGESTS[0])
        assert not isinstance(caught.value, DamagedFeaturesError)
    assert torch.equal(store.read(DIGESTS[0])["features"], torch.ones(4, 8))


def test_a_file_that_its_owner_must_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage that another user has made known by nothing but the file: only he removes it."""
    store, path = written(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(DamagedFeaturesError, match=rf"is damaged and belongs to another user \({path.stat().st_uid}\)"):
        store.read(DIGESTS[0])
    assert path.exists()


def test_another_users_locked_file_ends_the_run_and_stays(
    tiny_path: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    expected = fit(tiny_path, data, tmp_path, str(cache)).losses
    file, opened = files(cache)[0], Path.open

    def locked(self: Path, *args: Any, **options: Any) -> Any:
        if self == file:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", locked)
        with pytest.raises(OSError, match=r"cannot read .*Permission denied.*another folder"):
            fit(tiny_path, data, tmp_path, str(cache))
    assert file.exists() and fit(tiny_path, data, tmp_path, str(cache)).losses == expected
