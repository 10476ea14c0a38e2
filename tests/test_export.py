"""From a training checkpoint file to what others load: adapter, merged model, through `recipes/export.py`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from export_toys import logits
from peft import PeftModel
from recipes_cli import run_recipe
from safetensors.torch import load_file, save_file
from training_toys import SCHEDULE, ToyData, quiet_trainer, save_tiny, tuner
from transformers import LlavaConfig, LlavaForConditionalGeneration

from himap_train.checkpoints import agreement
from himap_train.checkpoints import export as export_module
from himap_train.checkpoints.agreement import check_agreement, require_stock_keys
from himap_train.checkpoints.card import model_card
from himap_train.checkpoints.export import export_adapter, export_merged
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.checkpoints.merge import Merger
from himap_train.checkpoints.run_facts import RunFacts
from himap_train.models.install import pruning_of
from himap_train.models.loading import load_llava
from himap_train.models.lora import attach_lora
from himap_train.pruning.reading import read_schedule
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.callbacks.checkpoints import AtomicCheckpointIO, RememberConfig
from himap_train.training.module import LlavaFineTuner


def train(base: str, folder: Path, **model: Any) -> LlavaFineTuner:
    """A run of three steps with its checkpoints and its adapter, and the model that came out."""
    module = tuner(base, **model)
    config = {"keep": "last", "model": {"path": base, "lora_r": 4}, "data": {"train": "my.json"}, "seed_everything": 7}
    plugins, callbacks = [AtomicCheckpointIO()], [RememberConfig(config)]
    trainer = quiet_trainer(folder, max_steps=3, plugins=plugins, callbacks=callbacks)
    trainer.fit(module, ToyData())
    trainer.save_checkpoint(folder / "checkpoints/last.ckpt")
    save_adapter(module.peft_model, folder / "adapter", module.schedule, module.processor)
    return module


@pytest.fixture(scope="module")
def run(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlavaFineTuner]:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)  # LoRA starts from it: how much a tiny model feels rounding depends on its weights
    return folder, train(base, folder)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("projector", ["train", "lora", "freeze"])
def test_checkpoint_file_alone_makes_the_adapter_that_the_run_saved(base: str, tmp_path: Path, projector: str) -> None:
    module = train(base, tmp_path / "run", projector=projector, lora_targets=["q_proj", "down_proj"])
    alone = Path(shutil.copy(tmp_path / "run/checkpoints/last.ckpt", tmp_path / "elsewhere.ckpt"))
    made, saved = files(export_adapter(alone, tmp_path / "made")), files(tmp_path / "run/adapter")
    assert made.pop("README.md") and saved.pop("README.md")
    assert made == saved
    plain = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), str(tmp_path / "made"))
    dense, _ = load_checkpoint(tmp_path / "made", schedule=None)
    assert torch.equal(logits(plain.eval()), logits(dense))
    assert torch.equal(logits(load_checkpoint(alone)[0]), logits(module.peft_model.eval()))


def test_checkpoint_holds_plain_values_only(run: tuple[Path, LlavaFineTuner]) -> None:
    checkpoint = torch.load(run[0] / "checkpoints/last.ckpt", weights_only=True)
    facts = json.loads(json.dumps(checkpoint["himap_adapter"]))
    assert facts == checkpoint["himap_adapter"]
    assert facts["schedule"] == read_schedule(SCHEDULE).to_dict() and facts["peft"]["r"] == 4


def test_checkpoint_pruned_and_dense_equals_merged(run: tuple[Path, LlavaFineTuner], tmp_path: Path) -> None:
    file = run[0] / "checkpoints/last.ckpt"
    folder = export_merged(file, tmp_path / "merged")
    for schedule in (read_schedule(SCHEDULE), None):
        expected, found = load_checkpoint(file, schedule)[0], load_checkpoint(folder, schedule)[0]
        torch.testing.assert_close(logits(found), logits(expected), atol=1e-4, rtol=1e-4)
    assert pruning_of(load_checkpoint(folder)[0]).schedule == read_schedule(SCHEDULE)


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_command_line_exports_and_checks_in_a_fresh_process(
    run: tuple[Path, LlavaFineTuner], tmp_path: Path, form: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "adapter":  # the other one shows that it is fresh
        monkeypatch.setattr(agreement, "_in_fresh_process", agreement.outputs)
    options = ("--checkpoint", run[0], "--weights", "last", "--output", tmp_path / "out", "--format", form)
    assert run_recipe("export", *options) == 0
    said = capsys.readouterr().out
    assert f"checking it against {run[0]}/checkpoints/last.ckpt in a fresh process" in said
    assert "logits differ by 0.0e+00" in said or form == "merged"
    assert "the same image tokens kept" in said
    if form == "merged":
        options = ("--checkpoint", tmp_path / "out", "--output", tmp_path / "half", "--dtype", "bfloat16", "--no-check")
        assert run_recipe("export", *options, "--max-shard-size", "50KB") == 0
        assert "not checked" in capsys.readouterr().out
        assert len(list((tmp_path / "half").glob("*.safetensors"))) > 2
        found = check_agreement(tmp_path / "out", tmp_path / "half")
        assert 1e-3 < found.dense <= found.tolerance == 5e-2
        assert pruning_of(load_checkpoint(tmp_path / "half")[0]).schedule == read_schedule(SCHEDULE)


def test_a_whole_model_has_no_base(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe("export", "--checkpoint", base, "--output", tmp_path / "out", "--base", base) == 2
    assert "is a whole model, which has no base; leave out --base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fresh_process_notices_what_a_stock_model_would_not_load(
    run: tuple[Path, LlavaFineTuner], tmp_path: Path
) -> None:
    folder = export_merged(run[0], tmp_path / "merged")
    require_stock_keys(folder)
    weights = load_file(folder / "model.safetensors")
    weights["language_model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="could not be loaded in a fresh process(?s:.*)1 unexpected_keys"):
        check_agreement(run[0], folder, fresh_process=True)


def test_check_notices_weights_that_are_not_numbers(run: tuple[Path, LlavaFineTuner], tmp_path: Path) -> None:
    folder = export_merged(run[0], tmp_path / "merged")
    weights = load_file(folder / "model.safetensors")
    weights["language_model.lm_head.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not compute what"):
        check_agreement(run[0], folder)


def test_check_notices_a_small_update_that_is_lost(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that moves logits by less than rounding may: so little training, or half precision."""
    model, processor = load_llava(base)
    model = attach_lora(model, r=4, alpha=8, projector="freeze")
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 5e-5 * torch.randn_like(weight)
    adapter = save_adapter(model, tmp_path / "a", PruningSchedule(), processor)
    right = check_agreement(adapter, export_merged(adapter, tmp_path / "merged"))
    old = Merger._update
    monkeypatch.setattr(Merger, "_update", lambda self, name: 0.0 * old(self, name))
    lost = export_merged(adapter, tmp_path / "lost")
    with pytest.raises(ValueError, match="what was trained is not in it") as error:
        check_agreement(adapter, lost)
    by = float(re.search(r"by ([\d.e-]+) from the adapter", str(error.value))[1])
    assert right.dense < by < right.tolerance


