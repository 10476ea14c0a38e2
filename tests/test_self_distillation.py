"""The teacher's loss against logits at every position, in value and gradient; which pass runs which schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_llava
from torch import nn
from training_toys import SCHEDULE, CountingHead, ToyData, collate, quiet_trainer, sample, tuner

from himap_train import PruningSchedule, PruningStage, install_pruning
from himap_train.models.features import hidden_states
from himap_train.models.install import pruning_of, record_pruning
from himap_train.models.loss import distilled_loss, supervised_loss
from himap_train.training.adapter_module import Step, Teacher
from himap_train.training.module import LlavaFineTuner
from himap_train.training.schedules.elastic import Elastic, SelfDistillation
from himap_train.training.schedules.per_step import SchedulePerStep
from himap_train.training.schedules.settings import PruningSettings

FP32 = {"atol": 1e-5, "rtol": 1e-4}
STUDENT = PruningSchedule.from_dict(SCHEDULE)
DENSE = PruningSchedule()


def batch() -> dict[str, Any]:
    return collate([sample(0, answer=5), sample(1, answer=2), sample(2, answer=3, image=False)])


def naive(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the supervised positions of sum_v p (log p - log q), from full logits (B, S, V)."""
    total = student.new_zeros(())
    for row in range(len(labels)):
        for column in range(1, labels.shape[1]):
            if labels[row, column] != -100:
                p, q = (logits[row, column - 1].softmax(-1) for logits in (teacher, student))
                total = total + (p * (p.log() - q.log())).sum()
    return total


@pytest.mark.parametrize("chunk", [0, 1, 4, 1000])
def test_value_and_gradients_equal_full_logits(chunk: int) -> None:
    """The teacher is a constant: it gets no gradient."""
    inputs = batch()
    inputs.pop("ids")
    stock = inputs | inputs["images"]
    stock.pop("images")
    reference, ours = tiny_llava(), tiny_llava()
    dense, labels = tiny_llava(), inputs["labels"]
    for model in (reference, ours):
        install_pruning(model, STUDENT)
    expected_ce = reference(**stock).loss * 10
    with torch.no_grad():
        teacher_logits = dense(**stock).logits
    expected_kl = naive(reference(**stock).logits, teacher_logits, labels)
    teacher = hidden_states(dense, **inputs)
    ce, kl, count = distilled_loss(hidden_states(ours, **inputs), teacher, labels, ours.lm_head, chunk, calls=3)
    assert int(count) == 10 and expected_kl > 0.01
    torch.testing.assert_close(ce, expected_ce, **FP32)
    torch.testing.assert_close(kl, expected_kl, **FP32)
    (expected_ce + 0.7 * expected_kl).backward()
    (ce + 0.7 * kl).backward()
    assert all(parameter.grad is None for parameter in dense.parameters())
    found = dict(ours.named_parameters())
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name].grad, parameter.grad, atol=1e-4, rtol=2e-3, msg=name)


def test_logits_exist_for_a_chunk_of_supervised_rows_only() -> None:
    head = CountingHead()
    labels = torch.full((2, 50), -100)
    labels[:, 40:45] = 7
    hidden, teacher = torch.randn(2, 50, 8, requires_grad=True), torch.randn(2, 50, 8)
    distilled_loss(hidden, teacher, labels, head, chunk=4)
    assert head.rows == [4, 4, 4, 4, 2, 2]  # the student's and the teacher's


def test_nothing_supervised_gives_zero_with_a_graph() -> None:
    head, labels = nn.Linear(8, 20), torch.full((1, 5), -100)
    ce, kl, count = distilled_loss(torch.randn(1, 5, 8, requires_grad=True), torch.randn(1, 5, 8), labels, head)
    (ce + kl).backward()
    assert ce == kl == count == 0 and head.weight.grad is not None and not head.weight.grad.any()


def test_a_teacher_that_is_the_student_changes_nothing(tiny_path: str) -> None:
    model = tuner(tiny_path, lora_dropout=0.0)
    model.configure_model()
    ce, kl, count = model.distilled_batch_loss(batch(), Teacher(STUDENT, 1.0))
    total, same = model.batch_loss(batch())
    assert float(kl.detach()) == pytest.approx(0.0, abs=1e-5) and ce == total and count == same


