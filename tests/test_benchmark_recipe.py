"""recipes/benchmark.py through its command line, at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_cli import run_recipe

from himap_train.benchmark.bench import Bench
from himap_train.benchmark.contenders import METHODS

SHAPE = ("--size", "tiny", "--rounds", "1", "--image_tokens", "48", "--text_before", "4", "--text_after", "8")
KV_TOKEN = 2 * 64 * 4  # keys and values, width, bytes


def run(folder: Path, *options: object) -> dict[str, Any]:
    assert run_recipe("benchmark", *SHAPE, "--output", folder, *options) == 0
    return json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))


def test_every_method_in_training_and_prefill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path / "out", "--batch", 2, "--measures", "[training_step,prefill]")
    rows = {(row["measure"], row["method"]): row for row in found["rows"]}
    expected = {("training_step", name) for name in METHODS[1:]} | {
        ("prefill", name) for name in METHODS if name not in ("dense", "learning")
    }
    assert set(rows) == expected and len(rows) == len(found["rows"])

    himap = rows["prefill", "himap"]  # 48 -> 24 at layer 1 -> 6 at layer 2
    assert himap["kv"] == 2 * KV_TOKEN * (60 + 36 + 18 + 18) and himap["dense_kv"] == 2 * KV_TOKEN * 60 * 4
    assert rows["prefill", "masking"]["kv"] == himap["dense_kv"]
    assert himap["ratio"]["median"] == pytest.approx(himap["seconds"]["median"] / himap["dense_seconds"]["median"])
    assert himap["choosing"]["low"] <= himap["choosing"]["median"] <= himap["choosing"]["high"] < 1
    assert rows["prefill", "first-k"]["choosing"] is rows["training_step", "himap"]["choosing"] is None
    assert himap["efficiency"] == pytest.approx(himap["bound"] / himap["ratio"]["median"])
    step = rows["training_step", "himap"]
    assert step["peak"] < step["dense_peak"]
    assert rows["training_step", "fastv"]["peak"] < rows["training_step", "fastv-attention-maps"]["peak"]
    assert step["tokens_per_second"] == pytest.approx(2 * 60 / step["seconds"]["median"])

    assert found["environment"]["versions"]["torch"] and found["settings"]["image_tokens"] == 48
    text = (tmp_path / "out" / "benchmark.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "## training step" in text and "| fastv-attention-maps |" in text


def test_decoding_a_token_and_generating(tmp_path: Path) -> None:
    found = run(tmp_path, "--methods", "[himap,masking]", "--measures", "[decode,generate]")
    decode, generate = found["rows"]  # masking has no cache to decode with
    assert (decode["method"], generate["method"]) == ("himap", "himap")
    assert decode["bound"] < 1 and generate["bound"] is None and generate["efficiency"] is None
    assert decode["tokens_per_second"] == pytest.approx(1 / decode["seconds"]["median"])
    assert generate["tokens_per_second"] == pytest.approx(64 / generate["seconds"]["median"])


def test_series_have_every_value(tmp_path: Path) -> None:
    options = ("--methods", "[]", "--series", "[image_tokens]", "--series_values", "[16,48,96]")
    options += ("--series_measures", "[training_step,prefill]")
    found = run(tmp_path, *options, "--series_methods", "[himap,vtw]", "--gradient_checkpointing", "true")
    points = found["series"]["image_tokens"]
    assert [point["value"] for point in points] == [16] * 4 + [48] * 4 + [96] * 4 and not found["rows"]
    assert all(point["workload"]["image_tokens"] == point["value"] for point in points)
    assert "## Along image tokens" in (tmp_path / "benchmark.md").read_text(encoding="utf-8")


def test_a_whole_model_runs_its_tower(tmp_path: Path) -> None:
    options = ("--methods", "[himap]", "--measures", "[prefill,training_step]", "--image_tokens", 576)
    whole = run(tmp_path / "whole", *options, "--whole_model", "true", "--dtype", "bfloat16")
    alone = run(tmp_path / "alone", *options)
    for measured, bare in zip(whole["rows"], alone["rows"], strict=True):
        assert bare["bound"] < measured["bound"] < 1  # the tower is not pruned
        assert measured["flops"][0] > bare["flops"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "[himpa]"), "did you mean 'himap'"),
        (("--measures", "[prefil]"), "did you mean 'prefill'"),
        (("--series", "[dept]"), "did you mean 'depth'"),
        (("--size", "laptp"), "did you mean 'laptop'"),
        (("--text_after", "1"), "cannot be run"),
        (("--series", "[dynamic_resolution]", "--series_methods", "[masking]"), "peers know no padding"),
        (("--job", "true"), "images of a job have 576 tokens, not image_tokens=48"),
        (
            ("--job", "true", "--image_tokens", "576", "--batch", "3"),
            "32 records are no two or more whole batches of 3",
        ),
        (("--job", "true", "--image_tokens", "576", "--job_methods", "[trl]", "--peer_python", "false"), "has no TRL"),
        (("--whole_model", "true"), "no multiple of 576"),
        (("--whole_model", "true", "--image_tokens", "576", "--series", "[image_tokens]"), "=144 is no multiple of"),
        (("--job", "true", "--series", "[batch]"), "give one of them"),
        (("--job", "true", "--image_tokens", "576", "--job_methods", "[]"), "--job_methods is empty"),
        (("--job", "true", "--image_tokens", "576", "--job_methods", "[masking]"), "masking: timed in steps alone"),
        (("--job", "true", "--image_tokens", "576", "--job_methods", "[stock,learning]"), "stock, learning: timed in"),
        (("--job_records", "3"), "--job_records without --job true"),
        (("--job_methods", "[dense]"), "--job_methods without --job true"),
        (("--job", "true", "--measures", "[prefill]"), "--measures beside --job true"),
        (("--series_methods", "[vtw]"), "--series_methods without --series"),
        (("--series", "[batch,depth]", "--series_values", "[1]"), "--series_values are those of one series"),
        (("--series_values", "[1]"), "--series_values are those of one series"),
        (("--rounds", "0"), "--rounds is 0"),
        (("--methods", "[dense]"), "nothing to measure: --methods ['dense'] are held against dense"),
        (("--device", "nothing"), "device 'nothing' cannot be used here"),
        (("--attention", "flash_attention_2", "--methods", "[himap]"), "attention 'flash_attention_2': "),
        (("--series", "[text_tokens]", "--series_values", "[3]"), "cannot be run"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_recipe("benchmark", *SHAPE, "--output", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "benchmark.json").exists()


def test_a_row_without_memory_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Bench.row

    def full(self: Bench, measure: str, method: str, **more: Any) -> Any:
        if method == "masking":
            raise torch.OutOfMemoryError("no room")
        return row(self, measure, method, **more)

    monkeypatch.setattr(Bench, "row", full)
    given = ("--methods", "[masking,himap]", "--measures", "[prefill]")
    assert run_recipe("benchmark", *SHAPE, "--output", tmp_path, *given) == 0
    assert [found["method"] for found in json.loads((tmp_path / "benchmark.json").read_text())["rows"]] == ["himap"]
    assert "Out of memory: prefill, masking." in (tmp_path / "benchmark.md").read_text()


def test_results_are_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "benchmark.json").write_text("{}", encoding="utf-8")
    assert run_recipe("benchmark", *SHAPE, "--output", tmp_path) == 2
    assert "already holds results" in capsys.readouterr().err


def test_a_job_is_the_same_with_ours_and_with_trainer(tmp_path: Path) -> None:
    options = ("--job", "true", "--image_tokens", "576", "--batch", "2", "--job_records", "4", "--job_epochs", "1")
    assert run_recipe("benchmark", *SHAPE, *options, "--job_methods", "[dense,hf-trainer]", "--output", tmp_path) == 0
    text = (tmp_path / "job.md").read_text(encoding="utf-8")
    assert "prune nothing have the same first loss" in text and "x hf-trainer" in text
    jobs = json.loads((tmp_path / "job.json").read_text(encoding="utf-8"))["jobs"]
    (ours,), (theirs,) = jobs["dense"], jobs["hf-trainer"]
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], abs=1e-4) and ours["trained"] == theirs["trained"]
    assert len(ours["losses"]) == len(theirs["losses"]) == 2
    for run, seen in ((ours, "caching"), (theirs, "tower")):  # our tower ran before the steps
        parts = {"loading", seen, "decoder forward", "decoder backward", "lm_head", "optimizer", "saving"}
        assert all(run["seconds"][part] > 0 for part in parts)
    assert "tower" not in ours["seconds"] and not list(tmp_path.glob("tmp*"))
