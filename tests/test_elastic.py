"""Elastic training: what is drawn, on every rank and after a resume, and that the decoder runs it."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from processes import in_processes
from tiny import tiny_llava
from training_toys import SCHEDULE, collate, fit_windows, sample, tuner

from himap_train import PruningSchedule, PruningStage
from himap_train.models.install import pruning_of
from himap_train.training.adapter_module import Step
from himap_train.training.callbacks.interrupt import Interrupted
from himap_train.training.schedules.elastic import GRID, Elastic, ElasticSteps, SelfDistillation
from himap_train.training.schedules.per_step import SchedulePerStep
from himap_train.training.schedules.settings import PruningSettings

HIMAP = PruningSchedule.from_dict(SCHEDULE)
TOKENS = (16, 8)
ELASTIC = Elastic((0.6, 0.9), dense_share=0.2, self_distillation=SelfDistillation(share=0.5))


@pytest.fixture(scope="module")
def config() -> Any:
    return tiny_llava().config


def steps(config: Any, elastic: Elastic = ELASTIC, seed: int = 3) -> ElasticSteps:
    return ElasticSteps(elastic, HIMAP, config, seed, TOKENS)


# ---- what is drawn ----


def test_draws_depend_on_seed_and_step_alone(config: Any) -> None:
    """Not on what was drawn before, nor on any generator of the process."""
    forwards = [steps(config).at(step) for step in range(30)]
    torch.manual_seed(99)
    np.random.seed(99)
    plan = steps(config)
    assert [plan.at(step) for step in reversed(range(30))] == forwards[::-1]
    assert [steps(config, seed=4).draw(step) for step in range(30)] != [plan.draw(step) for step in range(30)]


def test_budgets_cover_the_range_evenly_and_shares_are_kept(config: Any) -> None:
    drawn = [steps(config).draw(step) for step in range(4000)]
    pruned = np.array([budget for budget, _ in drawn if budget < 1.0])
    assert len(pruned) / 4000 == pytest.approx(0.8, abs=0.03)
    assert (pruned.min(), pruned.max()) == (0.6, 0.9) and len(set(pruned)) == GRID + 1
    assert np.histogram(pruned, bins=4, range=(0.6, 0.9))[0] / len(pruned) == pytest.approx([0.25] * 4, abs=0.03)
    assert not any(taught for budget, taught in drawn if budget == 1.0)
    assert sum(taught for _, taught in drawn) / len(pruned) == pytest.approx(0.5, abs=0.03)


def test_schedules_meet_their_budget_and_teachers_are_denser(config: Any) -> None:
    """As near as 16 whole image tokens allow."""
    plan = steps(config)
    for step in range(60):
        budget, taught = plan.draw(step)
        found = plan.at(step)
        ratio = found.schedule.cost(config, *TOKENS).flops_ratio
        assert ratio == pytest.approx(budget, abs=0.03) and found.figures["train/flops_ratio"] == ratio
        assert [stage.layer for stage in found.schedule.stages] == ([2] if budget < 1.0 else [])
        assert (found.teacher is not None) == taught
        assert found.teacher is None or not found.teacher.schedule.stages


def test_cost_beside_a_single_budget_is_told(config: Any) -> None:
    plan = steps(config)
    average = np.mean([plan.at(step).figures["train/flops_ratio"] for step in range(4000)])
    told, own = (float(str(plan).split(text)[1].split()[0].rstrip(";")) for text in ("a pass costs", "schedule alone"))
    assert told == pytest.approx(average, abs=0.01)
    assert own == pytest.approx(HIMAP.cost(config, *TOKENS).flops_ratio, abs=0.001)
    assert "40% of the steps a forward pass at 1.0" in str(plan)


# ---- what runs ----


class Seen(Callback):
    """Notes, for each micro-batch, the optimizer step, the schedule and the image tokens that really stayed."""

    def __init__(self, stop: int | None = None) -> None:
        self.train: list[Any] = []
        self.validation: list[Any] = []
        self.losses: list[float] = []
        self.stop = stop

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pruning = pruning_of(module.peft_model)
        self.train.append((pruning.schedule, pruning.last.kept if pruning.last else None))
        self.losses.append(float(outputs["loss"]))
        if len(self.train) == self.stop:
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.validation.append(pruning_of(module.peft_model).schedule)


def per_step(settings: PruningSettings, seed: int = 3) -> SchedulePerStep:
    return SchedulePerStep(partial(settings.plan, seed=seed), lambda: TOKENS)


def fit(path: str, folder: Path, seen: Seen, resume: bool = False, **kwargs: Any) -> Any:
    """Eight optimizer steps of two micro-batches."""
    callbacks = [seen, per_step(PruningSettings(elastic=ELASTIC))]
    return fit_windows(tuner(path, lora_dropout=0.0), folder, callbacks, resume, **kwargs)


def test_decoder_runs_what_was_drawn_and_validation_the_schedule(tiny_path: str, tmp_path: Path, config: Any) -> None:
    seen = Seen()
    model = fit(tiny_path, tmp_path, seen, limit_val_batches=1, val_check_interval=3)
    plan, kept = steps(config), []
    for step in range(8):
        drawn = plan.at(step).schedule
        rows = drawn.cost(config, *TOKENS).image_tokens_per_layer[2]
        kept += 2 * [[2 * rows] if drawn.stages else None]  # two micro-batches of two rows with an image each
    assert [counts for _, counts in seen.train] == kept
    assert len({str(counts) for counts in kept}) > 3 and None in kept
    assert seen.validation and set(seen.validation) == {HIMAP}
    assert pruning_of(model.peft_model).schedule == HIMAP == model.schedule


def test_a_resumed_run_draws_and_learns_the_same(tiny_path: str, tmp_path: Path) -> None:
    straight, first, second = Seen(), Seen(stop=5), Seen()
    expected = fit(tiny_path, tmp_path / "straight", straight)
    with pytest.raises(Interrupted):
        fit(tiny_path, tmp_path / "cut", first)
    resumed = fit(tiny_path, tmp_path / "cut", second, resume=True)
    assert first.losses + second.losses == straight.losses and len(second.losses) == 10
    weights = dict(expected.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in resumed.named_parameters())


def test_checkpoints_carry_the_schedule_and_not_the_last_draw(tiny_path: str, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(tiny_path, tmp_path, Seen(stop=3))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert str(HIMAP.to_dict()) in str(saved)


def test_all_ranks_train_for_the_sample_that_the_first_has_counted() -> None:
    """The others have checked no data."""

    def broadcast(value: Any) -> Any:
        box = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    def drawn() -> list[Any]:
        given: list[Any] = []
        module = SimpleNamespace(
            schedule=HIMAP,
            peft_model=SimpleNamespace(config=tiny_llava().config),
            use_step=given.append,
            log_dict=lambda *_, **__: None,
        )
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(broadcast=broadcast), estimated_stepping_batches=9.0)
        counted = TOKENS if torch.distributed.get_rank() == 0 else None
        callback = SchedulePerStep(partial(PruningSettings(elastic=ELASTIC).plan, seed=3), lambda: counted)
        callback.on_train_start(trainer, module)
        for step in range(9):
            trainer.global_step = step
            callback.on_train_batch_start(trainer, module, {}, step)
        return given

    first, second = in_processes(2, drawn)
    assert first == second and len({str(step.schedule) for step in first}) > 3


def test_guard_notices_a_step_that_runs_another_schedule(tiny_path: str) -> None:
    """Also where it should have run dense; a step's own is no other."""
    model = tuner(tiny_path)
    model.configure_model()
    for own in (PruningSchedule((PruningStage(2, "instruction", 0.25),)), PruningSchedule()):
        model.adopt(own)
        with model.running_step(Step(HIMAP)):
            model.batch_loss(collate([sample(0)]))
        model.validation_step(collate([sample(0)]), 0)
        pruning_of(model.peft_model).schedule = HIMAP
        with pytest.raises(RuntimeError, match="runs another schedule"):
            model.validation_step(collate([sample(0)]), 0)


