"""Keep ratios that learn during a run: what runs when, what is saved, what a resumed run does, what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from pruning_runs import config, error_of, logged
from tiny import tiny_llava
from training_toys import finetune, fit_windows, tuner
from transformers import LlamaConfig

from himap_train import PruningSchedule, PruningStage
from himap_train.checkpoints.load import load_checkpoint
from himap_train.models.install import pruning_of
from himap_train.models.installed import scorers_of
from himap_train.models.stock import text_decoder
from himap_train.training.callbacks.interrupt import Interrupted
from himap_train.training.callbacks.learn_ratios import LearnKeepRatios
from himap_train.training.schedules.learnable import Learnable

TOKENS = (16, 30)
LEARNABLE = Learnable(budget=0.8, first_layer=1, switch_layer=3, warmup=0.25, until=0.75)
NO_SCHEDULE = {"model": {"schedule": None}}
START = {"stages": [{"layer": 1, "criterion": "instruction", "keep_ratio": 0.8}]}
SETTINGS = {"start": START, "budget": 0.97, "first_layer": 1, "switch_layer": 2, "warmup": 0.2, "until": 0.7}


class Seen(Callback):
    """What the decoder runs in each micro-batch, the losses, and what validation runs."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.schedules: list[PruningSchedule] = []
        self.leaves: list[Any] = []
        self.losses: list[float] = []
        self.validation: list[PruningSchedule] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        def note(*_: Any) -> None:
            if module.training:
                pruning = pruning_of(module.peft_model)
                self.schedules.append(pruning.schedule)
                self.leaves.append(pruning.ratios)

        text_decoder(module.peft_model).register_forward_pre_hook(note)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        if len(self.losses) == self.stop:
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.validation.append(pruning_of(module.peft_model).schedule)


def fit(path: str, folder: Path, seen: Seen, resume: bool = False, **kwargs: Any) -> Any:
    """Eight optimizer steps of two micro-batches: 2 warm up, 4 more learn, 2 are frozen."""
    callbacks = [LearnKeepRatios(LEARNABLE, lambda measured: TOKENS), seen]
    return fit_windows(tuner(path, lora_dropout=0.0, schedule=None), folder, callbacks, resume, **kwargs)


def cost(schedule: PruningSchedule) -> float:
    return schedule.cost(tiny_llava().config, *TOKENS).flops_ratio


def test_the_budget_falls_then_ratios_learn_then_they_are_frozen(tiny_path: str, tmp_path: Path) -> None:
    seen = Seen()
    model = fit(tiny_path, tmp_path, seen, limit_val_batches=1, val_check_interval=8)
    pairs = list(zip(seen.schedules[::2], seen.schedules[1::2], strict=True))
    assert len(pairs) == 8 and all(first == second for first, second in pairs)  # one schedule a window
    schedules = [first for first, _ in pairs]
    costs = [cost(schedule) for schedule in schedules]
    assert costs[0] > costs[1] > costs[2] and costs[2:] == pytest.approx([0.8] * 6, abs=0.04)  # 16 tokens, ranking
    learning, frozen = schedules[2:6], schedules[6:]
    assert len(set(map(str, learning))) > 1 and frozen[0] == frozen[1] == model.schedule
    assert cost(model.schedule) == pytest.approx(0.8, abs=0.02)
    assert all(first is second for first, second in zip(seen.leaves[::2], seen.leaves[1::2], strict=True))
    assert [leaf is not None for leaf in seen.leaves[::2]] == [True] * 6 + [False] * 2
    assert all(len(schedule.stages) == 5 for schedule in learning) and len(model.schedule.stages) <= 5
    assert seen.validation == [schedules[4], model.schedule] or seen.validation[-1] == model.schedule
    assert pruning_of(model.peft_model).ratios is None


