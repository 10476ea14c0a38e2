"""Two processes give the numbers of one: DDP, ZeRO 1, 2 and 3; resuming in another split; what a checkpoint holds.

All scenarios of the default run share one pair of processes. The reference is one process with the whole batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_examples import image_folder, llava_record
from distributed import run_scenarios
from distributed_worker import train
from training_toys import save_tiny
from transformers import LlavaForConditionalGeneration

NAMES = ("a.png", "b.png", "c.png")
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
FP32 = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA and eleven records, three of them text alone: no batch size divides them."""
    folder = tmp_path_factory.mktemp("distributed")
    image_folder(folder, NAMES)
    records = [
        llava_record(
            str(i), NAMES[i % 3] if i % 4 else None, ("<image>\n" if i % 4 else "") + "What?", "x" * (i * 7 % 30 + 1)
        )
        for i in range(11)
    ]
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    save_tiny(folder / "tiny")
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
        "mixed": train(work, name="one-mixed", strategy="auto", devices=1, accumulate=1, model=str(work / "tiny")),
    }


@pytest.fixture(scope="module")
def pair(work: Path, alone: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Two processes under every strategy; checkpointed where it is not pruned, so both are seen with both."""
    scenarios: list[dict[str, Any]] = []
    for name in STRATEGIES:
        scenarios.append({"name": name, "strategy": name, **common(work)})
    for name in ("ddp", "zero2", "zero3"):
        dense = {"schedule": "dense", "checkpointing": True}
        scenarios.append({"name": f"{name}-dense", "strategy": name, **dense, **common(work)})
        mixed = {"checkpointing": True, "accumulate": 1, "model": str(work / "tiny")}
        scenarios.append({"name": f"{name}-mixed", "strategy": name, **mixed})
    # the rest of a run of one split in another
    for first, second in (("ddp", "zero3"), ("zero2", "ddp"), ("zero3", "zero2")):
        resumed = {"resume": str(work / first / "first.ckpt"), "batch_size": 1, "accumulate": 4}
        scenarios.append({"name": f"{first}-to-{second}", "strategy": second, **resumed, **common(work)})
    one = {"resume": str(work / "one" / "first.ckpt"), **common(work)}
    scenarios.append({"name": "one-to-zero3", "strategy": "zero3", **one})
    return run_scenarios(work, scenarios, seconds=400)


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
def test_two_processes_give_the_numbers_of_one(pair: Any, alone: Any, strategy: str) -> None:
    """With accumulation, clipping, weight decay, a short last window and a repeated record."""
    compare(pair[strategy][0], alone["pruned"])
    assert len(alone["pruned"]["losses"]) == 4  # two epochs of a full window and a short one


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_dense_with_gradient_checkpointing(pair: Any, alone: Any, strategy: str) -> None:
    compare(pair[f"{strategy}-dense"][0], alone["dense"])


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_one_process_sees_images_and_the_other_text(pair: Any, alone: Any, strategy: str) -> None:
    ranks = pair[f"{strategy}-mixed"]
    compare(ranks[0], alone["mixed"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_after_fit_is_pruned(pair: Any, strategy: str) -> None:
    """Lightning strips every hook from the modules before it evaluates under DeepSpeed."""
    for rank in pair[strategy]:
        assert rank["kept"] and rank["val_loss_after"] == rank["val_loss"]


def test_validation_loss_counts_no_record_twice(alone: Any, pair: Any) -> None:
    """Eleven records in batches of 3 on two processes: one is repeated. The reference has batches of 3 too."""
    for strategy in STRATEGIES:
        both = {rank["val_loss"] for rank in pair[strategy]}
        assert len(both) == 1 and both.pop() == pytest.approx(alone["pruned"]["val_loss"], rel=1e-4)


@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload"])
def test_no_process_holds_the_whole_model(pair: Any, strategy: str) -> None:
    for rank in pair[strategy]:
        assert 0.49 < rank["resident"] / rank["all"] < 0.52
    assert pair["zero2"][0]["resident"] == pair["zero2"][0]["all"]


def test_every_record_is_trained_once_an_epoch(pair: Any) -> None:
    for strategy in STRATEGIES:
        seen = [name for rank in pair[strategy] for batch in rank["samples"][:3] for name in batch]
        assert sorted(map(int, seen)) == list(range(11))


@pytest.mark.parametrize("route", ["ddp-to-zero3", "zero2-to-ddp", "zero3-to-zero2", "one-to-zero3"])
def test_resumed_in_another_split(pair: Any, alone: Any, route: str) -> None:
    """Another strategy, batch size and accumulation, or number of processes: the same records in the same steps."""
    compare(pair[route][0], alone["pruned"], steps=slice(1, None))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_in_one_process(work: Path, pair: Any, alone: Any, strategy: str) -> None:
    """A checkpoint of any strategy, without DeepSpeed; the optimizer's state too."""
    resume = str(work / strategy / "first.ckpt")
    options = {"strategy": "auto", "devices": 1, "batch_size": 4, "resume": resume, **common(work)}
    compare(train(work, name=f"{strategy}-to-one", **options), alone["pruned"], steps=slice(1, None))


def test_checkpoints_of_all_strategies_are_alike(work: Path, pair: Any) -> None:
    """Plain tensors, what is trained only, AdamW's state as torch has it."""
    saved = {name: torch.load(work / name / "last.ckpt", weights_only=True) for name in ("one", *STRATEGIES)}
    one = saved.pop("one")
    for name, checkpoint in saved.items():
        assert checkpoint["state_dict"].keys() == one["state_dict"].keys(), name
        state, expected = checkpoint["optimizer_states"][0], one["optimizer_states"][0]
        assert [group["params"] for group in state["param_groups"]] == [g["params"] for g in expected["param_groups"]]
        assert state["param_groups"][0].keys() == expected["param_groups"][0].keys()
        for index, moments in expected["state"].items():
            assert state["state"][index]["step"] == moments["step"] == 4
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(state["state"][index][key], moments[key], rtol=2e-3, atol=1e-6, msg=key)
        size = (work / name / "last.ckpt").stat().st_size
        assert size < 1.1 * (work / "one" / "last.ckpt").stat().st_size


def test_what_zero_3_loaded_is_the_file(work: Path, pair: Any) -> None:
    """Each frozen weight, gathered, against what stock transformers read in one process."""
    file = LlavaForConditionalGeneration.from_pretrained(work / "tiny").state_dict()
    loaded = pair["zero3"][0]["frozen"]
    assert loaded.keys() == file.keys() - {name for name in file if "position_ids" in name}
    assert all(torch.equal(value, file[name]) for name, value in loaded.items())
