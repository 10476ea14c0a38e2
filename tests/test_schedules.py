"""Presets, their scaling, and what a bad schedule is told."""

from __future__ import annotations

from typing import Any

import pytest
from cost_toys import LLAVA_7B
from tiny import tiny_llava

from himap_train import PruningSchedule, PruningStage, install_pruning
from himap_train.pruning.reading import fit_preset

PRESETS = {
    "none": [],
    "himap": [(2, "instruction", 0.5), (8, "image", 0.125)],
    "himap-generation": [(2, "instruction", 0.5), (15, "image", 0.125)],
    "fastv": [(2, "last_token", 0.5)],
    "vtw": [(15, None, 0.0)],
    "pyramiddrop": [(8, "last_token", 0.5), (16, "last_token", 0.25), (24, "last_token", 0.125)],
    "random": [(2, "random", 0.5), (8, "random", 0.125)],
    "uniform": [(2, "uniform", 0.5), (8, "uniform", 0.125)],
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_the_papers(name: str) -> None:
    schedule = PruningSchedule.from_preset(name)
    found = [(s.layer, None if s.keep_ratio == 0 else s.criterion, s.keep_ratio) for s in schedule.stages]
    assert found == PRESETS[name]
    assert schedule.positions == ("renumber" if name == "pyramiddrop" else "keep")
    assert PruningSchedule.from_dict(schedule.to_dict()) == schedule
    schedule.validate_for(32)


@pytest.mark.parametrize("layers, says", [(4, True), (8, True), (9, False), (24, False), (32, False)])
def test_shallow_decoders_are_told_what_a_scaled_preset_means(
    layers: int, says: bool, recwarn: pytest.WarningsRecorder
) -> None:
    for name in ("himap", "uniform"):  # uniform reads nothing that could be missing
        fit_preset(PruningSchedule.from_preset(name), layers)
    texts = [str(warning.message) for warning in recwarn]
    assert len(texts) == says and all("layers 1, 2" in text or layers != 8 for text in texts)
    assert all("search_schedule.py" in text for text in texts)


@pytest.mark.parametrize("layers", [8, 12, 24, 40])
@pytest.mark.parametrize("name", ["hidrop", "window-fastv", "coverage", "dart", "sparsevlm"])
def test_newer_presets_fit_another_depth(name: str, layers: int) -> None:
    schedule = PruningSchedule.from_preset(name).scaled_to(layers)
    schedule.validate_for(layers)
    assert (schedule.enter > 0) == (name == "hidrop")


def test_stages_that_find_no_layer_become_the_last_of_them() -> None:
    """Four filters of HiDrop have one layer of four between the entry and the exit."""
    schedule = PruningSchedule.from_preset("hidrop").scaled_to(4)
    assert schedule.enter == 1
    assert [(stage.layer, stage.keep_ratio) for stage in schedule.stages] == [(2, 0.0017), (3, 0.0)]


@pytest.mark.parametrize("layers", [4, 6, 8, 12, 24, 40])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_another_depth(name: str, layers: int) -> None:
    schedule = PruningSchedule.from_preset(name)
    scaled = schedule.scaled_to(layers)
    scaled.validate_for(layers)
    assert [(s.criterion, s.keep_ratio) for s in scaled.stages] == [
        (s.criterion, s.keep_ratio) for s in schedule.stages
    ]
    assert scaled.positions == schedule.positions
    assert schedule.scaled_to(32) == schedule


@pytest.mark.parametrize("layers", [2, 8, 28, 40])
def test_every_layer_has_a_place_at_another_depth(layers: int) -> None:
    for layer in range(32):
        scaled = PruningSchedule((PruningStage(layer, "uniform", 0.5),)).scaled_to(layers)
        assert scaled.stages[0].layer < layers
    late = PruningSchedule((PruningStage(31, "last_token", 0.5),), enter=30).scaled_to(layers)
    assert late.enter < late.stages[0].layer < layers


@pytest.mark.parametrize(("name", "first", "average"), [("hidrop", 215, 64), ("hidrop-48", 87, 48)])
def test_hidrop_has_the_published_counts(name: str, first: int, average: int) -> None:
    """EIT-NLP/HiDrop: absent in layers 1 to 8 (counted from 1), filters behind 10, 14, 16, 18, exit before 25."""
    schedule = PruningSchedule.from_preset(name)
    per_layer = schedule.cost(LLAVA_7B).image_tokens_per_layer
    behind = [first] * 4 + [10] * 2 + [5] * 2 + [1] * 6
    assert per_layer == (0,) * 8 + (576,) * 2 + tuple(behind) + (0,) * 8
    assert sum(per_layer) / 32 == average
    assert PruningSchedule.from_dict(schedule.to_dict()) == schedule
    assert {stage.criterion for stage in schedule.stages} == {"last_token"}


def test_sparsevlm_has_the_released_counts() -> None:
    """300, 200, 110 behind layers 2, 6, 15: what is called 192 tokens is 203 on average over the layers."""
    per_layer = PruningSchedule.from_preset("sparsevlm").cost(LLAVA_7B).image_tokens_per_layer
    assert per_layer == (576,) * 3 + (300,) * 4 + (200,) * 9 + (110,) * 16
    assert round(sum(per_layer) / 32) == 203


def test_hidrop_has_the_published_flops() -> None:
    """3.82 -> 0.42 TFLOPs of image tokens alone, a gated MLP and multiply-adds, as its table counts them."""
    per_layer = PruningSchedule.from_preset("hidrop").cost(LLAVA_7B).image_tokens_per_layer
    width, mlp = 4096, 11008

    def flops(n: int) -> int:
        return 4 * n * width**2 + 2 * n**2 * width + 3 * n * width * mlp

    assert round(32 * flops(576) / 1e12, 2) == 3.82
    assert round(sum(map(flops, per_layer)) / 1e12, 2) == 0.42


def build(layers: int = 6, **fields: Any) -> None:
    PruningSchedule.from_dict(fields).validate_for(layers)


def stage(layer: Any = 2, criterion: Any = "instruction", **size: Any) -> dict[str, Any]:
    return {"layer": layer, "criterion": criterion, **(size or {"keep_ratio": 0.5})}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": [stage(layer=0)]}, "layer.*0|0.*layer"),
        ({"stages": [stage(layer=-1)]}, "layer.*-1|-1.*layer"),
        ({"stages": [stage(layer=6)]}, "6"),
        ({"stages": [stage(layer=4), stage(layer=2, keep_ratio=0.25)]}, "2.*4|4.*2"),
        ({"stages": [stage(layer=2), stage(layer=2, keep_ratio=0.25)]}, "2"),
        ({"stages": [stage(layer=2, keep_ratio=0.25), stage(layer=4, keep_ratio=0.5)]}, "0.5"),
        ({"stages": [stage(layer=2, keep_count=5), stage(layer=4, keep_count=9)]}, "9"),
        ({"stages": [stage(keep_ratio=1.5)]}, "1.5"),
        ({"stages": [stage(keep_ratio=-0.1)]}, "-0.1"),
        ({"stages": [stage(keep_ratio=float("nan"))]}, "nan"),
        ({"stages": [stage(keep_count=-3)]}, "-3"),
        ({"stages": [stage(keep_ratio=0.5, keep_count=3)]}, "keep_ratio.*keep_count|keep_count.*keep_ratio"),
        ({"stages": [{"layer": 2, "criterion": "image"}]}, "keep_ratio.*keep_count|keep_count.*keep_ratio"),
        ({"stages": [stage(criterion="attention")]}, "attention.*instruction|instruction.*attention"),
        ({"stages": [stage(), {"layer": 3, "criterion": "image", "keep_rato": 0.2}]}, "keep_rato.*keep_ratio"),
        ({"stages": [stage()], "position": "keep"}, "position.*positions"),
        ({"stages": [stage()], "positions": "drop"}, "drop.*renumber|renumber.*drop"),
    ],
)
def test_a_bad_schedule_says_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        build(**fields)


def test_an_unknown_preset_names_those_that_exist() -> None:
    with pytest.raises(ValueError) as error:
        PruningSchedule.from_preset("himapp")
    assert "himapp" in str(error.value) and all(name in str(error.value) for name in PRESETS)


def test_a_schedule_too_deep_is_refused_when_it_is_installed() -> None:
    with pytest.raises(ValueError, match="(?s)8.*6|6.*8"):
        install_pruning(tiny_llava(layers=6), PruningSchedule.from_preset("himap"))
