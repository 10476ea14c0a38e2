"""Stopping and going on: to the last bit, whatever stopped the run, and nothing that was saved is lost."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import tiny_processor
from training_toys import quiet_trainer, tuner

from himap_train.data.module import LlavaDataModule
from himap_train.training.callbacks.best import last_and_best
from himap_train.training.callbacks.checkpoints import (
    AtomicCheckpointIO,
    RememberConfig,
    refuse_other_config,
)
from himap_train.training.callbacks.interrupt import Interrupted, SaveOnInterrupt
from himap_train.training.callbacks.step_seeds import StepSeeds
from himap_train.training.module import LlavaFineTuner


class Losses(Callback):
    """Notes the loss of every micro-batch and the samples in it; presses Ctrl-C after `stop` of them."""

    def __init__(self, stop: int | None = None, in_validation: bool = False) -> None:
        self.seen: list[tuple[float, tuple[str, ...]]] = []
        self.stop = stop
        self.in_validation = in_validation

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((float(outputs["loss"]), tuple(batch["ids"])))
        if len(self.seen) == self.stop and not self.in_validation:
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if len(self.seen) == self.stop and self.in_validation:
            os.kill(os.getpid(), signal.SIGINT)


def data(workers: int = 0) -> LlavaDataModule:
    """Ten records of the embedded scenes: five batches an epoch."""
    options = {"max_length": 400, "processor": tiny_processor()}
    return LlavaDataModule(batch_size=2, train_limit=10, validation_limit=4, num_workers=workers, **options)


def run(
    path: str, folder: Path, losses: Losses, resume: bool = False, workers: int = 0, **kwargs: Any
) -> tuple[LlavaFineTuner, Any]:
    """Train with dropout, accumulation over two micro-batches, and two epochs."""
    model = tuner(path, lora_dropout=0.2, lora_lr=1e-3)
    last = folder / "last.ckpt"
    defaults: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    saving = last_and_best(folder, kwargs.pop("every_n_steps", None), "val/loss", "min")
    trainer = quiet_trainer(
        folder,
        **{**defaults, **kwargs},
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            losses,
            StepSeeds(7),
            SaveOnInterrupt(last, "again --resume"),
            *saving,
        ],
    )
    torch.manual_seed(int(resume))  # the resumed run starts from other random numbers: they must not matter
    trainer.fit(model, datamodule=data(workers), ckpt_path=last if resume else None, weights_only=True)
    return model, trainer


def state(model: LlavaFineTuner, trainer: Any) -> dict[str, torch.Tensor]:
    """Trained weights and AdamW's moments."""
    found = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for index, entry in enumerate(trainer.optimizers[0].state_dict()["state"].values()):
        found |= {f"{index}.{key}": value for key, value in entry.items()}
    return found


@pytest.fixture(scope="module")
def straight(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, torch.Tensor]]:
    losses = Losses()
    torch.manual_seed(0)
    return losses.seen, state(*run(tiny_path, tmp_path_factory.mktemp("straight"), losses))


@pytest.mark.parametrize(
    ("stop", "stops_after"),
    [
        pytest.param(4, 4, id="mid-epoch"),
        pytest.param(3, 4, id="inside an accumulation window"),
        pytest.param(5, 5, id="end of epoch"),
        pytest.param(7, 7, id="second epoch"),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted_to_the_last_bit(
    tiny_path: str, tmp_path: Path, straight: Any, stop: int, stops_after: int
) -> None:
    """Losses, samples, weights and optimizer state; dropout is on."""
    first, second = Losses(stop), Losses()
    with pytest.raises(Interrupted, match=r"(?s)last.ckpt at step \d.*again --resume"):
        run(tiny_path, tmp_path, first)
    assert len(first.seen) == stops_after
    result = state(*run(tiny_path, tmp_path, second, resume=True))
    assert first.seen + second.seen == straight[0]
    assert result.keys() == straight[1].keys()
    assert all(torch.equal(value, straight[1][name]) for name, value in result.items())


@pytest.mark.parametrize("stops", [(5, 2), (5, 5), (2, 2)], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"max_steps": 6}], ids=["by epochs", "by steps"])
def test_interrupted_again_after_a_resume(
    tiny_path: str, tmp_path: Path, straight: Any, stops: tuple[int, ...], kwargs: dict[str, Any]
) -> None:
    """Also where the first interruption ends an epoch: five batches."""
    parts = [Losses(stop) for stop in stops]
    for number, losses in enumerate(parts):
        with pytest.raises(Interrupted):
            run(tiny_path, tmp_path, losses, resume=number > 0, **kwargs)
    parts.append(Losses())
    result = state(*run(tiny_path, tmp_path, parts[-1], resume=True, **kwargs))
    assert [step for losses in parts for step in losses.seen] == straight[0]
    assert all(torch.equal(value, straight[1][name]) for name, value in result.items())


