"""What tests of gradients share: models that train, two ragged batches, and the naive decoder's gradients."""

from __future__ import annotations

from cases import RAGGED_ANSWERS, Case, make_case
from naive import naive_forward, naive_loss
from tiny import tiny_llava
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning

RELATIVE = 2e-4  # fp32: largest error of a gradient, relative to its largest entry
LAYERS = 5
CHECKPOINTING = [None, False, True]
NAMES = ["stored", "checkpointed", "checkpointed-reentrant"]
OTHER_ROWS = ("t1 i5 t6 a2", "t4 i20 t1 a3 t2 a2", "t3 i4 i4 a1")


def himap(first: str = "instruction", second: str = "image", positions: str = "keep") -> PruningSchedule:
    stages = (
        PruningStage(layer=2, criterion=first, keep_ratio=0.5),
        PruningStage(layer=3, criterion=second, keep_ratio=0.25),
    )
    return PruningSchedule(stages=stages, positions=positions)


def trainable(reentrant: bool | None, text: str = "llama", attn: str = "sdpa") -> LlavaForConditionalGeneration:
    model = tiny_llava(text, layers=LAYERS, attn=attn).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def with_leaves(case: Case) -> Case:
    """Image features that collect a gradient, as the projector's output does."""
    case.features = [feature.detach().clone().requires_grad_() for feature in case.features]
    return case


def gradients(model: LlavaForConditionalGeneration, cases: list[Case]) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for number, case in enumerate(cases):
        found |= {f"features {number}.{i}": f.grad.clone() for i, f in enumerate(case.features) if f.grad is not None}
    return found


def naive_gradients(plan: PruningSchedule, cases: list[Case], text: str = "llama") -> dict[str, Tensor]:
    model = tiny_llava(text, layers=LAYERS)
    for case in map(with_leaves, cases):
        naive_loss(model, naive_forward(model, plan, **case.naive(labels=True)).hidden, case.labels).backward()
    return gradients(model, cases)


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(expected) > 9 * LAYERS and all(bool(value.any()) for value in expected.values())
    for name, value in expected.items():
        error = float((found[name] - value).abs().max() / value.abs().max())
        assert error < RELATIVE, f"{name}: relative error {error:.1e}"


def batches(model: LlavaForConditionalGeneration) -> list[Case]:
    return [make_case(model, RAGGED_ANSWERS, "right"), make_case(model, OTHER_ROWS, "left", seed=11)]


def assert_gradients_equal_naive(plan: PruningSchedule, reentrant: bool | None) -> None:
    """Two forward passes and then two backward ones."""
    model = trainable(reentrant)
    cases = batches(model)
    expected = naive_gradients(plan, cases)
    install_pruning(model, plan)
    for loss in [model(**with_leaves(case).inputs(labels=True)).loss for case in cases]:
        loss.backward()
    assert_same_gradients(gradients(model, cases), expected)
