"""Many runs: each once, an interrupted one goes on, a failed one is named with its log."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from himap_train import experiments


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been run; a run whose options say so fails."""
    found: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        found.append(command)
        return subprocess.CompletedProcess(command, 2 if "--fail" in command else 0)

    monkeypatch.setattr(experiments.subprocess, "run", run)
    return found


def test_what_is_there_is_not_run_again(tmp_path: Path, calls: list[list[str]]) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "metrics.json").write_text(json.dumps({"rows": [{"name": "dense"}]}))
    (tmp_path / "begun-0.25-1").mkdir()
    (tmp_path / "begun-0.25-1" / "config.yaml").touch()
    (tmp_path / "done" / "report.html").touch()
    # Rows are written as they are measured, so they do not tell that a run is at its end.
    (tmp_path / "begun-0.25-1" / "metrics.json").write_text(json.dumps({"rows": [{"name": "dense"}]}))
    jobs = {tmp_path / name: ["--config", "x.yaml"] for name in ("done", "begun-0.25-1", "new")}
    experiments.fine_tune_all(jobs, workers=1)
    assert [command[command.index("--output") + 1] for command in calls] == [
        str(tmp_path / "begun-0.25-1"),
        str(tmp_path / "new"),
    ]
    assert calls[0][-2:] == ["--resume", "auto"] and "--resume" not in calls[1]
    assert (tmp_path / "begun-0.25-1.log").exists() and experiments.rows_of(tmp_path / "done") == [{"name": "dense"}]


def test_a_failed_run_is_named_and_the_others_are_run(tmp_path: Path, calls: list[list[str]]) -> None:
    jobs = {tmp_path / "bad": ["--fail"], tmp_path / "good": []}
    with pytest.raises(RuntimeError, match="bad failed with status 2; see .*bad.log"):
        experiments.fine_tune_all(jobs, workers=1)
    assert len(calls) == 2


def test_a_run_with_other_options_is_not_taken_for_this_one(tmp_path: Path, calls: list[list[str]]) -> None:
    experiments.fine_tune_all({tmp_path / "run": ["--data.test", "validation"]}, workers=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").touch()
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"rows": [{"name": "dense"}]}))
    experiments.fine_tune_all({tmp_path / "run": ["--data.test", "validation"]}, workers=1)
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="run is a run with other options .*run.options.json.: give another"):
        experiments.fine_tune_all({tmp_path / "run": ["--data.test", "test"]}, workers=1)
    with pytest.raises(ValueError, match="run has no row 'pruned at 0.2', but dense: give another --output"):
        experiments.row_of(tmp_path / "run", "pruned at 0.2")
