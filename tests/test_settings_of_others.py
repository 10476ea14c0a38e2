"""What users bring to a run: callbacks, plugins, names of precisions; and runs that were moved or failed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from himap_train.data.encode import IGNORED
from himap_train.data.loader import WINDOW_BATCHES, WINDOW_TOKENS, Windows
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.averaging import WindowMean
from himap_train.training.callbacks.best import Best, last_and_best
from himap_train.training.callbacks.checkpoints import CONFIG_KEY, refuse_other_config
from himap_train.training.optim import parameter_groups
from himap_train.training.run.folder import claim_folder, record_run, release_folder
from himap_train.training.run.strategy_names import as_list, own_callbacks, require_known, settle_trainer


class Falling(LightningModule):
    """Its validation loss is what it is told, step by step."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.layer, self.losses = nn.Linear(1, 1), losses

    def training_step(self, batch: Any, index: int) -> Any:
        return self.layer(batch[0]).sum()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", self.losses[self.global_step - 1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder: Path, steps: int, losses: list[float], *more: Callback, resume: bool = False) -> None:
    data = DataLoader(TensorDataset(torch.ones(4, 1)))
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, val_check_interval=1, num_sanity_val_steps=0, logger=False,
        callbacks=[*more, *last_and_best(folder / "checkpoints", None, "val/loss", "min")],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    last = str(folder / "checkpoints" / "last.ckpt") if resume else None
    trainer.fit(Falling(losses), data, data, ckpt_path=last, weights_only=True)


def step_of(folder: Path) -> int:
    return int(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["global_step"])


def test_a_run_that_was_moved_keeps_its_best(tmp_path: Path) -> None:
    fit(tmp_path / "then", 2, [0.1, 7.0])
    shutil.move(tmp_path / "then", tmp_path / "now")
    fit(tmp_path / "now", 4, [0.1, 7.0, 7.0, 4.5], resume=True)
    assert step_of(tmp_path / "now") == 1 and not (tmp_path / "then").exists()
    shutil.copytree(tmp_path / "now", tmp_path / "copy")
    fit(tmp_path / "copy", 6, [0.1, 7.0, 7.0, 4.5, 0.01, 3.0], resume=True)
    assert step_of(tmp_path / "copy") == 5 and step_of(tmp_path / "now") == 1  # nothing is taken from the original
    assert [file.name for file in sorted((tmp_path / "copy" / "checkpoints").iterdir())] == ["best.ckpt", "last.ckpt"]


def test_a_checkpoint_of_before_knows_its_best(tmp_path: Path) -> None:
    """When the callback was Lightning's own by name."""
    fit(tmp_path, 2, [0.1, 7.0])
    last = tmp_path / "checkpoints" / "last.ckpt"
    held = torch.load(last, weights_only=True)
    [name] = [key for key in held["callbacks"] if key.startswith("Best{")]
    held["callbacks"]["ModelCheckpoint" + name.removeprefix("Best")] = held["callbacks"].pop(name)
    torch.save(held, last)
    fit(tmp_path, 4, [0.1, 7.0, 7.0, 4.5], resume=True)
    assert step_of(tmp_path) == 1


def test_a_users_own_checkpoints_stand_beside_ours(tmp_path: Path) -> None:
    own = ModelCheckpoint(tmp_path / "own", monitor="val/loss", save_top_k=2, save_on_train_epoch_end=False)
    fit(tmp_path, 3, [3.0, 2.0, 1.0], own)
    assert len(list((tmp_path / "own").glob("*.ckpt"))) == 2 and step_of(tmp_path) == 3
    best = Best(tmp_path, monitor="x")
    assert best.state_key != ModelCheckpoint(tmp_path, monitor="x").state_key


def test_callbacks_come_alone_too_and_bars_need_a_terminal() -> None:
    stop, bar = EarlyStopping("val/loss"), RichProgressBar()
    assert own_callbacks(stop, terminal=True) == [stop] and own_callbacks(None, terminal=True) == []
    assert own_callbacks([bar, stop], terminal=False) == [stop]
    assert own_callbacks([bar, stop], terminal=True) == [bar, stop]
    assert as_list(stop) == [stop] and as_list((stop, bar)) == [stop, bar] and as_list(None) == []
    with pytest.raises(ValueError, match="WeightAveraging keeps a second model"):
        own_callbacks([WeightAveraging()], terminal=True)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook", "ddp_fork"])
