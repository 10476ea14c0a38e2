"""Compiled decoder layers: the same numbers, one code for the layers of a stage, nothing left on the model."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import make_case
from checks import STATES, two_stages
from tiny import tiny_llava
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import pad

from himap_train import PruningSchedule, PruningStage, install_pruning, remove_pruning
from himap_train.benchmark.methods import find_method
from himap_train.benchmark.sizes import build_model, find_size
from himap_train.benchmark.workload import Workload, make_batch
from himap_train.models.compiled import CompiledLayers, require_compiler
from himap_train.models.llava import hidden_states
from himap_train.models.lora import attach_lora
from himap_train.models.loss import supervised_loss
from himap_train.training.cli import FinetuneCLI

BACKEND = "aot_eager"  # traces forward and backward as inductor does, and runs the same kernels as without
GRADIENTS = {"atol": 1e-6, "rtol": 1e-4}
SECTIONS = 3  # of a schedule with two stages
ROWS = ["t3 i16 t4 a3"] * 2
OTHER_ROWS = ["t2 i9 t7 a2"] * 2


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiled code belongs to the process; here each test has its own."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def trained(checkpointing: bool = False) -> Any:
    """With LoRA of which both factors do something: seven layers, of which three run between stages and rank."""
    model = attach_lora(tiny_llava(layers=7).train(), r=2, alpha=4)
    if checkpointing:
        model.get_base_model().model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(model: Any, rows: list[str], seed: int = 0, pad_to: int = 0) -> dict[str, Tensor]:
    """Loss and gradients."""
    case = make_case(model.get_base_model(), rows, seed=seed)
    gap = (0, max(pad_to - case.input_ids.shape[1], 0))
    case.input_ids, case.attention_mask = pad(case.input_ids, gap), pad(case.attention_mask, gap)
    case.labels = pad(case.labels, gap, value=-100)
    hidden = hidden_states(model, **case.inputs(labels=True))
    total, count = supervised_loss(hidden, case.labels, model.get_base_model().lm_head)
    (total / count).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {"loss": total.detach()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 90
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **GRADIENTS, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_layers_of_a_stage_share_their_code_and_later_batches_find_it(checkpointing: bool) -> None:
    model = trained(checkpointing)
    install_pruning(model, two_stages())
    expected = [step(model, ROWS, seed) for seed in (0, 10)]
    assert not graphs()
    install_pruning(model, two_stages(), CompiledLayers(BACKEND))
    assert_same(step(model, ROWS, 0), expected[0])
    assert graphs() == SECTIONS and not counters["graph_break"]
    assert_same(step(model, ROWS, 10), expected[1])
    assert graphs() == SECTIONS


def test_other_lengths_are_right_and_beyond_the_limit_uncompiled() -> None:
    model = trained()
    install_pruning(model, two_stages())
    expected = [step(model, rows) for rows in (ROWS, OTHER_ROWS)]
    install_pruning(model, two_stages(), CompiledLayers(BACKEND, most=SECTIONS))
    assert_same(step(model, ROWS), expected[0])
    with pytest.warns(UserWarning, match="3 shapes of decoder layers are compiled.*pad_to_multiple_of"):
        assert_same(step(model, OTHER_ROWS), expected[1])
    assert graphs() == SECTIONS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(step(model, ROWS), expected[0])


def test_lengths_are_rounded_up_behind_a_stage() -> None:
    model, lengths = trained(), []
    norm = model.get_base_model().model.language_model.norm
    norm.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    expected = []
    for compiled in (None, CompiledLayers(BACKEND, multiple=8)):
        install_pruning(model, two_stages(), compiled)
        found = [step(model, rows, pad_to=32) for rows in (["t3 i16 t4 a3"] * 2, ["t3 i16 t5 a4", "t2 i16 t1 a2"])]
        if expected:
            assert graphs() == SECTIONS
            for ours, theirs in zip(found, expected, strict=True):
                assert_same(ours, theirs)
        expected = found
    assert lengths == [12, 14, 16, 16]


def test_ragged_rows_with_padding() -> None:
    model, rows = trained(), ["t3 i16 t4 a3", "t5 a4", "t2 i9 t3 i16 t5 a1"]
    install_pruning(model, two_stages())
    expected = step(model, rows)
    install_pruning(model, two_stages(), CompiledLayers(BACKEND))
    assert_same(step(model, rows), expected)
    assert graphs() == SECTIONS


def test_an_empty_schedule_is_compiled_too() -> None:
    model = trained()
    expected = step(model, ROWS)
    install_pruning(model, PruningSchedule(), CompiledLayers(BACKEND))
    assert_same(step(model, ROWS), expected)
    assert graphs() == 2  # nothing below the first layer is trained, so its input alone wants no gradient


class Loss(torch.nn.Module):
    """What Lightning's DDP strategy wraps: a module whose forward is the training step."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: list[str]) -> Tensor:
        case = make_case(self.model.get_base_model(), rows)
        hidden = hidden_states(self.model, **case.inputs(labels=True))
        return supervised_loss(hidden, case.labels, self.model.get_base_model().lm_head)[0]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_a_layer_stays_one_graph_under_ddp(checkpointing: bool, tmp_path: Any) -> None:
    """One process is enough: torch's DDP optimizer cuts the graphs of every compiled function that DDP runs."""
    model, built = trained(checkpointing), []

    def backend(graph: Any, inputs: Any) -> Any:
        built.append(graph)
        return graph.forward

    install_pruning(model, two_stages())
    expected = Loss(model)(ROWS)
    install_pruning(model, two_stages(), CompiledLayers(backend))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = torch.nn.parallel.DistributedDataParallel(Loss(model), bucket_cap_mb=0.001)(ROWS)
        found.backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, expected, **GRADIENTS)
    assert len(built) == SECTIONS


