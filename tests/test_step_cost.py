"""A guard on speed without a clock: FLOPs, operator calls, living bytes and waits for the device of a pruned step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from cases import make_case
from cost_toys import HIMAP, decoder, plan
from device_waits import forward_waits
from tiny import tiny_llava
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, install_pruning
from himap_train.allocations import AllocationCounter
from himap_train.models.features import hidden_states
from himap_train.models.install import pruning_of
from himap_train.models.lora import attach_lora
from himap_train.models.loss import supervised_loss
from himap_train.models.training_cost import training_flops

IMAGE, QUESTION, ANSWER = 144, 20, 10
ROW = f"t10 i{IMAGE} t{QUESTION} a{ANSWER}"
HIMAP_OF_SIX = plan((2, "instruction", 0.5), (4, "image", 0.25))


class Calls(TorchDispatchMode):
    """Counts operator calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def step(model: Any, rows: list[str]) -> None:
    base = model.get_base_model()
    case = make_case(base, rows)
    hidden = hidden_states(model, **case.inputs(labels=True))
    total, _ = supervised_loss(hidden, case.labels, base.lm_head)
    total.backward()


def with_lora(schedule: PruningSchedule) -> Any:
    return install_pruning(attach_lora(decoder(), r=8, alpha=16, projector="freeze").train(), schedule)


def prefill_calls(schedule: PruningSchedule, rows: list[str], model: LlavaForConditionalGeneration) -> Counter[str]:
    inputs = make_case(model, rows).inputs() | {"attention_mask": None}
    install_pruning(model, schedule)
    pruning_of(model).cpu_blocks = False  # whose number grows with the tokens
    with torch.no_grad(), Calls() as calls:
        hidden_states(model, **inputs)
    return calls.names


def test_flops_of_a_pruned_training_step_stay_within_the_bound() -> None:
    model = with_lora(HIMAP)
    pruning_of(model).cpu_blocks = False  # which skip some of what the mask hides
    layers = model.get_base_model().model.language_model.layers
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(model, [ROW])
    bound = training_flops(
        HIMAP,
        model.get_base_model().config,
        IMAGE,
        10 + QUESTION + ANSWER,
        lora_parameters=[sum(p.numel() for n, p in layer.named_parameters() if "lora_" in n) for layer in layers],
        supervised=ANSWER,
        images=0,
        trains_projector=False,
        lm_head_passes=2,
        attention_backward=2,
    )
    assert 0.98 * bound.total < counter.get_total_flops() <= bound.total


def test_operator_calls_do_not_grow_with_rows_or_tokens() -> None:
    model = tiny_llava()
    schedule = HIMAP_OF_SIX
    base = prefill_calls(schedule, ["t3 i16 t4"] * 2, model)
    assert prefill_calls(schedule, ["t3 i16 t4"] * 7, model) == base
    assert prefill_calls(schedule, ["t9 i64 t30"] * 2, model) == base


@pytest.mark.parametrize("row", [ROW, "t10 i16 t20 a10"], ids=["a large image", "a small one"])
def test_peak_memory_falls_as_the_tokens_do(row: str) -> None:
    peaks = []
    for schedule in (PruningSchedule(), HIMAP):
        model = with_lora(schedule)
        step(model, [row])
        model.zero_grad()
        with AllocationCounter([*model.parameters(), *model.buffers()]) as counter:
            step(model, [row])
        peaks.append(counter.peak)
    text, image = 10 + QUESTION + ANSWER, int(row.split()[1][1:])
    tokens = [2 * (image + text) + 3 * (image // 2 + text) + 7 * (image // 8 + text), 12 * (image + text)]
    fixed = 12 * 8 * 256 * 26 * 4 / peaks[0]  # gradients of LoRA, which pruning leaves alone
    assert peaks[1] / peaks[0] < (1 - fixed) * tokens[0] / tokens[1] + fixed + 0.05


@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "training"])
@pytest.mark.parametrize("second", ["image", "last_token", "stride", "random", "image_debiased"])
def test_one_transfer_and_no_other_wait_for_the_device(
    second: str, labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedules = PruningSchedule(), plan((2, "instruction", 0.5), (4, second, 0.25))
    dense, pruned = (forward_waits(schedule, labels, monkeypatch) for schedule in schedules)
    assert dense.waits, "the stock model itself asks the device; if it no longer does, drop this line"
    assert pruned.waits == dense.waits
    assert (dense.transfers, pruned.transfers) == (0, 1)


def test_logits_of_all_positions_never_exist_at_once() -> None:
    supervised, width, vocabulary, chunk = 2000, 64, 5000, 100
    lm_head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(1, supervised + 1, width, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, supervised + 1))
    with AllocationCounter([lm_head.weight, hidden, labels]) as counter:
        total, count = supervised_loss(hidden, labels, lm_head, chunk)
        total.backward()
    assert int(count) == supervised
    one_chunk, all_states = chunk * vocabulary * 4, supervised * width * 4
    assert one_chunk < counter.peak < 5 * one_chunk + 5 * all_states < supervised * vocabulary * 4


def test_the_frozen_tower_keeps_nothing_for_a_backward_pass() -> None:
    model = tiny_llava().train()
    trained: Any = install_pruning(attach_lora(model, r=4, alpha=8, projector="train"), HIMAP_OF_SIX)
    outputs: list[Tensor] = []
    for module in model.model.vision_tower.modules():
        module.register_forward_hook(lambda module, args, out: outputs.extend(tree_iter(out)))
    ids = make_case(model, ["t3 i16 t4 a2"])
    hidden = hidden_states(
        trained, input_ids=ids.input_ids, labels=ids.labels, images={"pixel_values": torch.randn(1, 3, 32, 32)}
    )
    assert hidden.requires_grad
    tensors = [out for out in outputs if isinstance(out, Tensor)]
    assert len(tensors) > 10 and not any(out.requires_grad for out in tensors)
