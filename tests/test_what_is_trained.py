"""DoRA, rsLoRA, and training that goes on from an adapter: trained, saved, loaded, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_toys import PRUNED, logits, trained
from tiny import tiny_llava, tiny_processor
from training_toys import ToyData, finetune, quiet_trainer, save_tiny, tuner

from himap_train.checkpoints.export import export_adapter, export_merged
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.models.install import remove_pruning
from himap_train.training.module import LlavaFineTuner
from himap_train.training.run import loggers

KINDS: list[dict[str, Any]] = [{"dora": True}, {"rslora": True}, {"dora": True, "rslora": True, "projector": "lora"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


def fit(path: str, folder: Path, **model: Any) -> tuple[LlavaFineTuner, Path]:
    """Two steps; the module and its training checkpoint."""
    module = tuner(path, **model)
    trainer = quiet_trainer(folder, max_steps=2)
    trainer.fit(module, datamodule=ToyData())
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, folder / "last.ckpt"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_saved_and_merged_compute_the_same(base: str, tmp_path: Path, kind: dict[str, Any]) -> None:
    model = trained(base, **kind)
    save_adapter(model, tmp_path / "a", PRUNED, tiny_processor())
    assert torch.equal(logits(load_checkpoint(tmp_path / "a")[0]), logits(model))
    folder = export_merged(tmp_path / "a", tmp_path / "merged")
    merged, by_peft = load_checkpoint(folder, schedule=None)[0], remove_pruning(model).merge_and_unload()
    torch.testing.assert_close(dict(merged.state_dict()), dict(by_peft.state_dict()), atol=1e-6, rtol=1e-5)


def test_dora_trains_magnitudes_and_a_checkpoint_becomes_an_adapter(base: str, tmp_path: Path) -> None:
    module, checkpoint = fit(base, tmp_path, use_dora=True)
    fresh = tuner(base, use_dora=True)
    fresh.configure_model()
    start = dict(fresh.named_parameters())
    moved = [name for name, p in module.named_parameters() if "magnitude" in name and not torch.equal(p, start[name])]
    assert len(moved) == 6 * 7
    loaded, _ = load_checkpoint(export_adapter(checkpoint, tmp_path / "a"))
    assert torch.equal(logits(loaded), logits(module.peft_model.eval()))


def test_magnitudes_that_are_gone_are_noticed(base: str, tmp_path: Path) -> None:
    save_adapter(trained(base, dora=True), tmp_path / "a", PRUNED, tiny_processor())
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": False}))
    with pytest.raises(ValueError, match="magnitude vectors"):
        export_merged(tmp_path / "a", tmp_path / "merged")


@pytest.mark.parametrize("kind", [{}, {"use_dora": True, "projector": "lora"}], ids=str)
@pytest.mark.parametrize("source", ["folder", "checkpoint"])
def test_training_goes_on_from_an_adapter(base: str, tmp_path: Path, kind: dict[str, Any], source: str) -> None:
    module, start = fit(base, tmp_path, **kind)
    if source == "folder":
        start = save_adapter(module.peft_model, tmp_path / "a", PRUNED)
    other = tuner(base, init_adapter=str(start), schedule=None, **kind)
    other.configure_model()
    assert not other.schedule.stages
    assert torch.equal(logits(other.peft_model.eval()), logits(remove_pruning(module.peft_model.eval())))
    quiet_trainer(tmp_path, max_steps=1).fit(other, datamodule=ToyData())
    assert other.global_step == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"lora_r": 8}, "model.lora_r 4, not 8"),
        ({"lora_alpha": 4}, "model.lora_alpha 8, not 4"),
        ({"use_rslora": True}, "model.use_rslora False, not True"),
        ({"use_dora": True}, "model.use_dora False, not True"),
        ({"lora_targets": ["q_proj"]}, r"72 are not trained here .* set model.lora_targets"),
        ({"projector": "freeze"}, "4 are not trained here .*projector"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(
    base: str, tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    adapter = save_adapter(trained(base), tmp_path / "a", PRUNED)
    with pytest.raises(ValueError, match=message):
        tuner(base, init_adapter=str(adapter), **other).configure_model()


def test_an_adapter_of_another_base_is_refused(base: str, tmp_path: Path) -> None:
    adapter = save_adapter(trained(base), tmp_path / "a", PRUNED)
    tiny_llava(layers=4).save_pretrained(tmp_path / "other")
    tiny_processor().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="num_hidden_layers: 6 then, 4 in"):
        tuner(str(tmp_path / "other"), init_adapter=str(adapter)).configure_model()
    with pytest.raises(FileNotFoundError, match="has no adapter"):
        tuner(base, init_adapter=base).configure_model()


def test_a_logger_that_is_not_installed_is_refused(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    assert finetune("--output", str(tmp_path / "run"), "--loggers", "[csv, wandb]") == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_loggers_by_name_write_into_the_run(monkeypatch: Any, tmp_path: Path) -> None:
    class Fake(loggers.CSVLogger):
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(tmp_path)
            self.given, self.told = (args, given), {}

        def log_hyperparams(self, params: Any) -> None:
            self.told = params

    for name in ("WandbLogger", "MLFlowLogger"):
        monkeypatch.setattr(loggers, name, Fake)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    local, wandb, mlflow = loggers.make_loggers(["csv", "wandb", "mlflow", "csv"], tmp_path / "run")
    assert wandb.given == ((), {"name": "run", "save_dir": tmp_path / "run"})
    assert mlflow.given[0] == ("mine",) and mlflow.given[1]["run_name"] == "run"
    loggers.describe_run([local, wandb], {"model": 1})
    assert wandb.told == {"model": 1}
