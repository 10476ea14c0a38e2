"""Dense steps: which steps they are, what they teach, and what comes out of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_runs import config, error_of, logged
from test_self_distillation import DENSE, STUDENT, Taught, batch
from training_toys import ToyData, collate, finetune, quiet_trainer

from himap_train.checkpoints.load import load_checkpoint
from himap_train.models.install import pruning_of
from himap_train.training.adapter_module import Step, Teacher
from himap_train.training.schedules.dense_steps import DenseStepPlan, DenseSteps
from himap_train.training.schedules.per_step import SchedulePerStep
from himap_train.training.schedules.settings import PruningSettings


def tuned(path: str, schedule: Any) -> Taught:
    model = Taught(path, schedule=schedule, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    model.configure_model()
    return model


def test_the_share_of_the_steps_is_dense_and_the_same_in_every_process() -> None:
    plan = DenseStepPlan(DenseSteps(0.1, 2.0), STUDENT, seed=3)
    steps = [plan.at(number) for number in range(2000)]
    dense = [step for step in steps if step.teacher is not None]
    assert 0.08 < len(dense) / 2000 < 0.12
    assert all(step.schedule.dense and step.teacher == Teacher(STUDENT, 2.0) for step in dense)
    assert all(step.schedule == STUDENT for step in steps if step.teacher is None)
    assert steps[7:9] == [DenseStepPlan(DenseSteps(0.1, 2.0), STUDENT, seed=3).at(number) for number in (7, 8)]
    assert steps != [DenseStepPlan(DenseSteps(0.1, 2.0), STUDENT, seed=4).at(number) for number in range(2000)]


def test_the_dense_pass_is_drawn_to_the_pruned_one(tiny_path: str) -> None:
    """By the divergence of the two from full logits; none where nothing is pruned."""
    model = tuned(tiny_path, STUDENT.to_dict())
    inputs = batch()
    with model.running_step(Step(DENSE)):
        _, divergence, _ = model.distilled_batch_loss(inputs, Teacher(STUDENT, 1.0))
    head, rows = model.peft_model.get_base_model().lm_head, inputs["labels"][:, 1:] != -100
    with torch.no_grad():
        pruned = head(model.states(inputs))[:, :-1][rows].log_softmax(-1)
        with model.running_step(Step(DENSE)):
            dense = head(model.states(inputs))[:, :-1][rows].log_softmax(-1)
    expected = (pruned.exp() * (pruned - dense)).sum()
    assert float(expected) > 0.01
    torch.testing.assert_close(divergence.detach(), expected, atol=1e-4, rtol=1e-3)
    divergence.backward()
    gradients = [float(p.grad.abs().max()) for n, p in model.named_parameters() if p.grad is not None and "lora_B" in n]
    assert len(gradients) == 6 * 7 and max(gradients) > 1e-4
    with model.running_step(Step(DENSE)):
        _, nothing, _ = model.distilled_batch_loss(inputs, Teacher(DENSE, 1.0))
    assert abs(float(nothing.detach())) < 1e-5


def test_both_losses_fall(tiny_path: str, tmp_path: Path) -> None:
    """Ten steps of plain gradient descent, all of them dense."""
    settings = PruningSettings(dense_steps=DenseSteps(share=1.0, weight=1.0))
    model = tuned(tiny_path, STUDENT.to_dict())
    torch.manual_seed(0)
    per_step = SchedulePerStep(lambda *given, **named: settings.plan(*given, seed=0, **named))
    data = ToyData(4, 4)
    inputs = collate(data.samples)

    def losses() -> tuple[float, float]:
        with torch.no_grad(), model.running_step(Step(DENSE)):
            found = model.distilled_batch_loss(inputs, Teacher(STUDENT, 1.0))
        return float(found[0]), float(found[1])

    before = losses()
    model.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        [p for p in model.parameters() if p.requires_grad], lr=0.02
    )
    quiet_trainer(tmp_path, max_steps=10, callbacks=[per_step], precision=32).fit(model, datamodule=data)
    after = losses()
    assert after[0] < before[0] and sum(after) < 0.9 * sum(before)


def test_a_run_is_saved_with_its_schedule_and_served_dense(
    tiny_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = config(tiny_path, tmp_path, {"dense_steps": {"share": 0.5}})
    assert finetune("--config", made) == 0
    assert "dense steps: 50% of the steps run dense" in capsys.readouterr().out
    dense = logged(tmp_path / "run", "train/dense")
    assert len(dense) == 6 and set(dense) == {0.0, 1.0} and logged(tmp_path / "run", "train/divergence")
    rows = [row["name"] for row in json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]]
    assert "adapted, evaluated dense" in rows
    assert pruning_of(load_checkpoint(tmp_path / "run")[0]).schedule.stages
    served = pruning_of(load_checkpoint(tmp_path / "run", schedule=None)[0])
    assert served is None or served.schedule.dense


@pytest.mark.parametrize(
    ("pruning", "schedule", "message"),
    [
        ({"dense_steps": {"share": 1.2}}, "himap", "pruning.dense_steps.share is 1.2; expected a share"),
        ({"dense_steps": {"weight": 0}}, "himap", "pruning.dense_steps.weight is 0.0; expected a number above 0"),
        ({"dense_steps": {}}, None, "model.schedule is dense, as every step would be; give it stages"),
        ({"dense_steps": {}, "curriculum": {}}, "himap", "pruning.curriculum and pruning.dense_steps both decide"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pruning: Any,
    schedule: Any,
    message: str,
) -> None:
    made = config(tiny_path, tmp_path, pruning, model={"schedule": schedule})
    assert message in error_of(capsys, "--config", made)