def test_check_notices_another_schedule(run: tuple[Path, LlavaFineTuner], tmp_path: Path) -> None:
    """The weights are right and dense logits agree, but it would be pruned as nobody trained it."""
    folder = export_merged(run[0], tmp_path / "merged")
    config = json.loads((folder / "config.json").read_text())
    for change in ({"keep_ratio": 0.25}, {"criterion": "random"}):
        stage = {**config["himap"]["stages"][0], **change}
        (folder / "config.json").write_text(json.dumps({**config, "himap": {"stages": [stage]}}))
        with pytest.raises(ValueError, match="does not keep the image tokens that"):
            check_agreement(run[0], folder)


def test_base_that_is_not_here_is_named(run: tuple[Path, LlavaFineTuner], base: str, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run[0] / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    for export in (export_merged, export_adapter):
        with pytest.raises(FileNotFoundError, match="was trained on './gone', and that is not here.*--base"):
            export(adapter, tmp_path / "never")
        export(adapter, tmp_path / export.__name__, base=base)


def test_check_is_of_the_checkpoint_itself(run: tuple[Path, LlavaFineTuner]) -> None:
    """Pruned and dense outputs differ, and are those of the model that was trained."""
    found = agreement.outputs(run[0] / "checkpoints/last.ckpt")
    assert found.dtype == "float32" and len(found.kept) == 1
    assert not torch.allclose(found.dense, found.pruned)


def other_base(folder: Path, **kwargs: Any) -> str:
    return save_tiny(folder, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": 5}, r"text_config.num_hidden_layers: 6 then, 5 in"),
        ({"hidden": 64}, r"text_config.hidden_size: 32 then, 64 in"),
        ({"text": "qwen2"}, r"text_config.model_type: 'llama' then, 'qwen2' in"),
    ],
)
def test_another_base_is_refused_with_what_differs(
    run: tuple[Path, LlavaFineTuner], tmp_path: Path, kwargs: dict[str, Any], message: str
) -> None:
    other = other_base(tmp_path / "other", **kwargs)
    for attempt in (
        lambda: export_merged(run[0], tmp_path / "never", base=other),
        lambda: export_adapter(run[0], tmp_path / "never", base=other),
        lambda: load_checkpoint(run[0] / "checkpoints/last.ckpt", base=other),
    ):
        with pytest.raises(ValueError, match=f"is not the model that the adapter was trained on(?s:.*){message}"):
            attempt()
    assert not (tmp_path / "never").exists()