def test_strategies_that_copy_a_process_are_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match=f"'{strategy}' starts processes by copying .* give ddp"):
        require_known(strategy)
    require_known("ddp")


def test_precisions_have_one_name_and_a_run_its_checkpoints(tmp_path: Path) -> None:
    given = {"fast_dev_run": False, "enable_checkpointing": None}
    for name, full in (
        ("bf16", "bf16-mixed"),
        (16, "16-mixed"),
        ("32", "32-true"),
        ("bf16-mixed", "bf16-mixed"),
        (None, None),
    ):
        trainer = SimpleNamespace(precision=name, **given)
        settle_trainer(trainer)
        assert trainer.precision == full
    with pytest.raises(ValueError, match="--rehearse"):
        settle_trainer(SimpleNamespace(precision=None, **given | {"fast_dev_run": True}))
    with pytest.raises(ValueError, match="enable_checkpointing=false"):
        settle_trainer(SimpleNamespace(precision=None, **given | {"enable_checkpointing": False}))
    saved = {"state_dict": {}, "optimizer_states": [], "loops": {}, CONFIG_KEY: {"trainer": {"precision": "bf16"}}}
    torch.save(saved, tmp_path / "last.ckpt")
    refuse_other_config(tmp_path / "last.ckpt", {"trainer": {"precision": "bf16-mixed"}})
    with pytest.raises(ValueError, match="trainer.precision: 'bf16-mixed' then, '32-true' now"):
        refuse_other_config(tmp_path / "last.ckpt", {"trainer": {"precision": "32-true"}})


def test_a_start_that_came_to_nothing_leaves_its_folder_free(tmp_path: Path) -> None:
    record_run(tmp_path, {"a": 1}, PruningSchedule())
    with pytest.raises(FileExistsError):  # it may be running
        claim_folder(tmp_path, resuming=False)
    release_folder(tmp_path)
    claim_folder(tmp_path, resuming=False)
    record_run(tmp_path, {"a": 1}, PruningSchedule())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    release_folder(tmp_path)
    assert (tmp_path / "config.yaml").is_file()


def test_a_weight_that_zero_has_spread_decays_as_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from himap_train.training import optim

    module = nn.Module()
    module.weight, module.bias = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))
    module.weight.ds_shape, module.bias.ds_shape = torch.Size([3, 2]), torch.Size([3])  # type: ignore[attr-defined]
    for name, given in {
        "parameter_group": lambda *_: "lora",
        "family_of": lambda _: None,
        "base_model": lambda m: m,
    }.items():
        monkeypatch.setattr(optim, name, given)
    groups = parameter_groups(module, {"lora": 0.1}, weight_decay=0.5)
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("lora", 0.5, 1),
        ("lora-no-decay", 0.0, 1),
    ]


def test_micro_batches_without_supervision_do_not_dilute_those_with_it() -> None:
    """A rank whose records ran out has one, and an epoch's last step was weaker by that."""
    labels = [torch.tensor([[IGNORED, 1, 2]]), torch.full((1, 3), IGNORED)]
    counted = list(Windows(accumulate=2, batches=lambda: 2).count({"labels": part} for part in labels))
    assert [(batch[WINDOW_TOKENS], batch[WINDOW_BATCHES]) for batch in counted] == [(2, 1), (2, 1)]

    class Ranks:
        """Another rank with as many tokens, and a batch more."""

        world_size, accumulate_grad_batches = 2, 2
        strategy = SimpleNamespace(reduce=lambda value, reduce_op: value + torch.tensor([2.0, 2.0]))

    window, trainer = WindowMean(), Ranks()
    window.begin(counted[0], trainer, torch.device("cpu"))  # type: ignore[arg-type]
    assert (window.tokens, window.batches) == (4.0, 3.0)
    # Lightning divides each of four by accumulate and ranks: three means remain, each a third of the step
    assert window.weight_of_mean(trainer) / (2 * 2) == pytest.approx(1 / 3)  # type: ignore[arg-type]