class Crash(Losses):
    """A power cut: nothing is saved when it comes."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if len(self.seen) == self.stop:
            raise RuntimeError("power cut")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((float(outputs["loss"]), tuple(batch["ids"])))


@pytest.mark.parametrize(
    ("cut", "saved", "kwargs"),
    [
        pytest.param(6, 5, {}, id="from the end of the epoch"),
        pytest.param(8, 7, {"limit_val_batches": 2, "val_check_interval": 2}, id="from a validation"),
        pytest.param(4, 4, {"limit_val_batches": 2, "val_check_interval": 3}, id="from a validation within a step"),
        pytest.param(3, 2, {"every_n_steps": 1}, id="from a step"),
        pytest.param(6, 5, {"max_steps": 6}, id="from the end of the epoch where max_steps ends the run"),
    ],
)
def test_resumed_from_a_saved_checkpoint_after_a_crash(
    tiny_path: str, tmp_path: Path, straight: Any, cut: int, saved: int, kwargs: dict[str, Any]
) -> None:
    first, second = Crash(cut), Losses()
    with pytest.raises(RuntimeError, match="power cut"):
        run(tiny_path, tmp_path, first, **kwargs)
    result = state(*run(tiny_path, tmp_path, second, resume=True, **kwargs))
    assert first.seen[:saved] + second.seen == straight[0]
    assert all(torch.equal(value, straight[1][name]) for name, value in result.items())


@pytest.mark.parametrize(("stop", "every"), [(4, 2), (3, 3)], ids=["between steps", "within a step, which is ended"])
def test_ctrl_c_in_validation(tiny_path: str, tmp_path: Path, straight: Any, stop: int, every: int) -> None:
    first, second = Losses(stop, in_validation=True), Losses()
    validation = {"limit_val_batches": stop - 2, "val_check_interval": every}  # a second Ctrl-C would end it at once
    with pytest.raises(Interrupted):
        run(tiny_path, tmp_path, first, **validation)
    assert len(first.seen) == 4
    result = state(*run(tiny_path, tmp_path, second, resume=True, **validation))
    assert first.seen + second.seen == straight[0]
    assert all(torch.equal(value, straight[1][name]) for name, value in result.items())


def test_a_window_that_a_checkpoint_cuts_is_averaged_over_what_is_left(
    tiny_path: str, tmp_path: Path, straight: Any
) -> None:
    """`best.ckpt` holds the weights of its validation, which may lie within an optimizer step."""
    validation = {"limit_val_batches": 2, "val_check_interval": 3}
    with pytest.raises(RuntimeError, match="power cut"):
        run(tiny_path, tmp_path, Crash(4), **validation)
    (tmp_path / "best.ckpt").replace(tmp_path / "last.ckpt")
    second = Losses()
    run(tiny_path, tmp_path, second, resume=True, **validation)
    assert len(second.seen) == 7 and all(loss < 3 * straight[0][0][0] for loss, _ in second.seen)


class Stopping(Losses):
    """As early stopping does: a validation, here within a step, is the last."""

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(("epochs", "saved_at"), [(None, [1]), (2, [2, 3, 5, 6])], ids=["at once", "after two epochs"])
def test_where_training_is_stopped_it_is_saved_once(
    tiny_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int | None, saved_at: list[int]
) -> None:
    saved, stock = [], AtomicCheckpointIO.save_checkpoint

    def save(self: Any, checkpoint: dict[str, Any], path: Any, *more: Any, **options: Any) -> None:
        saved.extend([checkpoint["global_step"]] if Path(path).name == "last.ckpt" else [])
        stock(self, checkpoint, path, *more, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    stopped = {"limit_val_batches": 2, "val_check_interval": 3, "min_epochs": epochs}
    _, trainer = run(tiny_path, tmp_path, Stopping(), **stopped)
    assert saved == saved_at and trainer.global_step == saved_at[-1]


def test_ctrl_c_leaves_workers_alone_and_is_given_back(tiny_path: str, tmp_path: Path, straight: Any) -> None:
    """A terminal sends the signal to the workers as well."""

    class Group(Losses):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            if len(self.seen) == 2:
                for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                    os.kill(int(child), signal.SIGINT)
            if len(self.seen) == 4:
                os.kill(os.getpid(), signal.SIGINT)

    losses = Group()
    with pytest.raises(Interrupted):
        run(tiny_path, tmp_path, losses, workers=1)
    assert losses.seen == straight[0][:4]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_checkpoint_holds_what_is_trained_and_nothing_else(tiny_path: str, tmp_path: Path) -> None:
    model, trainer = run(tiny_path, tmp_path, Losses(), max_steps=1, limit_val_batches=1, val_check_interval=2)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == model.trained_names()
    assert all("lora_" in name or "modules_to_save" in name for name in saved["state_dict"])
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert sum(value.numel() for value in saved["state_dict"].values()) < frozen / 4


@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_checkpoint_of_another_model_is_refused(tiny_path: str, tmp_path: Path, change: str) -> None:
    model = tuner(tiny_path)
    model.configure_model()
    names = sorted(model.trained_names())
    weights = dict.fromkeys(names[1:] if change == "missing" else [*names[1:], names[0] + "x"], torch.zeros(1))
    with pytest.raises(ValueError, match="1 trained weights are missing"):
        model.on_load_checkpoint({"state_dict": weights})


@contextmanager
def full_disk(free_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: what a full disk does, without one."""
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    writer, target = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"weights": torch.zeros(10)}, target)
    good = target.read_bytes()
    with full_disk(20_000), pytest.raises(OSError, match=r"last good one is still at .*last.ckpt. Free some space"):
        writer.save_checkpoint({"weights": torch.zeros(100_000)}, target)
    assert target.read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_best_and_last_are_kept_apart(tiny_path: str, tmp_path: Path) -> None:
    """`best` by the metric, `last` at each validation; one file each."""

    class Falling(Callback):
        def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
            module.log("x", float(trainer.global_step))  # the lowest is the first

    model = tuner(tiny_path)
    trainer = quiet_trainer(
        tmp_path,
        max_steps=3,
        limit_val_batches=1,
        val_check_interval=1,
        enable_checkpointing=True,
        callbacks=[Falling(), *last_and_best(tmp_path, None, "x", "min")],
    )
    trainer.fit(model, datamodule=data())
    steps = {file.name: torch.load(file, weights_only=True)["global_step"] for file in tmp_path.glob("*.ckpt")}
    assert steps == {"best.ckpt": 1, "last.ckpt": 3}


