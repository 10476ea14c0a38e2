"""The curriculum's strength at single steps, against values worked out by hand, and what the decoder runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from training_toys import SCHEDULE, ToyData, quiet_trainer, save_tiny, tuner

from himap_train import PruningSchedule, PruningStage
from himap_train.models.install import pruning_of
from himap_train.training.schedules.curriculum import Curriculum, CurriculumSteps
from himap_train.training.schedules.elastic import Elastic
from himap_train.training.schedules.per_step import SchedulePerStep
from himap_train.training.schedules.settings import PruningSettings

SCHEDULED = PruningSchedule.from_dict(SCHEDULE)
WAITING = PruningSchedule((PruningStage(1, "instruction", 0.5, attention_below=0.3), PruningStage(2, "image", 0.5)))


@pytest.mark.parametrize(
    ("curriculum", "expected"),
    [
        (Curriculum("linear", 0.5), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
        (Curriculum("cosine", 0.5), [0.0, 0.1464466, 0.5, 0.8535534, 1.0, 1.0, 1.0, 1.0]),
        (Curriculum("staged", 1.0, steps=4), [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]),
        (Curriculum("staged", 1.0, steps=1), [0.0] * 8),
        (Curriculum("linear", 0.0), [1.0] * 8),
    ],
)
def test_strength(curriculum: Curriculum, expected: list[float]) -> None:
    assert [curriculum.strength(step, 8) for step in range(8)] == pytest.approx(expected)
    assert curriculum.strength(8, 8) == 1.0


def test_ratios_fall_from_dense_to_the_very_schedule() -> None:
    schedule = PruningSchedule((PruningStage(2, "instruction", 0.6), PruningStage(4, "image", 0.1)), "renumber")
    plan = CurriculumSteps(Curriculum(share=0.5), schedule, 8, layers=6)
    ratios = [[stage.keep_ratio for stage in plan.at(step).schedule.stages] for step in range(8)]
    assert ratios[0] == [] and ratios[1] == pytest.approx([0.9, 0.775]) and ratios[3] == pytest.approx([0.7, 0.325])
    assert all(plan.at(step).schedule is schedule for step in range(4, 8))
    assert all(plan.at(step).schedule.positions == "renumber" for step in range(8))


def test_llavolta_compresses_less_and_less_and_ends_dense() -> None:
    """Its scripts' pivots, 1300, 2600 and 3900 of 5200 steps: layers 2, 2, 16, strides 8, 2, 2, then none."""
    settings = Curriculum(phases="llavolta", share=0.75)
    plan = CurriculumSteps(settings, PruningSchedule(), 5200, layers=32)
    found = []
    for step in (0, 1299, 1300, 2599, 2600, 3899, 3900, 5199):
        found.append([(s.layer, s.criterion, s.keep_ratio) for s in plan.at(step).schedule.stages])
    first, second, third = ([(layer, "average-pool", ratio)] for layer, ratio in ((2, 1 / 8), (2, 1 / 2), (16, 1 / 2)))
    assert found == [first, first, second, second, third, third, [], []]
    assert plan.at(3900).figures == {"train/phase": 3.0} and "3 phases to the schedule" in str(plan)
    shallow = CurriculumSteps(settings, PruningSchedule(), 8, layers=8)
    assert [shallow.at(step).schedule.stages[0].layer for step in (0, 2, 4)] == [1, 1, 4]
    own = CurriculumSteps(Curriculum(phases=["none", {"preset": "himap"}], share=1.0), SCHEDULED, 4, layers=6)
    assert [len(own.at(step).schedule.stages) for step in range(5)] == [0, 0, 2, 2, 1]


class Kept(Callback):
    """Image tokens left in each optimizer step of one micro-batch of two rows; None for a dense one."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        last = pruning_of(module.peft_model).last
        self.seen.append(last.kept[0] if last else None)


class SaveAndStop(Callback):
    """After the third step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.file)
            trainer.should_stop = True


def run(path: str, folder: Path, *callbacks: Callback, resume: Path | None = None) -> Any:
    """Eight steps, the first four of them on the way to half of 2 x 16 image tokens."""
    settings, model = PruningSettings(curriculum=Curriculum(share=0.5)), tuner(path)
    per_step = SchedulePerStep(partial(settings.plan, seed=0))
    trainer = quiet_trainer(folder, max_steps=8, max_epochs=-1, callbacks=[per_step, *callbacks])
    trainer.fit(model, datamodule=ToyData(8), ckpt_path=resume, weights_only=True)
    return model


def test_the_decoder_runs_it_and_a_resumed_run_goes_on_with_it(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "tiny")
    straight, first, second = Kept(), Kept(), Kept()
    model = run(path, tmp_path, straight)
    assert straight.seen == [None, 28, 24, 20, 16, 16, 16, 16]
    assert pruning_of(model.peft_model).schedule == model.schedule == SCHEDULED
    last = tmp_path / "last.ckpt"
    run(path, tmp_path, first, SaveAndStop(last))
    run(path, tmp_path, second, resume=last)
    assert first.seen == straight.seen[:3] and second.seen == straight.seen[3:]


def test_phases_run_in_the_decoder_and_the_model_is_served_dense(tmp_path: Path) -> None:
    settings, kept = PruningSettings(curriculum=Curriculum(phases="llavolta", share=0.75)), Kept()
    model = tuner(save_tiny(tmp_path / "tiny"), schedule=None)
    per_step = SchedulePerStep(partial(settings.plan, seed=0))
    trainer = quiet_trainer(tmp_path, max_steps=8, max_epochs=-1, callbacks=[per_step, kept])
    trainer.fit(model, datamodule=ToyData(8))
    assert kept.seen == [4, 4, 16, 16, 16, 16, None, None]
    assert pruning_of(model.peft_model).schedule == model.schedule == PruningSchedule()


@pytest.mark.parametrize(
    ("curriculum", "schedule", "message"),
    [
        (Curriculum(share=1.5), SCHEDULED, "pruning.curriculum.share is 1.5; expected a share from 0 to 1"),
        (Curriculum(steps=0), SCHEDULED, "pruning.curriculum.steps is 0; expected 1 or more"),
        (Curriculum(phases="llavotla"), PruningSchedule(), "phases 'llavotla' are unknown; did you mean 'llavolta'"),
        (Curriculum(phases=[]), SCHEDULED, "pruning.curriculum.phases is empty"),
        (Curriculum(), PruningSchedule(), "pruning.curriculum changes .* is dense"),
        (Curriculum(), PruningSchedule((PruningStage(3, "image", 0.5),), enter=2), "starts dense, .* enter at layer 2"),
        (Curriculum(), WAITING, "needs a keep_ratio .* at layer 1 waits until"),
        (Curriculum(), PruningSchedule((PruningStage(2, "image", keep_count=8),)), r"fixed count \(8\)"),
    ],
)
def test_what_cannot_be_is_refused(curriculum: Curriculum, schedule: PruningSchedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningSettings(curriculum=curriculum).check(schedule)


def test_two_modes_at_once_are_refused() -> None:
    settings = PruningSettings(elastic=Elastic((0.5, 0.9)), curriculum=Curriculum())
    with pytest.raises(ValueError, match="pruning.elastic and pruning.curriculum both decide .* all but one to null"):
        settings.check(SCHEDULED)
