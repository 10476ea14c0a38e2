"""What earlier versions saved keeps loading and computes the same; tests/data/checkpoint_*/make.py made the folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from himap_train import Count, Mass, PruningSchedule, PruningStage, Ratio
from himap_train.checkpoints.export import export_merged
from himap_train.checkpoints.load import load_checkpoint
from himap_train.models.install import record_pruning
from himap_train.pruning.methods import ByImage, ImageDebiased, Instruction, LastToken, Random, Uniform
from himap_train.pruning.reading import read_schedule

pytestmark = pytest.mark.core

DATA = Path(__file__).parent / "data"
OLD = sorted(folder.name for folder in DATA.glob("checkpoint_*"))


def test_all_are_here_and_small() -> None:
    assert OLD == ["checkpoint_v0_1"]
    assert sum(file.stat().st_size for file in DATA.glob("checkpoint_*/**/*") if file.is_file()) < 500_000


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("version", OLD)
@torch.no_grad()
def test_old_checkpoint_computes_its_stored_logits(version: str, form: str) -> None:
    expected = load_file(DATA / version / "expected.safetensors")
    inputs = {key: expected[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    base = str(DATA / version / "base") if form == "adapter" else None
    # merged weights were rounded to fp16
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if form == "adapter" else {"atol": 2e-2, "rtol": 1e-2}
    model, _ = load_checkpoint(DATA / version / form, base=base, dtype="float32")
    with record_pruning(model) as trace:
        torch.testing.assert_close(model(**inputs).logits, expected["pruned"], **tolerance)
    for row, columns in enumerate(trace.kept[-1]):
        assert torch.equal(columns, expected[f"kept.{row}"])
    dense, _ = load_checkpoint(DATA / version / form, None, base=base, dtype="float32")
    torch.testing.assert_close(dense(**inputs).logits, expected["dense"], **tolerance)
    assert not torch.allclose(expected["dense"], expected["pruned"], atol=0.1)


@pytest.mark.parametrize("version", OLD)
def test_old_adapter_still_merges_into_the_same_weights(version: str, tmp_path: Path) -> None:
    adapter = shutil.copytree(DATA / version / "adapter", tmp_path / "adapter")
    folder = export_merged(adapter, tmp_path / "merged", base=str(DATA / version / "base"))
    found = load_file(folder / "model.safetensors")
    before = load_file(DATA / version / "merged/model.safetensors")
    assert found.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=2**-10)  # sums may round the other way elsewhere


OLD_SCHEDULE = """stages:
- layer: 1
  criterion: image_debiased
  keep_count: 400
- layer: 2
  criterion: instruction
  keep_ratio: 0.5
- layer: 4
  criterion: last_token
  keep:
    mass: 0.9
    at_least: 0.1
    at_most: 0.45
- layer: 8
  criterion: image
  keep:
    mass: 0.5
    at_most: 0.4
- layer: 12
  criterion: random
  keep_ratio: 0.125
- layer: 20
  criterion: uniform
  keep_ratio: 0
positions: renumber
"""
"""As 0.1 wrote a schedule with each of its criteria and ways to say how many stay."""


def test_old_schedule_file_is_read_and_written_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "pruning.yaml").write_text(OLD_SCHEDULE)
    schedule = read_schedule(tmp_path / "pruning.yaml")
    assert schedule == PruningSchedule(
        (
            PruningStage(1, ImageDebiased(), keep=Count(400)),
            PruningStage(2, Instruction(), keep=Ratio(0.5)),
            PruningStage(4, LastToken(), keep=Mass(0.9, at_least=0.1, at_most=0.45)),
            PruningStage(8, ByImage(), keep=Mass(0.5, at_most=0.4)),
            PruningStage(12, Random(), keep=Ratio(0.125)),
            PruningStage(20, Uniform(), keep=Ratio(0)),
        ),
        positions="renumber",
    )
    assert yaml.safe_dump(schedule.to_dict(), sort_keys=False) == OLD_SCHEDULE