def test_another_base_of_the_same_shapes_is_told_by_its_config(
    run: tuple[Path, LlavaFineTuner], base: str, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 1e6
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rope_parameters: .*10000.* then, .*1000000"):
        export_merged(run[0], tmp_path / "never", base=str(other))


def test_shapes_tell_where_the_adapter_names_no_config(run: tuple[Path, LlavaFineTuner], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run[0] / "adapter", tmp_path / "adapter"))
    (adapter / "base_model.json").unlink()  # as PEFT alone writes it
    with pytest.raises(ValueError, match=r"does not fit .*(?s:.*)\(64, 32\) here, \(128, 64\) in the base"):
        export_merged(adapter, tmp_path / "never", base=other_base(tmp_path / "other", hidden=64))


HALF_DELETED = {
    "adapter/adapter_model.safetensors": "has no adapter_model.safetensors .*checkpoints/last.ckpt",
    "adapter/adapter_config.json": "has no adapter_config.json",
    "adapter/pruning.yaml": "has no pruning.yaml",
    "adapter": r"has no adapter: .*Give .*checkpoints/last.ckpt instead",
}


@pytest.mark.parametrize("gone", HALF_DELETED)
def test_half_deleted_run_says_what_is_gone_and_what_is_left(
    run: tuple[Path, LlavaFineTuner], tmp_path: Path, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run[0], tmp_path / "run"))
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for attempt in (lambda: load_checkpoint(folder), lambda: export_merged(folder, tmp_path / "never")):
        with pytest.raises(FileNotFoundError, match=HALF_DELETED[gone]):
            attempt()
    assert (
        run_recipe("export", "--checkpoint", folder, "--weights", "last", "--output", tmp_path / "out", "--no-check")
        == 0
    )
    assert run_recipe("export", "--checkpoint", folder, "--weights", "best", "--output", tmp_path / "no") == 2
    assert "has no checkpoints/best.ckpt" in capsys.readouterr().err


