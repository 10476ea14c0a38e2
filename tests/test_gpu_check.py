"""recipes/gpu_check.py on the CPU, over small models: its rows, what it says where something is missing, its status."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_cli import run_recipe
from tiny import tiny_llava
from tiny_qwen import config_of

from himap_train.benchmark import gpu_checks, gpu_runs, sizes
from himap_train.benchmark.gpu_checks import Check, equalities, full_size, run_checks
from himap_train.benchmark.gpu_runs import runs

TINY = replace(sizes.SIZES["tiny"], layers=2, vocabulary=512)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with a config.json alone."""
    folder = tmp_path_factory.mktemp("models")
    qwen = config_of("qwen2_5_vl", layers=4)
    qwen.vision_config.update({"patch_size": 32, "window_size": 128})  # 80 tokens a photograph
    for name, config in (("llava", tiny_llava(layers=4).config), ("qwen", qwen)):
        config.text_config.initializer_range = 0.02  # as published ones have it
        config.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("llava", "qwen")}


class Runs:
    """In the place of the command line: losses that a run logs, or an error's line in its log."""

    def __init__(self, *found: list[float] | str) -> None:
        self.found, self.options = list(found), []

    def __call__(self, jobs: Mapping[Path, Sequence[str]], workers: int) -> None:
        ((folder, options),) = jobs.items()
        self.options.append(list(options))
        found = self.found.pop(0)
        if isinstance(found, str):
            folder.with_name(f"{folder.name}.log").write_text(f"Traceback\n{found}\n", encoding="utf-8")
            raise RuntimeError(f"the run {folder} failed with status 2")
        (folder / "logs/version_0").mkdir(parents=True)
        with (folder / "logs/version_0/metrics.csv").open("w", encoding="utf-8") as file:
            names = ["step", "train/loss", "tokens/s", "s/step", "memory GiB", "lr"]
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerow({"step": 0, "lr": 1})
            rates = {"tokens/s": 10, "s/step": 0.5, "memory GiB": 1}
            writer.writerows({"step": step, "train/loss": x, **rates} for step, x in enumerate(found))


def rows_of(check: Any) -> dict[str, Check]:
    return {row.what: row for _, row in run_checks({"": check})}


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_kernels_are_held_to_one_another(models: dict[str, str], name: str) -> None:
    rows = rows_of(partial(equalities, models[name], CPU, "eager", 3))
    assert len(rows) == 5 and all(row.holds for row in rows.values()), rows
    assert rows["eager: kept tokens"].found == "the same"


def test_a_kernel_that_is_not_installed_is_a_row(models: dict[str, str]) -> None:
    if find_spec("flash_attn"):
        pytest.skip("FlashAttention is installed")
    rows = rows_of(partial(equalities, models["llava"], CPU, "flash_attention_2", 3))
    assert "FlashAttention2" in rows["not run"].found and rows["not run"].holds is None
    assert [row.holds for row in rows.values()] == [True, True, None]


