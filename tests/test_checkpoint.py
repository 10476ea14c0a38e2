"""Adapter == merged == exported and reloaded; the schedule travels along; damage is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from export_toys import PRUNED, logits, trained
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_processor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from himap_train.checkpoints.agreement import check_agreement
from himap_train.checkpoints.export import export_adapter, export_merged
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.models.install import pruning_of, record_pruning, remove_pruning
from himap_train.models.loading import load_llava
from himap_train.models.lora import attach_lora
from himap_train.pruning.reading import read_schedule
from himap_train.pruning.schedule import PruningSchedule

pytestmark = pytest.mark.core

MERGED_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(trained(base), tmp_path_factory.mktemp("run") / "adapter", PRUNED, tiny_processor())


@pytest.mark.parametrize("projector", ["train", "lora", "freeze"])
def test_saved_and_loaded_adapter_computes_the_same(base: str, tmp_path: Path, projector: str) -> None:
    model = trained(base, projector)
    save_adapter(model, tmp_path / "a", PRUNED, tiny_processor())
    loaded, processor = load_checkpoint(tmp_path / "a")
    assert pruning_of(loaded).schedule == PRUNED and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert isinstance(processor, LlavaProcessor)
    dense, _ = load_checkpoint(tmp_path / "a", schedule=None)
    assert torch.equal(logits(dense), logits(remove_pruning(model)))
    assert not torch.equal(logits(dense), logits(loaded))


def test_merged_folder_is_a_stock_model_with_the_schedule_in_its_config(adapter: Path, tmp_path: Path) -> None:
    folder = export_merged(adapter, tmp_path / "merged")
    assert {file.name for file in folder.iterdir()} == MERGED_FILES
    stock, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert pruning_of(stock) is None and stock.config.himap == PRUNED.to_dict()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert not any(str(value).startswith("himap") for value in (config, *config["text_config"].values()))
    dense, _ = load_checkpoint(adapter, schedule=None)
    torch.testing.assert_close(logits(stock.eval()), logits(dense), atol=1e-4, rtol=1e-4)


def test_adapter_equals_merged_equals_reloaded_pruned_too(adapter: Path, tmp_path: Path) -> None:
    model, _ = load_checkpoint(adapter)
    with record_pruning(model) as trace:
        expected = logits(model)
    reloaded, _ = load_checkpoint(export_merged(adapter.parent, tmp_path / "merged"))
    with record_pruning(reloaded) as other:
        torch.testing.assert_close(logits(reloaded), expected, atol=1e-4, rtol=1e-4)
    assert [[row.tolist() for row in stage] for stage in trace.kept] == [
        [row.tolist() for row in stage] for stage in other.kept
    ]
    assert len(trace.kept) == 1
    assert check_agreement(adapter, tmp_path / "merged").same_kept


def test_export_check_notices_other_weights(adapter: Path, base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not compute what"):
        check_agreement(adapter, base)
    copied = export_adapter(adapter.parent, tmp_path / "copy")
    assert check_agreement(adapter, copied).dense == 0


def test_stock_models_and_schedule_overrides(base: str) -> None:
    model, _ = load_checkpoint(base)
    assert not pruning_of(model).schedule.stages
    model, _ = load_checkpoint(base, schedule=PRUNED)
    assert pruning_of(model).schedule == PRUNED


def test_adapter_folder_loads_with_plain_peft(adapter: Path, base: str) -> None:
    plain = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base).eval(), str(adapter))
    dense, _ = load_checkpoint(adapter, schedule=None)
    assert torch.equal(logits(plain.eval()), logits(dense))


def test_schedule_lies_beside_the_adapter_as_plain_yaml(adapter: Path) -> None:
    assert yaml.safe_load((adapter / "pruning.yaml").read_text()) == PRUNED.to_dict()
    assert read_schedule(adapter / "pruning.yaml") == PRUNED


def damaged(adapter: Path, folder: Path, change: str) -> Path:
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_A" in name)
    value = weights.pop(name)
    if change == "renamed":
        weights[name.replace("language_model", "text_model")] = value
    elif change == "empty":
        weights[name] = torch.empty(0)
    save_file(weights, file)
    return folder


@pytest.mark.parametrize(("change", "message"), [("missing", "1 keys are missing"), ("renamed", "1 are unknown")])
def test_adapter_keys_that_do_not_fit_are_refused(adapter: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_checkpoint(damaged(adapter, tmp_path / "damaged", change))


def test_empty_tensors_are_refused(adapter: Path, base: str, tmp_path: Path) -> None:
    """What ZeRO-3 leaves on a rank when nobody gathers."""
    with pytest.raises((ValueError, RuntimeError), match="empty|size mismatch"):
        load_checkpoint(damaged(adapter, tmp_path / "damaged", "empty"))
    model = trained(base)
    next(p for name, p in model.named_parameters() if "lora_A" in name).data = torch.empty(0)
    with pytest.raises(ValueError, match="gather sharded weights first"):
        save_adapter(model, tmp_path / "never", PRUNED)
    assert not (tmp_path / "never").exists()


def test_untrained_adapter_is_warned_about(base: str, tmp_path: Path) -> None:
    model = attach_lora(load_llava(base)[0], r=4, alpha=8, projector="freeze")
    with pytest.warns(UserWarning, match="the adapter changes nothing"):
        load_checkpoint(save_adapter(model, tmp_path / "fresh", PRUNED))


def test_failed_save_leaves_the_old_adapter(adapter: Path, base: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    class FullProcessor:
        def save_pretrained(self, folder: str) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_adapter(trained(base), folder, PruningSchedule(), FullProcessor())  # type: ignore[arg-type]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_saving_again_replaces_the_folder(base: str, tmp_path: Path) -> None:
    save_adapter(trained(base), tmp_path / "a", PRUNED)
    save_adapter(trained(base), tmp_path / "a", PruningSchedule())
    assert not read_schedule(tmp_path / "a" / "pruning.yaml").stages
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_clear_errors(adapter: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    with pytest.raises(FileNotFoundError, match=r"was trained on './gone', which cannot be loaded here.*Pass base="):
        load_checkpoint(moved)
    load_checkpoint(moved, base=str(config["base_model_name_or_path"]))
    with pytest.raises(FileExistsError, match="not empty"):
        export_merged(adapter, moved)
    with pytest.raises(FileNotFoundError, match="has no adapter"):
        export_adapter(tmp_path, tmp_path / "x")
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.touch()
    with pytest.raises(ValueError, match="cannot be read as a training checkpoint"):
        load_checkpoint(checkpoint)
    (moved / "adapter_model.safetensors").unlink()
    with pytest.raises((FileNotFoundError, ValueError)):
        load_checkpoint(moved, base=str(config["base_model_name_or_path"]))


def test_cards_name_schedule_and_loader(adapter: Path, tmp_path: Path) -> None:
    merged = export_merged(adapter, tmp_path / "merged")
    for card in (adapter / "README.md", merged / "README.md"):
        text = card.read_text()
        assert "load_checkpoint" in text and "keep_ratio: 0.5" in text and text.startswith("---\nlibrary_name")
    assert "vLLM" in (merged / "README.md").read_text()


@pytest.mark.parametrize("value", ["himap", {"preset": "himap"}, PruningSchedule.from_preset("himap")])
def test_schedules_are_read_from_every_form(value: object) -> None:
    assert read_schedule(value) == PruningSchedule.from_preset("himap")  # type: ignore[arg-type]
    assert read_schedule(None) == PruningSchedule()
