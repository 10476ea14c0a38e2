"""Two processes give the numbers of one: DDP, ZeRO 1, 2 and 3; resuming in another split; what a checkpoint holds.

All scenarios of the default run share one pair of processes, the slow ones another. The reference is one process with
the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_examples import eleven_records
from distributed import HAS_DEEPSPEED, run_scenarios
from distributed_worker import train
from training_toys import save_tiny
from transformers import LlavaForConditionalGeneration

FP32 = {"rtol": 1e-4, "atol": 2e-5}
DENSE = {"schedule": "dense", "checkpointing": True}
MIXED = {"checkpointing": True, "accumulate": 1, "data": None, "epochs": 1}
MASS = {"schedule": "mass", "epochs": 1}
OTHER_SPLIT = {"batch_size": 1, "accumulate": 4}
SCENARIOS: dict[str, dict[str, Any]] = {
    **{name: {"strategy": name} for name in ("ddp", "zero1", "zero2", "zero3")},
    "ddp-dense": {"strategy": "ddp", **DENSE},
    "zero3-mixed": {"strategy": "zero3", **MIXED},
    "zero3-mass": {"strategy": "zero3", **MASS},
    **{f"{name}-learned": {"strategy": name, "schedule": "learned"} for name in ("ddp", "zero3")},
    "zero3-cached": {"strategy": "zero3", "cached": True, **OTHER_SPLIT},
    # the rest of a run of one split in another
    "ddp-to-zero3": {"strategy": "zero3", "resume": "ddp", **OTHER_SPLIT},
    "zero3-to-zero2": {"strategy": "zero2", "resume": "zero3", **OTHER_SPLIT},
}
SLOW: dict[str, dict[str, Any]] = {
    "zero3_offload": {"strategy": "zero3_offload"},
    **{f"{name}-dense": {"strategy": name, **DENSE} for name in ("zero2", "zero3")},
    **{f"{name}-mixed": {"strategy": name, **MIXED} for name in ("ddp", "zero2")},
    **{f"{name}-mass": {"strategy": name, **MASS} for name in ("ddp", "zero2")},
    "zero2-learned": {"strategy": "zero2", "schedule": "learned"},
    "ddp-cached": {"strategy": "ddp", "cached": True, **OTHER_SPLIT},
    "zero2-to-ddp": {"strategy": "ddp", "resume": "zero2", **OTHER_SPLIT},
    "one-to-zero3": {"strategy": "zero3", "resume": "one"},
    **{f"{name}-bf16": {"strategy": name, "precision": "bf16-mixed"} for name in ("ddp", "zero2", "zero3")},
}


def can_run(scenario: dict[str, Any]) -> bool:
    """Whether DeepSpeed is installed or a scenario, and the run that it resumes, does without."""
    uses = scenario["strategy"] + scenario.get("resume", "")
    return HAS_DEEPSPEED or "zero" not in uses


def some(*names: str) -> list[Any]:
    """Scenarios to run a test for; the slow ones marked."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


STRATEGIES = some("ddp", "zero1", "zero2", "zero3", "zero3_offload")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA and eleven records, three of them text alone."""
    folder = tmp_path_factory.mktemp("distributed")
    eleven_records(folder)
    save_tiny(folder / "tiny", layers=4, seed=1)
    return folder


def common(work: Path) -> dict[str, Any]:
    return {"model": str(work / "tiny"), "data": str(work / "data.json")}


@pytest.fixture(scope="module")
def alone(work: Path) -> dict[str, dict[str, Any]]:
    """One process, in this one: batches of four where each of two takes two."""
    return {
        "pruned": train(work, name="one", strategy="auto", devices=1, batch_size=4, **common(work)),
        "dense": train(
            work, name="one-dense", strategy="auto", devices=1, batch_size=4, schedule="dense", **common(work)
        ),
        "mass": train(work, name="one-mass", strategy="auto", devices=1, batch_size=4, **MASS, **common(work)),
        "learned": train(
            work, name="one-learned", strategy="auto", devices=1, batch_size=4, schedule="learned", **common(work)
        ),
        "mixed": train(work, name="one-mixed", strategy="auto", devices=1, model=str(work / "tiny"), **MIXED),
    }


def run_pair(work: Path, scenarios: dict[str, dict[str, Any]], seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Two processes without a compiler to be found, and with a lock that a killed build has left behind.

    Without DeepSpeed the scenarios that need it are left out.
    """
    lock = work / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    given = [{"name": name, **common(work), **own} for name, own in scenarios.items() if can_run(own)]
    for scenario in given:
        if "resume" in scenario:
            scenario["resume"] = str(work / scenario["resume"] / "first.ckpt")
    found = run_scenarios(work, given, seconds, PATH=work / "no-programs", TORCH_EXTENSIONS_DIR=work / "extensions")
    assert [file for file in (work / "extensions").rglob("*") if file.is_file()] == [lock]  # nothing was compiled
    return found


