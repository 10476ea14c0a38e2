"""Gradients of the pruned decoder are those of the naive masked decoder, however the backward gets its activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import RAGGED, make_case
from gradient_checks import (
    CHECKPOINTING,
    LAYERS,
    NAMES,
    OTHER_ROWS,
    RELATIVE,
    assert_same_gradients,
    batches,
    gradients,
    himap,
    naive_gradients,
    trainable,
    with_leaves,
)
from naive import naive_loss
from transformers import LlavaForConditionalGeneration

from himap_train import install_pruning, remove_pruning
from himap_train.models.features import hidden_states

pytestmark = pytest.mark.core


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("reentrant", CHECKPOINTING, ids=NAMES)
@pytest.mark.parametrize(
    ("text", "attn"), [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("qwen2", "sdpa")]
)
def test_gradients_equal_the_oracle(text: str, attn: str, reentrant: bool | None, positions: str) -> None:
    model, plan = trainable(reentrant, text, attn), himap(positions=positions)
    case = batches(model)[0]
    expected = naive_gradients(plan, [case], text)
    install_pruning(model, plan)
    with_leaves(case)
    model(**case.inputs(labels=True)).loss.backward()
    assert_same_gradients(gradients(model, [case]), expected)


def nothing(model: LlavaForConditionalGeneration) -> None:
    """Between the forwards and the backwards."""


def evaluate(model: LlavaForConditionalGeneration) -> None:
    with torch.no_grad():
        model.eval()(**make_case(model, OTHER_ROWS, seed=5).inputs(labels=True))
    model.train()


def generate(model: LlavaForConditionalGeneration) -> None:
    model.eval()  # stock layers leave the cache out while they checkpoint
    model.generate(**make_case(model, RAGGED, "left").inputs(), max_new_tokens=2, do_sample=False)
    model.train()


def install_other(model: LlavaForConditionalGeneration) -> None:
    install_pruning(model, himap("last_token", "stride", "renumber"))


@pytest.mark.parametrize("between", [nothing, evaluate, generate, install_other, remove_pruning])
@pytest.mark.parametrize("reentrant", CHECKPOINTING, ids=NAMES)
def test_two_forwards_before_two_backwards(reentrant: bool | None, between: Callable[[Any], Any]) -> None:
    model, plan = trainable(reentrant), himap()
    cases = batches(model)
    expected = naive_gradients(plan, cases)
    install_pruning(model, plan)
    losses = [model(**with_leaves(case).inputs(labels=True)).loss for case in cases]
    between(model)
    for loss in losses:
        loss.backward()
    assert_same_gradients(gradients(model, cases), expected)


@pytest.mark.parametrize("reentrant", CHECKPOINTING, ids=NAMES)
@pytest.mark.parametrize("criterion", ["instruction", "image", "image_debiased", "last_token", "stride"])
def test_every_criterion_trains(criterion: str, reentrant: bool | None) -> None:
    model, plan = trainable(reentrant), himap(criterion, criterion)
    case = batches(model)[1]
    expected = naive_gradients(plan, [case])
    install_pruning(model, plan)
    model(**with_leaves(case).inputs(labels=True)).loss.backward()
    assert_same_gradients(gradients(model, [case]), expected)


@pytest.mark.parametrize("reentrant", CHECKPOINTING, ids=NAMES)
def test_random_trains_with_the_same_choice_in_the_recomputation(reentrant: bool | None) -> None:
    stored, model, plan = trainable(None), trainable(reentrant), himap("random", "random")
    case = batches(model)[0]
    found = []
    for each in (stored, model):
        install_pruning(each, plan)
        with_leaves(case)
        torch.manual_seed(0)
        each(**case.inputs(labels=True)).loss.backward()
        found.append(gradients(each, [case]))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("reentrant", CHECKPOINTING, ids=NAMES)
def test_frozen_decoder_trains_what_is_left(reentrant: bool | None) -> None:
    """As with LoRA: only some projections train, and nothing asks the embeddings for a gradient."""
    model, plan = trainable(reentrant), himap()
    case = batches(model)[0]
    expected = naive_gradients(plan, [case])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("v_proj" in name and "language_model" in name)
    if reentrant:
        model.enable_input_require_grads()
    install_pruning(model, plan)
    model(**case.inputs(labels=True)).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == LAYERS
    for name, value in found.items():
        assert float((value - expected[name]).abs().max() / expected[name].abs().max()) < RELATIVE, name


def test_hidden_states_have_the_same_gradients() -> None:
    model, plan = install_pruning(trainable(False), himap()), himap()
    case = batches(model)[0]
    expected = naive_gradients(plan, [case])
    with_leaves(case)
    naive_loss(model, hidden_states(model, **case.inputs(labels=True)), case.labels).backward()
    assert_same_gradients(gradients(model, [case]), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=NAMES[1:])
def test_checkpointing_really_recomputes(reentrant: bool) -> None:
    model = install_pruning(trainable(reentrant), himap())
    lengths: list[int] = []
    model.model.language_model.layers[4].mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    case = make_case(model, ["t3 i16 t4 a3"])
    loss = model(**case.inputs(labels=True)).loss
    assert lengths == [3 + 4 + 4 + 3]  # short in the forward: tokens are gone
    loss.backward()
    assert lengths == [14, 14]