# ---- errors ----


@pytest.mark.parametrize(
    ("elastic", "message"),
    [
        (Elastic((0.9, 0.3)), r"pruning.elastic.budgets is \[0.9, 0.3\], which is upside down; give the lowest"),
        (Elastic((0.0, 0.3)), "outside 0 to 1"),
        (Elastic((0.4, 1.3)), "outside 0 to 1"),
        (Elastic((40.0, 30.0)), "outside 0 to 1"),
        (Elastic((0.4, 0.9), dense_share=1.5), "pruning.elastic.dense_share is 1.5; expected a share from 0 to 1"),
        (Elastic((0.4, 0.9), 0.1, SelfDistillation(share=-1)), "self_distillation.share is -1"),
        (Elastic((0.4, 0.9), 0.1, SelfDistillation(weight=0)), "self_distillation.weight is 0; expected a number"),
        (Elastic((0.4, 0.9), 0.1, SelfDistillation(teacher=0.8)), r"expected a budget from 0.9 .* to 1 \(dense\)"),
    ],
)
def test_wrong_values_are_refused(elastic: Elastic, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningSettings(elastic=elastic).check(HIMAP)


def test_schedules_that_cannot_follow_a_budget_are_refused() -> None:
    settings = PruningSettings(elastic=ELASTIC)
    settings.check(HIMAP)
    with pytest.raises(ValueError, match="pruning.elastic changes how much .* dense .* such as himap"):
        settings.check(PruningSchedule())
    with pytest.raises(ValueError, match=r"layer 2 keeps a fixed count \(8\).* give keep_ratio"):
        settings.check(PruningSchedule((PruningStage(2, "image", keep_count=8),)))


def test_impossible_budgets_name_the_least(config: Any) -> None:
    least = PruningSchedule((PruningStage(2, "image", 0.0),)).cost(config, *TOKENS).flops_ratio
    ELASTIC.check_possible(HIMAP, config, TOKENS)
    with pytest.raises(ValueError, match=rf"pruning.elastic.budgets: .*at least {least:.3f}.* 16 image and 8 text"):
        replace(ELASTIC, budgets=(0.1, 0.9)).check_possible(HIMAP, config, TOKENS)
    late = replace(HIMAP.scaled_to(6), enter=1, stages=(PruningStage(2, "image", 0.5),))
    with pytest.raises(ValueError, match="pruning.elastic.budgets: the budget 0.8875 is above .* enter at layer 1"):
        replace(ELASTIC, budgets=(0.7, 1.0)).check_possible(late, config, TOKENS)


def test_tokens_are_given_both_or_measured() -> None:
    with pytest.raises(ValueError, match="give both"):
        PruningSettings(elastic=ELASTIC, image_tokens=576).check(HIMAP)
    with pytest.raises(ValueError, match="pruning.text_tokens is 0"):
        PruningSettings(elastic=ELASTIC, image_tokens=576, text_tokens=0).check(HIMAP)
    with pytest.raises(ValueError, match="nobody has measured; set pruning.image_tokens"):
        PruningSettings(elastic=ELASTIC).tokens(None)
    assert PruningSettings(elastic=ELASTIC, image_tokens=576, text_tokens=90).tokens((1, 2)) == (576, 90)