def test_half_deleted_base_or_merged_model(run: tuple[Path, LlavaFineTuner], base: str, tmp_path: Path) -> None:
    sharded = export_merged(run[0], tmp_path / "sharded", max_shard_size="100KB")
    (sharded / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of its weight files, the first is model-00002"):
        export_merged(sharded, tmp_path / "never")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="model.safetensors is damaged or incomplete"):
        export_merged(run[0], tmp_path / "never", base=str(other))
    (other / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors and no .*fetch the whole model"):
        export_merged(run[0], tmp_path / "never", base=str(other))
    (other / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"are pickled \(pytorch_model.bin\).*save_pretrained"):
        export_merged(run[0], tmp_path / "never", base=str(other))


def test_model_without_some_weights_is_not_loaded_with_random_ones(base: str, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    del weights["language_model.model.layers.3.mlp.up_proj.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no weights for 1 parameters, the first is model.language_model.layers.3.mlp"):
        load_checkpoint(other)


def test_checkpoints_that_make_no_adapter(run: tuple[Path, LlavaFineTuner], tmp_path: Path) -> None:
    file = run[0] / "checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["himap_adapter"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="was written by an older version. Export the run's `adapter` folder"):
        export_merged(tmp_path / "old.ckpt", tmp_path / "never")
    (tmp_path / "cut.ckpt").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read as a training checkpoint"):
        export_adapter(tmp_path / "cut.ckpt", tmp_path / "never")


def test_quantised_base_is_refused(run: tuple[Path, LlavaFineTuner], base: str, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="are quantised.*--base"):
        export_merged(run[0], tmp_path / "never", base=str(other))


def test_full_disk_is_known_before_and_leaves_nothing_behind(
    run: tuple[Path, LlavaFineTuner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "write_shards", full)
        with pytest.raises(OSError, match="could not save .*No space left on device.*MB free"):
            export_merged(run[0], tmp_path / "never")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="needs 0.00 GB and .* has 0.00 GB free; free some space"):
        export_merged(run[0], tmp_path / "never")
    assert list(tmp_path.iterdir()) == []


def test_command_line_refuses_what_makes_no_sense(
    run: tuple[Path, LlavaFineTuner], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: object) -> str:
        assert run_recipe("export", "--output", tmp_path / "never", *options) == 2
        return capsys.readouterr().err

    assert "is for --format merged" in refused("--checkpoint", run[0], "--format", "adapter", "--dtype", "float16")
    assert "has no adapter" in refused("--checkpoint", base, "--format", "adapter")
    assert "is no size" in refused("--checkpoint", run[0], "--max-shard-size", "big")
    assert "no hub id" in refused("--checkpoint", "runs/not/there")
    assert not (tmp_path / "never").exists()


def test_card_tells_data_schedule_cost_training_scores_and_loading(
    run: tuple[Path, LlavaFineTuner], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run[0], tmp_path / "run"))
    config = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["himap_config"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "versions.json").write_text(json.dumps({"torch": "2.13.0"}))
    overall = {"score": 0.914, "standard_error": 0.011, "count": 700}
    row = {"name": "adapted pruned", "metric": "exact", "overall": overall, "cost": {"flops_ratio": 0.421}}
    (folder / "metrics.json").write_text(json.dumps({"rows": [row]}))
    card = (export_merged(folder, tmp_path / "merged") / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front  # a folder on this machine
    assert str(tmp_path.parent) not in card
    # of 16 image tokens 8 stay from layer 2 of 6 on; 115 text tokens: (2 * 131 + 4 * 123) / (6 * 131) of the cache
    for text in (
        "| adapted pruned | 91.4 ± 1.1 | 700 | 0.421 |",
        "| train | `my.json` |",
        "| model.lora_r | `4` |",
        "| seed_everything | `7` |",
        "| image tokens | 16 in layers 0-1, 8 in layers 2-5 | 16 |",
        f"| ratio | {(2 * 131 + 4 * 123) / (6 * 131):.3f} | 1 |",
        "torch 2.13.0",
        'load_checkpoint("this-folder", schedule=None)',
        "AutoModelForImageTextToText.from_pretrained",
        "A model of family `llava` (`model_type` llava).",
        "vLLM and SGLang",
        "keep_ratio: 0.5",
    ):
        assert text in card
    tokens = {"image_tokens": 16.0, "text_tokens": 24.2}
    dense = {"name": "adapted, evaluated dense", "metric": "exact", "overall": {**overall, "score": 0.9}}
    (folder / "metrics.json").write_text(json.dumps({"rows": [row, dense | tokens]}))
    card = (export_merged(folder, tmp_path / "measured") / "README.md").read_text()
    assert (
        "16 image tokens and 24 text tokens" in card and f"| ratio | {(2 * 40 + 4 * 32) / (6 * 40):.3f} | 1 |" in card
    )
    assert "Run dense, as engines without pruning do, this model loses 1.4 points: 90.0 % for 91.4 %." in card
    unknown = {"name": "x", "metric": "exact", "overall": {"score": 1.0, "standard_error": None, "count": 1}}
    (folder / "metrics.json").write_text(json.dumps({"rows": [row, unknown]}))
    assert "| x | 100.0 | 1 | - |" in (export_merged(folder, tmp_path / "one") / "README.md").read_text()
    adapter = (export_adapter(folder / "checkpoints/last.ckpt", tmp_path / "a") / "README.md").read_text()
    assert "91.4" in adapter and yaml.safe_load(adapter.split("---")[1])["library_name"] == "peft"
    other = shutil.copy(folder / "checkpoints/last.ckpt", folder / "checkpoints/best.ckpt")
    assert "91.4" not in (export_merged(other, tmp_path / "best") / "README.md").read_text()  # not what was measured
    assert "Scores" not in (export_merged(run[0], tmp_path / "bare") / "README.md").read_text()


def test_card_names_a_base_on_the_hub(base: str) -> None:
    config = LlavaConfig.from_pretrained(base)
    for merged, library in ((False, "peft"), (True, "transformers")):
        text = model_card("llava-hf/llava-1.5-7b-hf", PruningSchedule(), config, RunFacts(), merged)
        front = yaml.safe_load(text.split("---")[1])
        assert (front["base_model"], front["library_name"]) == ("llava-hf/llava-1.5-7b-hf", library)
        assert "llava-1.5-7b-hf, fine-tuned\n" in text
    quantized = model_card("a/b", PruningSchedule(), config, RunFacts({"model": {"quantize": "4bit"}}))
    assert "QLoRA" in quantized and "QLoRA" not in text