def test_other_kernels_numbers_and_choices_fail(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    install, installed = gpu_checks.install_pruning, []

    def one_stage_the_second_time(model: Any, schedule: Any, **how: Any) -> Any:
        installed.append(schedule)
        return install(model, replace(schedule, stages=schedule.stages[len(installed) - 1 :]), **how)

    monkeypatch.setattr(gpu_checks, "install_pruning", one_stage_the_second_time)
    rows = rows_of(partial(equalities, models["llava"], CPU, "eager", 3))
    failing = [row.what for row in rows.values() if row.holds is False]
    assert failing == ["eager: kept tokens", "eager: states", "eager: gradients"]


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_steps_memory_and_generate(models: dict[str, str], name: str) -> None:
    rows = rows_of(partial(full_size, models[name], CPU, 2, 1, new_tokens=3))
    held = [what for what, row in rows.items() if row.holds]
    assert held == ["clock of the device / wall clock", "generate: logits", "generate: cache"], rows
    ratio = rows["training step, pruned / dense"]
    assert float(ratio.found) > 0 and 0 < float(ratio.expected.split()[0]) < 1
    assert {f"{what}, {side}" for what in ("peak memory", "generate") for side in ("dense", "pruned")} <= set(rows)
    assert "by plan.py" in rows["peak memory, dense"].expected


def test_a_plan_that_does_not_fit_is_a_row(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "RESERVE", 2**51)
    (row,) = rows_of(partial(full_size, models["llava"], CPU, 2, 1)).values()
    assert (row.what, row.holds) == ("not run", None) and "by the plan, the GPU has" in row.found


def test_memory_that_the_plan_promised_and_that_is_not_there_fails(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(gpu_checks, "time_pairs", full)
    (row,) = rows_of(partial(full_size, models["llava"], CPU, 2, 1)).values()
    assert row.holds is False and row.found.startswith("CUDA out of memory") and "by the plan" in row.expected


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Runs of a tiny model whose command line is `Runs`."""

    def check(found: Runs, settings: dict[str, list[str]]) -> dict[str, Check]:
        monkeypatch.setattr(gpu_runs, "fine_tune_all", found)
        return rows_of(partial(runs, TINY, tmp_path, "cpu", 3, settings))

    return check


def test_losses_of_strategies_are_compared(short: Any) -> None:
    found = Runs([2.0, 1.0], [2.01, 1.0], [2.0, 1.5])
    rows = short(found, {"a": ["--x", "1"], "b": [], "c": []})
    assert [row.holds for row in rows.values()] == [None, None, True, None, False]
    assert rows["a"].found == "10 tokens/s, 0.5 s/step, 1 memory GiB"
    assert found.options[0][-2:] == ["--x", "1"] and "--trainer.max_steps" in found.options[0]


def test_losses_without_the_first_run_to_be_held_against_fail(short: Any) -> None:
    rows = short(Runs("torch.OutOfMemoryError: CUDA", [2.0, 1.0]), {"a": [], "b": []})
    assert rows["b: losses"].holds is False and rows["b: losses"].found == "not compared: a did not run"


@pytest.mark.parametrize(("losses", "falls"), [([2.0, 1.9], True), ([2.0, 2.1], False), ([2.0, float("nan")], False)])
def test_the_loss_over_4_bits_must_fall(short: Any, losses: list[float], falls: bool) -> None:
    rows = short(Runs(losses), {"QLoRA step": ["--model.quantize", "4bit"]})
    assert rows["QLoRA step: loss"].holds is falls


@pytest.mark.parametrize(
    ("said", "row"),
    [
        ("error: 4bit needs bitsandbytes: pip install x", Check("a: not run", "error: 4bit needs bitsandbytes: pip")),
        ("error: data.batch_size is 0", Check("a: broken", "error: data.batch_size is 0", holds=False)),
        ("torch.OutOfMemoryError: CUDA", Check("a: not run", "torch.OutOfMemoryError: CUDA")),
        ("KeyError", Check("a: broken", "KeyError", holds=False)),
    ],
)
def test_a_run_that_ends_early_says_why(short: Any, said: str, row: Check, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = short(Runs(said), {"a": []}).values()
    assert (found.what, found.holds) == (row.what, row.holds) and found.found.startswith(row.found)
    assert said in capsys.readouterr().err  # the log goes with its folder


@pytest.mark.parametrize("holds", [True, False])
def test_the_recipe_prints_a_table_and_its_status(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], holds: bool
) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)
    monkeypatch.setattr(gpu_runs, "fine_tune_all", Runs("error: no bitsandbytes: pip install it"))
    monkeypatch.setattr(gpu_checks, "full_size", lambda *_: [Check("a | b", "1", "2", holds)])
    given = ["--models", f"[{models['llava']}]", "--device", "cpu", "--kernel", "eager", "--size", "tiny"]
    with pytest.raises(SystemExit) if not holds else nullcontext(SystemExit(1)) as stop:
        assert run_recipe("gpu_check", *given) == 0
    assert getattr(stop, "value", stop).code == 1
    out = capsys.readouterr().out
    assert "| llava, 4 layers | eager: kept tokens | the same | those of sdpa | holds |" in out
    assert "| tiny, 4 layers | QLoRA step: not run | error: no bitsandbytes: pip install it |  |  |" in out
    assert f"| llava | a \\| b | 1 | 2 | {'holds' if holds else 'FAILS'} |" in out
    assert "\ngpu: None\n" in out and out.count("FAILS") == (not holds)


def test_without_such_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert run_recipe("gpu_check", "--devices", 2) == 2
    assert "1 CUDA GPUs are here, and --devices is 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")
def test_zero_in_two_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)
    given = ["--device", "cpu", "--devices", 2, "--size", "tiny", "--batch", 1, "--steps", 2]
    assert run_recipe("gpu_check", *given) == 0
    out = capsys.readouterr().out
    assert "ZeRO-2 |" in out and "tokens/s" in out and "| ZeRO-3: losses |" in out