def test_what_max_steps_ends_within_an_epoch_is_validated(tiny_path: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(
        tmp_path,
        max_steps=1,
        limit_val_batches=1,
        enable_checkpointing=True,
        callbacks=last_and_best(tmp_path, None, "val/loss", "min"),
    )
    trainer.fit(tuner(tiny_path), datamodule=data())
    assert trainer.num_training_batches > 1 and trainer.global_step == 1
    assert {file.name for file in tmp_path.glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}


def test_checkpoint_of_another_config_is_refused_with_the_keys(tmp_path: Path) -> None:
    config = {
        "model": {"lora_lr": 0.1, "schedule": {"positions": "keep"}},
        "data": {"num_workers": 2},
        "trainer": {"max_steps": 4, "precision": "32-true"},
        "output": "a",
    }
    checkpoint: dict[str, Any] = {}
    RememberConfig(config).on_save_checkpoint(None, None, checkpoint)  # type: ignore[arg-type]
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "optimizer_states": [], "loops": {}, **checkpoint}, file)
    free = {**config, "output": "b", "data": {"num_workers": 0}, "trainer": {"max_steps": 9, "precision": "32-true"}}
    refuse_other_config(file, free)
    other = {**free, "model": {"lora_lr": 0.2, "schedule": {"positions": "renumber"}}}
    other["trainer"] = {"max_steps": 4, "precision": "bf16-mixed"}
    with pytest.raises(ValueError) as raised:
        refuse_other_config(file, other)
    assert "model.lora_lr: 0.1 then, 0.2 now" in str(raised.value)
    assert "model.schedule.positions: 'keep' then, 'renumber' now" in str(raised.value)
    assert "trainer.precision" in str(raised.value) and "max_steps" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="no checkpoint .* to resume from"):
        refuse_other_config(tmp_path / "none.ckpt", config)