class Stop(Callback):
    """As `max_time` and early stopping do."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = batch_idx == 5


def test_a_run_that_is_stopped_before_ratios_are_frozen_meets_the_budget(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [LearnKeepRatios(LEARNABLE, lambda measured: TOKENS), Stop()]
    model = fit_windows(tuner(tiny_path, lora_dropout=0.0, schedule=None), tmp_path, callbacks)
    assert model.global_step == 3 and cost(model.schedule) == pytest.approx(0.8, abs=0.02)
    assert pruning_of(model.peft_model).schedule == model.schedule
    assert "training ended at step 3, before the keep ratios were to be frozen (step 6)" in capsys.readouterr().out


def test_a_resumed_run_learns_the_same(tiny_path: str, tmp_path: Path) -> None:
    """Cut while the ratios learn, and cut again once they are frozen."""
    straight, first, second, third = Seen(), Seen(stop=6), Seen(stop=8), Seen()
    expected = fit(tiny_path, tmp_path / "straight", straight)
    for number, seen in enumerate((first, second)):
        with pytest.raises(Interrupted):
            fit(tiny_path, tmp_path / "cut", seen, resume=number > 0)
    resumed = fit(tiny_path, tmp_path / "cut", third, resume=True)
    assert first.losses + second.losses + third.losses == straight.losses and len(third.losses) == 2
    assert resumed.schedule == expected.schedule
    weights = dict(expected.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in resumed.named_parameters())


def test_a_run_that_was_at_its_end_keeps_what_it_learned(tiny_path: str, tmp_path: Path) -> None:
    """Cut in its last micro-batch, then resumed, and resumed again: nothing is trained any more."""
    expected = fit(tiny_path, tmp_path / "straight", Seen()).schedule
    with pytest.raises(Interrupted):
        fit(tiny_path, tmp_path / "cut", Seen(stop=16))
    for _ in range(2):
        seen = Seen()
        model = fit(tiny_path, tmp_path / "cut", seen, resume=True)
        assert expected.stages and model.schedule == expected == pruning_of(model.peft_model).schedule
        assert not seen.losses


def test_a_run_of_the_command_line(tiny_path: str, tmp_path: Path) -> None:
    """The frozen schedule is in the run folder, the adapter and the table; the ratios are in the log."""
    file = config(tiny_path, tmp_path, {"learnable": SETTINGS}, **NO_SCHEDULE)
    assert finetune("--config", file) == 0
    run = tmp_path / "run"
    saved = yaml.safe_load((run / "pruning.yaml").read_text())
    assert saved["stages"] and pruning_of(load_checkpoint(run)[0]).schedule.to_dict() == saved
    assert pruning_of(load_checkpoint(run / "checkpoints" / "last.ckpt")[0]).schedule.to_dict() == saved
    rows = {row["name"]: row for row in json.loads((run / "metrics.json").read_text())["rows"]}
    assert rows["adapted pruned"]["schedule"] == saved
    assert logged(run, "keep_ratio/layer00") == [1.0] * 6
    frozen = {stage["layer"]: stage["keep_ratio"] for stage in saved["stages"]}
    assert logged(run, "keep_ratio/layer01")[-1] == pytest.approx(frozen.get(1, 1.0))
    assert logged(run, "train/flops_ratio")[-1] == pytest.approx(0.97, abs=0.01)  # what whole tokens cost


def test_a_ranking_before_the_first_layer_learns_beside_the_ratios(tiny_path: str, tmp_path: Path) -> None:
    """It chooses from the start, is saved with what was frozen, taken over and chosen by again."""
    given = {"layer": 0, "criterion": {"name": "learned", "width": 16}, "keep_ratio": 0.8}
    settings = SETTINGS | {"start": {"stages": [given, *START["stages"]]}, "budget": 0.85}
    groups = {"learnable": settings, "learn_ranking": {"updates": 2}}
    assert finetune("--config", config(tiny_path, tmp_path, groups, **NO_SCHEDULE)) == 0
    run = tmp_path / "run"
    saved = yaml.safe_load((run / "pruning.yaml").read_text())
    assert saved["stages"][0] == given and len(logged(run, "train/ranking_loss")) == 6
    model, _ = load_checkpoint(run)
    ranking = scorers_of(text_decoder(model))
    fresh = tuner(tiny_path, schedule={"stages": [given]})
    fresh.configure_model()
    untrained = scorers_of(text_decoder(fresh.peft_model))[0].state_dict()
    assert list(ranking) == [0] and any(not w.equal(untrained[name]) for name, w in ranking[0].state_dict().items())
    again = Learnable(0.85, 1, start=settings["start"])
    early = tuner(tiny_path, schedule=None)
    early.configure_model()  # before anybody knows what is given
    fit_windows(early, tmp_path / "early", [LearnKeepRatios(again, lambda measured: TOKENS)])
    assert early.schedule.stages[0].method.learns
    more = tuner(tiny_path, schedule=None, init_adapter=str(run / "adapter"))
    fit_windows(more, tmp_path / "more", [LearnKeepRatios(again, lambda measured: TOKENS)])
    taken = scorers_of(text_decoder(more.peft_model))[0].state_dict()
    assert all(w.equal(taken[name]) for name, w in ranking[0].state_dict().items())


def test_rehearsal_learns_at_a_budget_that_the_small_model_can_meet(tiny_path: str, tmp_path: Path) -> None:
    start = {"stages": [{"layer": 8, "criterion": "instruction", "keep_ratio": 0.5}]}
    settings = SETTINGS | {"budget": 0.05, "first_layer": 4, "switch_layer": 12, "start": start}
    file = config(tiny_path, tmp_path, {"learnable": settings}, evaluation={"after": False}, **NO_SCHEDULE)
    assert finetune("--config", file, "--rehearse") == 0
    written = yaml.safe_load((tmp_path / "run-rehearsal" / "config.yaml").read_text())["pruning"]["learnable"]
    assert (written["first_layer"], written["switch_layer"]) == (1, 3) and 0.05 < written["budget"] < 0.5
    assert [stage["layer"] for stage in written["start"]["stages"]] == [2]


ONE = PruningStage(1, "image", 0.5)
TWO = [ONE, PruningStage(4, "instruction", 0.2)]


@pytest.mark.parametrize(
    ("start", "given", "expected"),
    [
        (None, {}, (2, "instruction", "image")),
        ([ONE], {}, (1, "image", "image")),
        (TWO, {}, (4, "image", "instruction")),
        (TWO, {"switch_layer": 3, "deep": "last_token"}, (3, "image", "last_token")),
        ([*TWO, PruningStage(5, "image", 0.1)], {"switch_layer": 3, "shallow": "image", "deep": "last_token"}, None),
    ],
    ids=["nothing", "one criterion", "two", "given", "all given"],
)
def test_criteria_come_from_the_start(start: Any, given: dict[str, Any], expected: Any) -> None:
    named = None if start is None else PruningSchedule(tuple(start)).to_dict()
    settings = Learnable(budget=0.6, first_layer=1, start=named, **given)
    config = LlamaConfig(num_hidden_layers=8, hidden_size=64, intermediate_size=128)
    found = settings.ratios(SimpleNamespace(text_config=config), (100, 20))
    assert (found.switch_layer, *map(lambda one: getattr(one, "name", one), found.criteria)) == (
        expected or (3, "image", "last_token")
    )


MIXED = {
    "stages": [
        {"layer": layer, "criterion": criterion, "keep_ratio": 1 - layer / 10}
        for layer, criterion in ((1, "image"), (2, "instruction"), (3, "image"))
    ]
}
STAGES = {"model": {"schedule": {"stages": [{"layer": 1, "criterion": "image", "keep_count": 4}]}}}


@pytest.mark.parametrize(
    ("settings", "groups", "message"),
    [
        (
            {},
            {},
            "pruning.learnable.budget and model.schedule both say how many tokens stay; set model.schedule to null",
        ),
        ({}, STAGES, "pruning.learnable.budget and model.schedule with a fixed count both say"),
        ({"budget": 0.1}, NO_SCHEDULE, "Give at least 0."),
        ({"switch_layer": 6}, NO_SCHEDULE, "switch_layer is 6; expected a layer of the decoder, 1 to 5"),
        ({"until": 0.1}, NO_SCHEDULE, "pruning.learnable.until is 0.1 and pruning.learnable.warmup 0.2"),
        ({"warmup": -1}, NO_SCHEDULE, "pruning.learnable.warmup is -1"),
        ({"step_size": 0}, NO_SCHEDULE, "pruning.learnable.step_size is 0"),
        ({"start": MIXED, "switch_layer": None}, NO_SCHEDULE, "ranks by image, instruction, image in turn"),
        (
            {"start": {"stages": [{"layer": 2, "criterion": {"name": "image", "window": 2}, "keep_ratio": 0.5}]}},
            NO_SCHEDULE,
            "criterion 'image(window=2)' chooses a set whose members depend on its size",
        ),
        ({"shallow": "instructions"}, NO_SCHEDULE, "did you mean 'instruction'"),
        ({"budgt": 0.5}, NO_SCHEDULE, "pruning.learnable.budget"),
    ],
)
def test_refused_before_training(
    tiny_path: str,
    tmp_path: Path,
    settings: dict[str, Any],
    groups: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = config(tiny_path, tmp_path, {"learnable": {**SETTINGS, **settings}}, **groups)
    assert message in error_of(capsys, "--config", file)


def test_the_best_weights_may_be_of_other_ratios(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tiny_path, tmp_path, {"learnable": SETTINGS}, **NO_SCHEDULE)
    assert "keep is best, but pruning.learnable freezes" in error_of(capsys, "--config", file, "--keep", "best")


def test_only_one_mode(tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes = {"learnable": SETTINGS, "elastic": {"budgets": [0.9, 0.95]}}
    assert "pruning.learnable and pruning.elastic both decide" in error_of(
        capsys, "--config", config(tiny_path, tmp_path, modes, **NO_SCHEDULE)
    )