@pytest.fixture(scope="module")
def pair(work: Path, alone: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The scenarios of the default run."""
    return run_pair(work, SCENARIOS, 400)


@pytest.fixture(scope="module")
def slow_pair(work: Path, pair: Any) -> dict[str, list[dict[str, Any]]]:
    """The others."""
    return run_pair(work, SLOW, 500)


Ranks = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """What both processes found in a scenario; skips the test where that needs DeepSpeed and there is none."""

    def found(name: str) -> list[dict[str, Any]]:
        if not can_run((SCENARIOS | SLOW)[name]):
            pytest.skip("DeepSpeed is not installed")
        return request.getfixturevalue("slow_pair" if name in SLOW else "pair")[name]

    return found


def compare(found: dict[str, Any], expected: dict[str, Any], steps: slice = slice(None)) -> None:
    """Losses, gradient norms, weights, validation before and after."""
    assert len(found["losses"]) == len(expected["losses"][steps]) > 0
    for key in ("losses", "norms"):
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(expected[key][steps]), rtol=2e-4, atol=1e-5)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, **FP32, msg=lambda text, name=name: f"{name} {text}")
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)
    assert found["val_loss_after"] == pytest.approx(expected["val_loss"], rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_give_the_numbers_of_one(ranks: Ranks, alone: Any, strategy: str) -> None:
    """With accumulation, clipping, weight decay, a short last window and a repeated record."""
    compare(ranks(strategy)[0], alone["pruned"])
    assert len(alone["pruned"]["losses"]) == 4  # two epochs of a full window and a short one


@pytest.mark.parametrize("name", some("zero3-cached", "ddp-cached"))
def test_cached_image_features(work: Path, ranks: Ranks, alone: Any, name: str) -> None:
    """Ranks share the images; in batches of one row one of them may have text where the other has an image."""
    compare(ranks(name)[0], alone["pruned"])
    assert len(list((work / f"{name}-features").rglob("*.safetensors"))) == 3


@pytest.mark.parametrize("name", some("ddp-dense", "zero2-dense", "zero3-dense"))
def test_dense_with_gradient_checkpointing(ranks: Ranks, alone: Any, name: str) -> None:
    compare(ranks(name)[0], alone["dense"])


@pytest.mark.parametrize("name", some("ddp-mixed", "zero2-mixed", "zero3-mixed"))
def test_one_process_sees_images_and_the_other_text(ranks: Ranks, alone: Any, name: str) -> None:
    compare(ranks(name)[0], alone["mixed"])


@pytest.mark.parametrize("strategy", some("ddp-learned", "zero2-learned", "zero3-learned"))
def test_every_rank_learns_the_keep_ratios_of_one_process(ranks: Ranks, alone: Any, strategy: str) -> None:
    """Some windows of one rank hold text alone; the ratios are the same everywhere and end in the same schedule."""
    first, second = ranks(strategy)
    compare(first, alone["learned"])
    assert first["schedule"] == second["schedule"] and first["schedule"]["stages"]
    for own, one in zip(first["schedule"]["stages"], alone["learned"]["schedule"]["stages"], strict=True):
        assert own == {**one, "keep_ratio": pytest.approx(one["keep_ratio"], abs=1e-3)}


@pytest.mark.parametrize("name", some("ddp-mass", "zero2-mass", "zero3-mass"))
def test_processes_may_keep_numbers_of_their_own(ranks: Ranks, alone: Any, name: str) -> None:
    compare(ranks(name)[0], alone["mass"])
    first, second = (rank["kept_while_training"] for rank in ranks(name))
    assert any(a and b and a != b for a, b in zip(first, second, strict=True))
    assert alone["mass"]["losses"] != alone["pruned"]["losses"][:2]


@pytest.mark.slow
def test_bf16_mixed_is_that_of_ddp(ranks: Ranks) -> None:
    """Autocast over frozen weights in bfloat16; trained weights, gradients and moments in fp32."""
    compare(ranks("zero2-bf16")[0], ranks("ddp-bf16")[0])
    assert ranks("ddp-bf16")[0]["losses"] != pytest.approx(ranks("ddp")[0]["losses"], rel=1e-4)  # it was bfloat16


@pytest.mark.slow
def test_bf16_mixed_under_zero_3_is_that_of_ddp_to_rounding(ranks: Ranks) -> None:
    """Not to fp32's: DeepSpeed's linear function adds the bias to what is already rounded to bfloat16.

    AdamW moves a weight by its whole rate where the gradient's sign is a matter of rounding, so weights are compared
    as one vector: they must be much closer to those of DDP than those of fp32 are. (Under a fifth of the distance
    while attention's backward pass on the CPU had fp32 weights, 0.23 since it keeps them in bfloat16.)
    """
    found, expected, fp32 = (ranks(name)[0] for name in ("zero3-bf16", "ddp-bf16", "ddp"))
    half = torch.finfo(torch.bfloat16).eps
    assert found["losses"] == pytest.approx(expected["losses"], rel=half)
    assert found["norms"] == pytest.approx(expected["norms"], rel=4 * half)
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-5)  # the bias is still a bfloat16 number

    def flat(facts: dict[str, Any]) -> torch.Tensor:
        return torch.cat([facts["weights"][name].flatten() for name in expected["weights"]])

    assert (flat(found) - flat(expected)).norm() < 0.3 * (flat(fp32) - flat(expected)).norm()
    assert flat(found).dtype == torch.float32


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_after_fit_is_pruned(ranks: Ranks, strategy: str) -> None:
    """Lightning strips every hook from the modules before it evaluates under DeepSpeed."""
    for rank in ranks(strategy):
        assert rank["kept"] and rank["val_loss_after"] == rank["val_loss"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("when", ["answers", "later_answers"])
def test_one_process_answers_longer_than_the_other(ranks: Ranks, alone: Any, strategy: str, when: str) -> None:
    """After training and after `fit`, in one token and in three: all run modules for as long as the longest needs."""
    found = [answer for rank in ranks(strategy) for answer in rank[when]]
    assert found == alone["pruned"][when] == alone["pruned"]["answers"]
    assert [len(answer) for answer in found] == [1, 3]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_loss_counts_no_record_twice(ranks: Ranks, alone: Any, strategy: str) -> None:
    """Eleven records in batches of 3 on two processes: one is repeated. The reference has batches of 3 too."""
    both = {rank["val_loss"] for rank in ranks(strategy)}
    assert len(both) == 1 and both.pop() == pytest.approx(alone["pruned"]["val_loss"], rel=1e-4)


@pytest.mark.parametrize("strategy", some("zero3", "zero3_offload"))
def test_no_process_holds_the_whole_model(ranks: Ranks, strategy: str) -> None:
    for rank in ranks(strategy):
        assert 0.49 < rank["resident"] / rank["all"] < 0.52
    assert ranks("zero2")[0]["resident"] == ranks("zero2")[0]["all"]


def test_torch_is_itself_again_after_training(pair: dict[str, list[dict[str, Any]]]) -> None:
    """ZeRO-3 replaces torch's linear function while it trains."""
    assert all(rank["torch_linear"] for found in pair.values() for rank in found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_record_is_trained_once_an_epoch(ranks: Ranks, strategy: str) -> None:
    seen = [name for rank in ranks(strategy) for batch in rank["samples"][:3] for name in batch]
    assert sorted(map(int, seen)) == list(range(11))


@pytest.mark.parametrize("route", some("ddp-to-zero3", "zero3-to-zero2", "zero2-to-ddp", "one-to-zero3"))
def test_resumed_in_another_split(ranks: Ranks, alone: Any, route: str) -> None:
    """Another strategy, batch size and accumulation, or number of processes: the same records in the same steps."""
    compare(ranks(route)[0], alone["pruned"], steps=slice(1, None))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_in_one_process(work: Path, ranks: Ranks, alone: Any, strategy: str) -> None:
    """A checkpoint of any strategy, without DeepSpeed; the optimizer's state too."""
    assert ranks(strategy)
    resume = str(work / strategy / "first.ckpt")
    options = {"strategy": "auto", "devices": 1, "batch_size": 4, "resume": resume, **common(work)}
    compare(train(work, name=f"{strategy}-to-one", **options), alone["pruned"], steps=slice(1, None))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_of_all_strategies_are_alike(work: Path, ranks: Ranks, strategy: str) -> None:
    """Plain tensors, what is trained only, AdamW's state as torch has it."""
    assert ranks(strategy)
    one, found = (torch.load(work / name / "last.ckpt", weights_only=True) for name in ("one", strategy))
    assert found["state_dict"].keys() == one["state_dict"].keys()
    state, expected = found["optimizer_states"][0], one["optimizer_states"][0]
    assert [group["params"] for group in state["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    assert state["param_groups"][0].keys() == expected["param_groups"][0].keys()
    for index, moments in expected["state"].items():
        assert state["state"][index]["step"] == moments["step"] == 4
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state["state"][index][key], moments[key], rtol=2e-3, atol=1e-6, msg=key)
    sizes = [(work / name / "last.ckpt").stat().st_size for name in (strategy, "one")]
    assert sizes[0] < 1.1 * sizes[1]


def test_what_zero_3_loaded_is_the_file(work: Path, ranks: Ranks) -> None:
    """Each frozen weight, gathered, against what stock transformers read in one process."""
    file = LlavaForConditionalGeneration.from_pretrained(work / "tiny").state_dict()
    loaded = ranks("zero3")[0]["frozen"]
    assert loaded.keys() == file.keys() - {name for name in file if "position_ids" in name}
    assert all(torch.equal(value, file[name]) for name, value in loaded.items())