def test_generation_compiles_the_prefill_alone() -> None:
    model = install_pruning(tiny_llava(layers=7), two_stages())
    case = make_case(model, ["t3 i16 t4", "t5 i12"], "left")
    how: dict[str, Any] = {**case.inputs(), "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(**how)
    install_pruning(model, two_stages(), CompiledLayers(BACKEND, inference=True))
    found = model.generate(**how)
    assert graphs() == SECTIONS
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, **STATES)
        torch.testing.assert_close(ours.values, theirs.values, **STATES)


def test_without_gradients_nothing_is_compiled_unless_asked_for() -> None:
    model = install_pruning(tiny_llava(layers=7), two_stages(), CompiledLayers(BACKEND))
    with torch.no_grad():
        model(**make_case(model, ROWS).inputs())
    assert graphs() == 0


def test_nothing_is_left_on_the_model() -> None:
    model, stock = tiny_llava(layers=7), tiny_llava(layers=7)
    case = make_case(model, ROWS)
    with torch.no_grad():
        expected = stock(**case.inputs()).logits
        install_pruning(model, two_stages(), CompiledLayers(BACKEND, inference=True))
        pruned = model(**case.inputs()).logits
        assert list(model.state_dict()) == list(stock.state_dict())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(**case.inputs()).logits, pruned, **STATES)
        compiled = graphs()
        assert torch.equal(remove_pruning(model)(**case.inputs()).logits, expected)
    assert graphs() == compiled


def test_cpu_attention_in_blocks_needs_no_code_of_its_own_for_each_layer() -> None:
    model = build_model(find_size("tiny"))
    batch = make_batch(model, Workload(batch=1, image_tokens=200, text_before=5, text_after=12))
    given: dict[str, Any] = {"input_ids": batch.input_ids, **batch.images()}
    plan = PruningSchedule((PruningStage(1, "uniform", 0.9),))  # 217 and 197 tokens: two blocks of query rows
    with torch.no_grad():
        expected = install_pruning(model, plan)(**given).logits
        found = install_pruning(model, plan, CompiledLayers(BACKEND, inference=True))(**given).logits
    torch.testing.assert_close(found, expected, **STATES)
    assert graphs() == 2


def test_benchmarked_by_name() -> None:
    method, plain = find_method("himap+compile", 4), find_method("himap", 4)
    assert (method.schedule, method.measures) == (plain.schedule, ("training_step", "prefill"))
    for name in ("hf-trainer+compile", "masking+compile", "himap+compile+compile"):
        with pytest.raises(ValueError, match="is unknown"):
            find_method(name, 4)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    require_compiler("cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler.*on the PATH.*--model.compile false"):
        require_compiler("cpu")
    with pytest.raises(ValueError, match="needs a C compiler"):
        require_compiler("cuda")
    run = ["--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        FinetuneCLI([*run, "--model.compile", "true"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "against"),
    [
        ("--trainer.strategy", "deepspeed_stage_2", "trainer.strategy deepspeed_stage_2"),
        ("--model.quantize", "4bit", "model.quantize=4bit"),
        ("--pruning.learnable.budget", "0.5", "pruning.learnable"),
    ],
)
def test_what_does_not_go_with_it(option: str, value: str, against: str, tmp_path: Any) -> None:
    run = ["--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu", "--model.compile", "true"]
    with pytest.raises(ValueError, match=f"model.compile does not go with {against}"):
        FinetuneCLI([*run, option, value])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_inductor(checkpointing: bool) -> None:
    require_compiler("cpu")
    model = trained(checkpointing)
    install_pruning(model, two_stages())
    expected = step(model, ROWS)
    install_pruning(model, two_stages(), CompiledLayers())
    found = step(model, ROWS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # 1e-5 in fp32 against fp64, of compiled and of plain code alike
        assert (found[name] - value).abs().max() < 1e-4 * value.abs().max(), name
    assert graphs() == SECTIONS
