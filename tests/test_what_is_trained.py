"""Which weights are trained, and how, and where they start: trained, saved, loaded, merged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from export_toys import PRUNED, logits, trained
from safetensors.torch import load_file, save_file
from tiny import tiny_llava, tiny_processor
from training_toys import ToyData, collate, finetune, quiet_trainer, sample, tuner

from himap_train.checkpoints.export import export_adapter, export_merged
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.models.install import remove_pruning
from himap_train.training.module import LlavaFineTuner
from himap_train.training.optim import parameter_groups
from himap_train.training.run import loggers

KINDS: list[dict[str, Any]] = [
    {"dora": True},
    {"rslora": True},
    {"dora": True, "rslora": True, "projector": "lora", "vision": "lora"},
    {"vision": "train", "decoder": "train"},
    {"vision": "train", "decoder": "freeze", "projector": "freeze"},
]
PARTS: list[dict[str, Any]] = [
    {"vision_tower": "lora", "vision_lr": 1e-2},
    {"vision_tower": "train", "vision_lr": 1e-2},
    {"decoder": "train", "decoder_lr": 1e-2},
]


def fit(path: str, folder: Path, precision: str = "32-true", **model: Any) -> tuple[LlavaFineTuner, Path]:
    """Two steps; the module and its training checkpoint."""
    module = tuner(path, **model)
    trainer = quiet_trainer(folder, max_steps=2, precision=precision)
    trainer.fit(module, datamodule=ToyData())
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, folder / "last.ckpt"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_saved_and_merged_compute_the_same(base: str, tmp_path: Path, kind: dict[str, Any]) -> None:
    model = trained(base, **kind)
    save_adapter(model, tmp_path / "a", PRUNED, tiny_processor())
    loaded, _ = load_checkpoint(tmp_path / "a")
    save_adapter(loaded, tmp_path / "again", PRUNED)
    for saved in (loaded, load_checkpoint(tmp_path / "again")[0]):
        assert torch.equal(logits(saved), logits(model))
    folder = export_merged(tmp_path / "a", tmp_path / "merged")
    merged, by_peft = load_checkpoint(folder, schedule=None)[0], remove_pruning(model).merge_and_unload()
    torch.testing.assert_close(dict(merged.state_dict()), dict(by_peft.state_dict()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_what_is_trained_stays_in_fp32_beside_half_weights(base: str, tmp_path: Path, part: dict[str, Any]) -> None:
    module, _ = fit(base, tmp_path, "bf16-mixed", **part)
    dtypes = {weight.dtype for weight in module.peft_model.parameters() if weight.requires_grad}
    assert dtypes == {torch.float32} and module.global_step == 2
    assert torch.bfloat16 in {weight.dtype for weight in module.peft_model.parameters()}


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


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_each_part_learns_and_its_checkpoint_is_resumed_and_loaded(
    base: str, tmp_path: Path, part: dict[str, Any]
) -> None:
    """At the part's own rate alone."""
    alone = {"lora_lr": 1e-9, "projector": "freeze", "lora_dropout": 0.0, **part}
    module, batch = tuner(base, **alone), collate(ToyData(4).samples)
    module.configure_model()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    before = float(module.eval().batch_loss(batch)[0].detach())
    trainer = quiet_trainer(tmp_path, max_steps=10)
    trainer.fit(module, datamodule=ToyData(4, 4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert float(module.eval().batch_loss(batch)[0].detach()) < 0.95 * before
    wanted = "vision_tower" if "vision_tower" in part else ""
    still = [n for n, p in module.named_parameters() if p.requires_grad and wanted in n and torch.equal(p, start[n])]
    assert not still
    loaded, _ = load_checkpoint(export_adapter(tmp_path / "last.ckpt", tmp_path / "a"))
    assert torch.equal(logits(loaded), logits(module.peft_model))
    again = tuner(base, **alone)
    resumed = quiet_trainer(tmp_path, max_steps=10)
    resumed.fit(again, datamodule=ToyData(4, 4), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(logits(again.peft_model.eval()), logits(module.peft_model))
    onward = tuner(base, init_adapter=str(tmp_path / "last.ckpt"), **alone)
    onward.configure_model()
    assert torch.equal(logits(onward.peft_model.eval()), logits(module.peft_model))


def test_parts_have_their_rates_and_unused_layers_of_the_tower_are_left_out(base: str) -> None:
    module = tuner(base, vision_tower="train", decoder="train", decoder_lr=3e-5)
    module.configure_model()
    groups = parameter_groups(module.peft_model, module.rates, 0.0)
    assert {group["name"].removesuffix("-no-decay"): group["lr"] for group in groups} == {
        "projector": 1e-3,
        "vision tower": 2e-6,
        "decoder": 3e-5,
    }
    names = " ".join(module.trained_names())
    assert re.search(r"vision_tower\.\S*layers\.0\.", names) and "patch_embedding" in names
    assert not re.search(r"vision_tower\.\S*layers\.1\.", names) and "post_layernorm" not in names
    assert "lm_head.weight" in names and "embed_tokens" in names
    assert module.vision_tower.training and not module.eval().vision_tower.training


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_of_the_tower_are_right_under_pruning(base: str, layer: int, checkpointing: bool) -> None:
    """Against differences of the loss (its norms are in single precision); the same tokens are kept on both sides."""
    criterion = "instruction" if layer else "divprune"
    schedule = {"stages": [{"layer": layer, "criterion": criterion, "keep_ratio": 0.5}]}
    module = tuner(
        base, vision_tower="train", schedule=schedule, gradient_checkpointing=checkpointing, lora_dropout=0.0
    )
    module.configure_model()
    module.double()
    batch = collate([sample(0), sample(1, answer=5)])
    batch["images"] = {name: values.double() for name, values in batch["images"].items()}
    tower = [p for p in module.vision_tower.parameters() if p.requires_grad]
    noise = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=noise, dtype=p.dtype) for p in tower]
    gradients = torch.autograd.grad(module.batch_loss(batch)[0], tower)
    assert all(gradient.any() for gradient in gradients)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    losses = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(tower, direction, strict=True):
                p.add_(step * d)
            losses.append(float(module.batch_loss(batch)[0]))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=5e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.vision_tower", "lora", "--data.cache_image_features", "true"], "set data.cache_image_features to"),
        (["--model.decoder", "train", "--model.quantize", "4bit"], "quantised weights cannot be trained"),
        (["--model.vision_lr", "0"], "model.vision_lr is 0"),
        (["--model.decoder_lr", "-1"], "model.decoder_lr is -1"),
    ],
)
def test_what_does_not_go_together_is_refused(options: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert finetune("--output", str(tmp_path / "run"), *options) == 2
    assert message in capsys.readouterr().err


def test_a_tied_head_follows_trained_embeddings_where_files_hold_it_too(tmp_path: Path) -> None:
    stock = tiny_llava()
    stock.config.text_config.tie_word_embeddings = stock.config.tie_word_embeddings = True
    stock.lm_head.weight = stock.model.language_model.embed_tokens.weight
    stock.save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    weights = load_file(file)
    embeddings = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights["language_model.lm_head.weight"] = weights[embeddings].clone()
    save_file(weights, file, metadata={"format": "pt"})
    model = trained(str(tmp_path / "base"), decoder="train")
    save_adapter(model, tmp_path / "a", PRUNED, tiny_processor())
    merged, _ = load_checkpoint(export_merged(tmp_path / "a", tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
