"""The data module under Lightning's Trainer: order, resuming, workers, and what stops a run before it starts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from data_examples import eleven_records
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import tiny_processor

from himap_train.data.module import LlavaDataModule
from himap_train.data.skips import TooManySkippedError


@pytest.fixture
def data(tmp_path):
    return str(eleven_records(tmp_path))


def module(train, **options):
    options = {"validation": None, "batch_size": 2, **options}
    return LlavaDataModule(train, **options, processor=tiny_processor())


class Recorder(LightningModule):
    """Trains one weight on the number of supervised tokens, and writes down what it sees."""

    def __init__(self, interrupt_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.interrupt_at = interrupt_at
        self.seen, self.validated = [], []

    def training_step(self, batch, _):
        if self.global_step == self.interrupt_at:
            raise KeyboardInterrupt
        self.seen.append(tuple(batch["ids"]))
        return self.weight.sum() * (batch["labels"] >= 0).sum()

    def validation_step(self, batch, _):
        self.validated.append(tuple(batch["ids"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.001)


class SaveOnException(Callback):
    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, *_):
        trainer.save_checkpoint(self.path)


def fit(tmp_path, datamodule, epochs=2, resume=None, interrupt_at=None, callbacks=(), **options):
    model = Recorder(interrupt_at)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(model, datamodule=datamodule, ckpt_path=resume)
    return model


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"group_by_length": True}], ids=str)
def test_resumed_run_goes_on_with_the_very_next_batch(tmp_path, data, options):
    """Saved after every step of two epochs of six; each checkpoint is resumed by a new module and loader."""
    options = {"validation": data, "validation_limit": 3, **options}
    every = ModelCheckpoint(tmp_path / "ck", "{step}", every_n_train_steps=1, save_top_k=-1)
    straight = fit(tmp_path, module(data, **options), callbacks=[every], val_check_interval=3)
    assert len(straight.seen) == 12 and len(set(straight.seen)) > 6  # the second epoch has another order
    for epoch in (straight.seen[:6], straight.seen[6:]):
        assert sorted(int(name) for batch in epoch for name in batch) == list(range(11))
    for step in (1, 3, 5, 6, 7, 11) if not options.get("num_workers") else (2, 6, 9):
        resumed = fit(tmp_path, module(data, **options), resume=tmp_path / f"ck/step={step}.ckpt", val_check_interval=3)
        assert resumed.seen == straight.seen[step:], f"after step {step}"
        assert torch.equal(resumed.weight, straight.weight)
        assert resumed.weight.item() != 1


@pytest.mark.parametrize("step", [2, 8])
def test_interrupted_within_a_step_that_batch_comes_again(tmp_path, data, step):
    straight = fit(tmp_path, module(data))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, module(data), interrupt_at=step, callbacks=[SaveOnException(tmp_path / "stop.ckpt")])
    resumed = fit(tmp_path, module(data), resume=tmp_path / "stop.ckpt")
    assert resumed.seen == straight.seen[step:]
    assert torch.equal(resumed.weight, straight.weight)


def test_resuming_with_other_records_warns(tmp_path, data, caplog):
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, module(data), epochs=1, callbacks=[every])
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, module(data), epochs=1, resume=tmp_path / "step=2.ckpt")
        assert "the training data had" not in caplog.text
        fewer = tmp_path / "fewer.json"
        fewer.write_text(json.dumps(json.loads(Path(data).read_text())[:10]))
        fit(tmp_path, module(str(fewer)), epochs=1, resume=tmp_path / "step=2.ckpt")
    assert "the training data had 11 records then and has 10 now" in caplog.text
    with pytest.raises(ValueError, match=r"2 records an optimizer step .2 batch_size x 1 accumulate x 1 processes.*3"):
        fit(tmp_path, module(data, batch_size=3), epochs=1, resume=tmp_path / "step=2.ckpt")


def test_batches_are_the_same_with_and_without_workers(data):
    def batches(workers):
        datamodule = module(data, num_workers=workers, group_by_length=True, pad_to_multiple_of=8)
        datamodule.setup("fit")
        return list(datamodule.train_dataloader())

    for one, two in zip(batches(0), batches(2), strict=True):
        assert one["ids"] == two["ids"] and one["input_ids"].shape[1] % 8 == 0
        for key in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(one[key], two[key])
        assert one["images"].keys() == two["images"].keys()
        assert all(torch.equal(values, two["images"][name]) for name, values in one["images"].items())


@pytest.mark.parametrize("workers", [0, 2])
def test_embedded_scenes_are_fresh_in_every_epoch(workers):
    datamodule = module("embedded:train?scenes=8", validation="embedded:validation?scenes=4", num_workers=workers)
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    epochs = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        epochs.append(sorted(name for batch in loader for name in batch["ids"]))
    assert epochs == [[f"train-0-{epoch}-{i}" for i in range(8)] for epoch in (0, 1)]


def test_validation_is_the_same_in_every_epoch(tmp_path):
    model = fit(tmp_path, module("embedded:train?scenes=4", validation="embedded:validation?scenes=4"))
    assert [name for batch in model.seen for name in batch][-1].startswith("train-0-1-")
    assert [name for batch in model.validated for name in batch] == [f"validation-0-0-{i}" for i in range(4)] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_counted_over_all_workers(tmp_path, data, workers):
    (tmp_path / "b.png").write_text("no image")  # records 1, 7 and 10
    datamodule = module(data, validation=data, num_workers=workers, max_skipped=3)
    datamodule.setup("fit")
    trained = [name for batch in datamodule.train_dataloader() for name in batch["ids"]]
    assert len(trained) == 11 and not {"1", "7", "10"} & set(trained)
    assert datamodule.skips["train"].count == 3
    validated = [name for batch in datamodule.val_dataloader() for name in batch["ids"]]
    # the last batch would be record 10 alone: it holds a marked substitute, so that devices stay in step
    assert validated == ["0", "2", "3", "4", "5", "6", "8", "9", "0"] and datamodule.skips["validation"].count == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_more_broken_images_than_allowed_end_the_run(tmp_path, data, workers):
    (tmp_path / "b.png").unlink()
    with pytest.raises(
        TooManySkippedError,
        match=r"max_skipped allows 1; the last: data.json, record \d+ \(id '\d+'\): .*b.png does not exist",
    ):
        fit(tmp_path, module(data, num_workers=workers), epochs=1)


def test_each_device_gets_its_own_part(data):
    parts = []
    for rank in (0, 1):
        datamodule = module(data)
        facts = {"world_size": 2, "global_rank": rank, "accumulate_grad_batches": 1, "num_training_batches": 3}
        datamodule.trainer = type("TwoDevices", (), facts)()
        datamodule.setup("fit")
        batches = list(datamodule.train_dataloader())
        assert len(batches) == 3
        parts.append([name for batch in batches for name in batch["ids"]])
    # the last of them would be a repeated record; it is left out beside one that counts
    assert sorted(map(int, parts[0] + parts[1])) == list(range(11))


def test_lightning_leaves_the_loader_as_it_is(tmp_path, data):
    """On several devices Lightning would wrap a DataLoader's sampler; here the order is already shared."""
    from lightning.pytorch.trainer.connectors.data_connector import _DataConnector

    datamodule = module(data)
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    assert not _DataConnector._requires_distributed_sampler(Trainer(logger=False)._data_connector, loader)
    assert not isinstance(loader, torch.utils.data.DataLoader)