def test_each_pass_runs_its_own_schedule(tiny_path: str) -> None:
    model = tuner(tiny_path, lora_dropout=0.0)
    model.configure_model()
    student, teacher = (PruningSchedule((PruningStage(2, "instruction", ratio),)) for ratio in (0.25, 0.75))
    kept: list[int] = []

    def note(*_: Any) -> None:
        kept.append(sum(len(row) for row in trace.kept[0]))

    with record_pruning(model.peft_model) as trace, model.running_step(Step(student)):
        decoder = model.peft_model.get_base_model().model.language_model
        decoder.register_forward_hook(note)
        hidden = model.teacher_states(batch(), teacher)
        assert not hidden.requires_grad and pruning_of(model.peft_model).schedule == student
        assert model.states(batch()).requires_grad
    text = int(batch()["attention_mask"].sum()) - 32
    assert kept == [text + 2 * 12, text + 2 * 4]


class Taught(LlavaFineTuner):
    """Plain gradient descent, so that a step shows the gradient."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


class Same:
    """A plan that runs the same in every step."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def at(self, step: int) -> Step:
        return self.step


def one_step(path: str, folder: Any, step: Step, **kwargs: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """What one step of plain gradient descent subtracts from each weight, that is the gradient; and the trainer."""
    model = Taught(path, schedule=SCHEDULE, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    torch.manual_seed(0)
    model.configure_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = quiet_trainer(
        folder, max_steps=1, callbacks=[SchedulePerStep(lambda *_, **__: Same(step))], **{"precision": 32, **kwargs}
    )
    trainer.fit(model, datamodule=ToyData(4, 4 // kwargs.get("accumulate_grad_batches", 1)))
    return {name: start[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_is_normalised_like_the_cross_entropy(tiny_path: str, tmp_path: Any, accumulate: int) -> None:
    """A sum over the window divided by the window's tokens, however it is cut into micro-batches."""
    step = Step(STUDENT, Teacher(DENSE, 2.0))
    moved, trainer = one_step(tiny_path, tmp_path, step, accumulate_grad_batches=accumulate)
    twin = Taught(tiny_path, schedule=SCHEDULE, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    torch.manual_seed(0)
    twin.configure_model()
    cross_entropy, divergence, count = twin.distilled_batch_loss(collate(ToyData(4).samples), Teacher(DENSE, 2.0))
    ((cross_entropy + 2 * divergence) / count).backward()
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(moved[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
    assert any("lora_B" in name and value.abs().max() > 1e-3 for name, value in moved.items())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["train/divergence"] == pytest.approx(float((divergence / count).detach()), rel=1e-4)
    assert logged["train/loss"] == pytest.approx(float((cross_entropy / count).detach()), rel=1e-4)


def test_weights_cast_for_the_teacher_are_not_the_students(tiny_path: str, tmp_path: Any) -> None:
    """Older torch would use them again, without gradients: a step like one without a teacher, but for a trace."""
    plain, _ = one_step(tiny_path, tmp_path, Step(STUDENT), precision="bf16-mixed")
    taught, _ = one_step(tiny_path, tmp_path, Step(STUDENT, Teacher(DENSE, 1e-12)), precision="bf16-mixed")
    assert any("lora_B" in name and value.abs().max() > 1e-3 for name, value in plain.items())
    for name, value in plain.items():
        torch.testing.assert_close(taught[name], value, atol=1e-4, rtol=1e-2, msg=name)


def test_elastic_training_distils_in_its_share_of_the_steps(tiny_path: str, tmp_path: Any) -> None:
    passes: list[tuple[bool, bool]] = []

    class Watched(LlavaFineTuner):
        def states(self, inputs: dict[str, Any]) -> torch.Tensor:
            passes.append((torch.is_grad_enabled(), bool(pruning_of(self.peft_model).schedule.stages)))
            return super().states(inputs)

    settings = PruningSettings(
        elastic=Elastic((0.7, 0.9), 0.0, SelfDistillation(share=1.0)), image_tokens=16, text_tokens=8
    )
    model = Watched(tiny_path, schedule=SCHEDULE, lora_r=4, lora_alpha=8)
    per_step = SchedulePerStep(lambda *given, **named: settings.plan(*given, seed=0, **named))
    quiet_trainer(tmp_path, max_steps=2, callbacks=[per_step]).fit(model, datamodule=ToyData(4))
    assert passes == [(False, False), (True, True)] * 2


def test_supervised_loss_is_the_first_of_the_two(tiny_path: str) -> None:
    hidden, labels, head = torch.randn(2, 9, 8), torch.full((2, 9), -100), nn.Linear(8, 20)
    labels[:, 5:7] = 3
    for chunk in (0, 1, 3):
        alone, count = supervised_loss(hidden, labels, head, chunk)
        ce, _, same = distilled_loss(hidden, torch.randn(2, 9, 8), labels, head, chunk)
        torch.testing.assert_close(ce, alone)
        assert count == same == 4
