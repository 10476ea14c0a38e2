"""What decoder tests check, again and again: a pruned batch against the naive masked decoder."""

from __future__ import annotations

import torch
from cases import RAGGED, RAGGED_ANSWERS, TURNS, Case, make_case
from naive import naive_forward
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning
from himap_train.models.features import hidden_states

STATES = {"atol": 1e-4, "rtol": 1e-4}  # fp32, six layers, two orders of summation


def two_stages(criterion: str = "instruction", second: str = "image", positions: str = "keep") -> PruningSchedule:
    stages = (
        PruningStage(layer=2, criterion=criterion, keep_ratio=0.5),
        PruningStage(layer=4, criterion=second, keep_ratio=0.125),
    )
    return PruningSchedule(stages=stages, positions=positions)


def run(model: LlavaForConditionalGeneration, case: Case, labels: bool = False) -> tuple[Tensor, list[list[Tensor]]]:
    with torch.no_grad(), record_pruning(model) as trace:
        states = hidden_states(model, **case.inputs(labels))
    return states, trace.kept


def assert_same_kept(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    assert [[row.tolist() for row in stage] for stage in found] == [
        [row.tolist() for row in stage] for stage in expected
    ]


def assert_equals_naive(
    model: LlavaForConditionalGeneration, plan: PruningSchedule, case: Case, labels: bool = False
) -> list[list[Tensor]]:
    with torch.no_grad():
        expected = naive_forward(model, plan, **case.naive(labels))
    states, kept = run(install_pruning(model, plan), case, labels)
    assert_same_kept(kept, expected.kept)
    for row in range(len(states)):
        columns = case.columns(row)
        torch.testing.assert_close(states[row, columns], expected.hidden[row, columns], **STATES)
        dropped = [c for c in columns.tolist() if c not in kept[-1][row].tolist()] if kept else []
        assert not states[row, dropped].any(), f"row {row}: dropped columns are not zero"
    return kept


def assert_ragged_equal_naive(model: LlavaForConditionalGeneration, plan: PruningSchedule) -> None:
    """Prompts, answers and several turns."""
    assert_equals_naive(model, plan, make_case(model, RAGGED, "left", seed=1))
    assert_equals_naive(model, plan, make_case(model, RAGGED_ANSWERS, "right", seed=2), labels=True)
    assert_equals_naive(model, plan, make_case(model, TURNS), labels=True)


def assert_rows_equal_the_row_alone(
    model: LlavaForConditionalGeneration, rows: tuple[str, ...] | list[str], side: str, labels: bool = False
) -> tuple[Case, list[list[Tensor]]]:
    """The batch and what is kept of it."""
    case = make_case(model, rows, side)
    states, kept = run(model, case, labels)
    for b, spec in enumerate(rows):
        alone_states, alone_kept = run(model, make_case(model, [spec], seed=b), labels)
        columns = case.columns(b)
        torch.testing.assert_close(states[b, columns], alone_states[0], **STATES)
        assert_same_kept([[stage[b]] for stage in kept], [[columns[stage[0]]] for stage in alone_kept])
    return case, kept