def test_data_that_is_not_there_ends_the_run_before_it_starts(tmp_path, data):
    for options in ({"train": "missing.json"}, {"train": data, "validation": "missing.json"}):
        with pytest.raises(FileNotFoundError, match="data file missing.json does not exist"):
            module(**options).setup("fit")
    module(data, validation="missing.json").source("train")
    with pytest.raises(RuntimeError, match=r"needs the checkpoint's processor: LlavaDataModule\(..., processor=...\)"):
        LlavaDataModule(data).setup("fit")
    with pytest.raises(RuntimeError, match="call setup"):
        module(data).train_dataloader()


@pytest.mark.parametrize("option", ["batch_size", "eval_batch_size", "max_length", "train_limit", "pad_to_multiple_of"])
def test_numbers_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"data.{option} is 0; expected a whole number from 1 on"):
        LlavaDataModule(**{option: 0})


def test_no_validation_data(data):
    datamodule = module(data)
    datamodule.setup("fit")
    assert datamodule.val_dataloader() == [] and datamodule.source("validation") is None
    assert datamodule.check("validation") is None
    assert datamodule.check().records == 11


@pytest.mark.parametrize("batches", [0, 2])
def test_overfitting_sees_the_same_batches_in_every_epoch(batches: int, tmp_path: Path) -> None:
    data = LlavaDataModule(batch_size=2, train_limit=8, max_length=400, processor=tiny_processor())
    data.setup("fit")
    data.trainer = Trainer(overfit_batches=batches, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    loader = data.train_dataloader()
    orders = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        orders.append([index for batch in loader.sampler.batches(loader.sampler.epoch) for index in batch.tolist()])
    assert (orders[0] == orders[1]) == bool(batches)
