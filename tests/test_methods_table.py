"""The table of methods: what it chooses, that a second start measures nothing again, and the oracle's mark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recipes_cli import recipe_module

from himap_train import record_pruning
from himap_train.analysis.oracle import Oracle, oracle_accuracy
from himap_train.data.sources import open_source
from himap_train.models.install import install_pruning, pruning_of
from himap_train.models.loading import load_llava
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage


def test_a_second_start_measures_nothing_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = recipe_module("methods_table")
    settings = {"kinds": ["fine-"], "split": "validation", "budgets": [0.2, 0.4], "scenes": 12, "seeds": [0, 1]}
    table.main(methods=["uniform", "random", "instruction"], output=tmp_path, **settings)
    first = capsys.readouterr().out
    assert "| instruction | " in first and "| oracle | " in first and first.count(" ± ") == 2
    file = tmp_path / "fine-validation/measured.json"
    found = json.loads(file.read_text())
    of = "embedded-fine, 12 scenes: "
    tried = [key for key in found if key.startswith(f"{of}choosing")]  # at 0.2 there is only layer 1
    assert len(tried) >= 2 and all(key.startswith(f"{of}choosing instruction at ") for key in tried)
    file.write_text(json.dumps(found | {f"{of}dense": [1.0, 12.5]}))
    table.main(methods=["uniform", "random", "instruction"], output=tmp_path, **settings)
    assert capsys.readouterr().out == first.replace(first[first.index("dense:") :], "dense: 12.5\n\n")
    assert (tmp_path / "fine-validation/budgets.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="fine scenes need 256 image tokens, not those of embedded"):
        table.main(methods=["uniform"], output=tmp_path, model="embedded", **settings)
    table.main(methods=["uniform"], output=tmp_path, **{**settings, "scenes": 8})  # other scenes are measured anew
    assert "dense: 12.5" not in capsys.readouterr().out


def test_the_oracle_keeps_what_the_question_is_about() -> None:
    model, processor = load_llava("embedded-fine")
    source = open_source("embedded:fine-validation?scenes=12&seed=4")
    asked = [source[0], source[3]]
    patches = tuple(tuple(map(int, one.meta.get("patches", "").split())) for one in asked)
    install_pruning(model, PruningSchedule((PruningStage(0, Oracle(patches), keep_count=20),)))
    images = processor.image_processor([one.images[0] for one in asked], return_tensors="pt")["pixel_values"]
    ids = torch.cat([torch.full((2, 256), model.config.image_token_id), torch.full((2, 4), 70)], dim=1)
    with torch.no_grad(), record_pruning(model) as trace:
        model(input_ids=ids, pixel_values=images)
    for row, named in enumerate(patches):
        kept = trace.kept[0][row].tolist()
        assert set(named) <= set(kept) and len([k for k in kept if k < 256]) == 20
    assert oracle_accuracy(model, processor, source, 0.05) >= 0.7 and pruning_of(model) is None
