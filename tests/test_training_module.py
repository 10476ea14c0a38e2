"""The LightningModule: modes, groups, guard, averaging, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import tiny_processor
from torch.utils.data import DataLoader, IterableDataset
from training_toys import SCHEDULE, ToyData, collate, quiet_trainer, sample, tuner

from himap_train.data.module import LlavaDataModule
from himap_train.models.install import install_pruning, pruning_of, record_pruning, remove_pruning
from himap_train.models.stock import base_model
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.callbacks.accuracy import EvaluationSettings, GenerationAccuracy
from himap_train.training.module import LlavaFineTuner


def fit(path: str, folder: Path, data: ToyData | None = None, **kwargs: Any) -> LlavaFineTuner:
    """Fit with trainer arguments; `model` holds the module's."""
    model = kwargs.pop("kind", tuner)(path, **kwargs.pop("model", {}))
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, **{"max_steps": 2, **kwargs})
    trainer.fit(model, datamodule=data or ToyData())
    return model


class PlainSteps(LlavaFineTuner):
    """Plain gradient descent: a step shows the gradient, which AdamW would bring to the same size in any case."""

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(path, lora_r=4, lora_alpha=8, lora_dropout=0.0, **{"schedule": SCHEDULE, **kwargs})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def weights(model: LlavaFineTuner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def batches(*ready: dict[str, Any]) -> DataLoader:
    """A loader of these very batches (Lightning would run the items of a list side by side)."""
    return DataLoader(list(ready), batch_size=None)  # type: ignore[arg-type]


class Modes(Callback):
    """Notes which parts are in training mode, and whether layers are computed again, in a training step."""

    def __init__(self) -> None:
        self.seen: dict[str, bool] = {}
        self.forwards = 0

    def on_train_batch_start(self, trainer: Any, module: LlavaFineTuner, batch: Any, batch_idx: int) -> None:
        base = base_model(module.peft_model)
        self.seen = {
            "decoder": all(m.training for m in base.model.language_model.modules()),
            "tower": any(m.training for m in base.model.vision_tower.modules()),
        }
        if batch_idx == 0:
            base.model.language_model.layers[3].mlp.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.forwards += 1


@pytest.mark.parametrize(("checkpointing", "forwards"), [(True, 2), (False, 1)])
def test_decoder_trains_and_tower_stays_in_evaluation_mode(
    tiny_path: str, tmp_path: Path, checkpointing: bool, forwards: int
) -> None:
    """`from_pretrained` gives evaluation mode, in which Hugging Face checkpoints no layer and dropout is off."""
    modes = Modes()
    model = {"gradient_checkpointing": checkpointing}
    fit(tiny_path, tmp_path, callbacks=[modes], model=model, max_steps=2, limit_val_batches=1, val_check_interval=1)
    assert modes.seen == {"decoder": True, "tower": False}
    assert modes.forwards == 2 * forwards + 2  # two steps, two validations


def test_tower_leaves_no_graph(tiny_path: str) -> None:
    model = tuner(tiny_path)
    model.configure_model()
    outputs: list[torch.Tensor] = []
    tower = base_model(model.peft_model).model.vision_tower
    tower.register_forward_hook(lambda *args: outputs.append(args[2].last_hidden_state))
    model.batch_loss(collate([sample(0)]))
    assert not outputs[0].requires_grad


def test_loss_falls_on_four_samples(tiny_path: str, tmp_path: Path) -> None:
    model, batch = tuner(tiny_path), collate(ToyData(4).samples)
    model.configure_model()
    before = float(model.eval().batch_loss(batch)[0].detach())
    quiet_trainer(tmp_path, max_steps=12).fit(model, datamodule=ToyData(count=4, batch_size=4))
    assert float(model.eval().batch_loss(batch)[0].detach()) < 0.7 * before


def test_only_lora_and_projector_change(tiny_path: str, tmp_path: Path) -> None:
    fresh = tuner(tiny_path)
    fresh.configure_model()
    frozen = {n: p.detach().clone() for n, p in fresh.named_parameters() if not p.requires_grad}
    trained = fit(tiny_path, tmp_path)
    now = dict(trained.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    changed = {name for name, value in weights(fresh).items() if not torch.equal(value, weights(trained)[name])}
    assert any("lora_B" in name for name in changed) and any("projector" in name for name in changed)


@pytest.mark.parametrize("schedule", [SCHEDULE, None])
def test_accumulated_gradient_equals_the_big_batch(tiny_path: str, tmp_path: Path, schedule: Any) -> None:
    """Also though the micro-batches have different numbers of answer tokens, and the last window is not full."""
    common = {"kind": PlainSteps, "model": {"schedule": schedule}, "max_epochs": 1, "max_steps": -1}
    small = fit(tiny_path, tmp_path, ToyData(6, 1), accumulate_grad_batches=4, **common)

    class Uneven(ToyData):
        def train_dataloader(self) -> Any:
            return self.windowed(batches(collate(self.samples[:4]), collate(self.samples[4:])))

    big = fit(tiny_path, tmp_path, Uneven(6), **common)
    assert small.global_step == big.global_step == 2
    for name, value in weights(big).items():
        torch.testing.assert_close(weights(small)[name], value, atol=1e-6, rtol=1e-3, msg=name)


def test_average_over_batches_differs_from_average_over_tokens(tiny_path: str, tmp_path: Path) -> None:
    token, batch = (
        weights(
            fit(tiny_path, tmp_path, ToyData(4, 1), accumulate_grad_batches=4, max_steps=1, kind=PlainSteps, model=m)
        )
        for m in ({"loss_average": "token"}, {"loss_average": "batch"})
    )
    assert any(not torch.allclose(value, batch[name], atol=1e-6) for name, value in token.items())


def test_a_short_window_counts_as_much_by_batches_too(tiny_path: str, tmp_path: Path) -> None:
    two, four = (
        weights(
            fit(tiny_path, tmp_path, ToyData(2, 1), accumulate_grad_batches=n, max_steps=1, kind=PlainSteps, model=m)
        )
        for n, m in ((2, {"loss_average": "batch"}), (4, {"loss_average": "batch"}))
    )
    for name, value in two.items():
        torch.testing.assert_close(four[name], value, atol=1e-6, rtol=1e-3, msg=name)


def test_batches_without_their_window_are_refused(tiny_path: str, tmp_path: Path) -> None:
    class Plain(ToyData):
        def train_dataloader(self) -> Any:
            return batches(collate(self.samples))

    with pytest.raises(ValueError, match="no 'window_tokens'"):
        fit(tiny_path, tmp_path, Plain())


def test_optimizer_groups(tiny_path: str, tmp_path: Path) -> None:
    model = tuner(tiny_path, weight_decay=0.1)
    trainer = quiet_trainer(tmp_path, max_steps=10)
    trainer.fit(model, datamodule=ToyData())
    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    assert {n: (g["initial_lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "lora": (1e-2, 0.1),
        "projector": (1e-3, 0.1),
        "projector-no-decay": (1e-3, 0.0),
    }
    assert sum(len(group["params"]) for group in groups.values()) == len(model.trained_names())


def test_rate_warms_up_and_falls_to_zero(tiny_path: str, tmp_path: Path) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append({g["name"]: g["lr"] for g in trainer.optimizers[0].param_groups}["lora"])

    fit(tiny_path, tmp_path, max_steps=10, callbacks=[Rates()], model={"warmup_ratio": 0.2})
    assert rates[:3] == [0.0, 0.005, 0.01]
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False)) and 0 < rates[-1] < 0.001


def test_text_only_batches_train(tiny_path: str, tmp_path: Path) -> None:
    class TextOnly(ToyData):
        def train_dataloader(self) -> Any:
            text_only = collate([sample(0, image=False), sample(1, image=False)])
            return self.windowed(batches(text_only, collate([sample(2), sample(3)])))

    assert fit(tiny_path, tmp_path, TextOnly()).global_step == 2


@pytest.mark.parametrize("break_it", ["remove", "replace", "stock forward"])
def test_guard_notices_that_nothing_was_pruned(tiny_path: str, tmp_path: Path, break_it: str) -> None:
    """In training and in validation, also where an earlier forward has left its counts behind."""
    model = tuner(tiny_path)
    model.configure_model()
    model.batch_loss(collate([sample(0)]))
    if break_it == "remove":
        remove_pruning(model.peft_model)
    elif break_it == "replace":
        install_pruning(model.peft_model, PruningSchedule())
    else:
        decoder = base_model(model.peft_model).model.language_model
        decoder.forward = type(decoder).forward.__get__(decoder)
    with pytest.raises(RuntimeError, match="prune"):
        quiet_trainer(tmp_path, max_steps=1).fit(model, datamodule=ToyData())
    with pytest.raises(RuntimeError, match="prune"):
        quiet_trainer(tmp_path, limit_val_batches=1).validate(model, datamodule=ToyData())


def test_guard_is_silent_when_dense_was_asked_for(tiny_path: str, tmp_path: Path) -> None:
    model = fit(tiny_path, tmp_path, model={"schedule": None})
    pruning = pruning_of(model.peft_model)
    assert pruning is None or not pruning.schedule.stages


def test_answer_right_after_an_image_keeps_the_token_that_predicts_it(tiny_path: str) -> None:
    """As in caption pre-training, where an image is followed by its caption."""
    model = tuner(tiny_path)
    model.configure_model()
    batch = collate([sample(0), sample(1)])
    batch["labels"][1, 17] = 9
    assert batch["input_ids"][1, 16] == model.peft_model.config.image_token_id
    with record_pruning(model.peft_model) as trace:
        total, count = model.batch_loss(batch)
    assert all(16 in stage[1] for stage in trace.kept)
    alone, fewer = model.batch_loss({**batch, "labels": batch["labels"].where(batch["labels"] != 9, -100)})
    assert count == fewer + 1 and total > alone


def test_endless_data_needs_max_steps(tiny_path: str, tmp_path: Path) -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            while True:
                yield collate([sample(0)])

    class Stream(ToyData):
        def train_dataloader(self) -> Any:
            return self.windowed(DataLoader(Endless(), batch_size=None))

    with pytest.raises(ValueError, match="set trainer.max_steps"):
        fit(tiny_path, tmp_path, Stream(), max_steps=-1, max_epochs=1)


def test_validation_loss_is_the_mean_over_tokens(tiny_path: str, tmp_path: Path) -> None:
    model, data = tuner(tiny_path), ToyData(6, 4)
    found = quiet_trainer(tmp_path, limit_val_batches=1.0).validate(model, datamodule=data, verbose=False)[0]
    with torch.no_grad():
        total, count = model.eval().batch_loss(collate(data.samples))
    assert found["val/loss"] == pytest.approx(float(total / count), rel=1e-4)


@pytest.mark.parametrize("schedule", [SCHEDULE, None])
def test_bf16_mixed_keeps_what_is_trained_in_fp32(tiny_path: str, tmp_path: Path, schedule: Any) -> None:
    """What the 7B config uses: frozen weights in bf16, LoRA and projector in fp32, generation in validation too."""
    model = fit(tiny_path, tmp_path, precision="bf16-mixed", model={"schedule": schedule}, limit_val_batches=1)
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert all(torch.isfinite(value).all() for value in weights(model).values())


def test_answers_are_encoded_by_as_many_workers_as_training_has() -> None:
    data = LlavaDataModule(num_workers=3, processor=tiny_processor())
    assert EvaluationSettings().for_data(data, None)["num_workers"] == 3


def test_validation_gives_training_mode_back_to_the_decoder_alone(tiny_path: str, tmp_path: Path) -> None:
    """`GenerationAccuracy` evaluates, pruned and dense, between two training steps."""
    data = LlavaDataModule(batch_size=2, train_limit=8, validation_limit=4, max_length=400, processor=tiny_processor())
    modes, accuracy = Modes(), GenerationAccuracy(EvaluationSettings(during=2, max_new_tokens=2))
    model = tuner(tiny_path)
    trainer = quiet_trainer(
        tmp_path, max_steps=3, val_check_interval=1, limit_val_batches=1, callbacks=[modes, accuracy]
    )
    trainer.fit(model, datamodule=data)
    assert modes.seen == {"decoder": True, "tower": False}
    assert {"val/accuracy", "val/accuracy_dense", "val/loss"} <= set(trainer.callback_metrics)
    pruning = pruning_of(model.peft_model)
    assert pruning is not None and pruning.schedule == model.schedule  # dense evaluation gave the schedule back
