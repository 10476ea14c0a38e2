"""Schedules that keep by attention mass: fields and errors, what they cost, and who works with them or refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cost_toys import LLAVA_7B
from evaluation_toys import QUIET, Source, conversation
from export_toys import trained
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from planning_toys import planned
from tiny import tiny_llava, tiny_processor
from training_toys import ToyData, quiet_trainer, save_tiny, tuner

from himap_train import AttentionMass, PruningSchedule, PruningStage, install_pruning, load_checkpoint, record_pruning
from himap_train.benchmark.contenders import find_method
from himap_train.checkpoints.agreement import Outputs, _nearly_the_same, check_agreement
from himap_train.checkpoints.card import model_card
from himap_train.checkpoints.export import export_merged
from himap_train.checkpoints.load import save_adapter
from himap_train.checkpoints.run_facts import RunFacts
from himap_train.evaluation.compare import compare
from himap_train.evaluation.evaluate import evaluate
from himap_train.evaluation.tables import markdown_table, save_table
from himap_train.models.install import pruning_of
from himap_train.pruning.cost import schedule_cost
from himap_train.pruning.reading import read_schedule
from himap_train.training.callbacks.progress import Throughput

FIELDS = {
    "stages": [
        {"layer": 2, "criterion": "instruction", "keep": {"mass": 0.9, "at_least": 0.1, "at_most": 0.8}},
        {"layer": 8, "criterion": "image", "keep": {"mass": 0.5}},
        {"layer": 12, "criterion": "stride", "keep_ratio": 0.0},
    ],
    "positions": "keep",
}
MASS = PruningSchedule(
    (
        PruningStage(2, "instruction", keep=AttentionMass(0.9, at_least=0.1, at_most=0.8)),
        PruningStage(8, "image", keep=AttentionMass(0.5)),
        PruningStage(12, "stride", 0.0),
    )
)
TINY = PruningSchedule((PruningStage(2, "instruction", keep=AttentionMass(0.7)), PruningStage(4, "image", 0.125)))


def test_dict_form_and_yaml_are_lossless(tmp_path: Path) -> None:
    assert PruningSchedule.from_dict(FIELDS) == MASS and MASS.to_dict() == FIELDS
    (tmp_path / "pruning.yaml").write_text(yaml.safe_dump(MASS.to_dict()))
    assert read_schedule(tmp_path / "pruning.yaml") == MASS
    assert [stage.layer for stage in MASS.scaled_to(8).stages] == [1, 2, 3]
    assert MASS.scaled_to(8).stages[0].keep == MASS.stages[0].keep
    assert MASS.by_sample and not PruningSchedule.from_preset("himap").by_sample


def stage(layer: int = 2, criterion: str = "instruction", **size: Any) -> dict[str, Any]:
    return {"layer": layer, "criterion": criterion, **size}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([stage(keep={"mass": 0})], "mass is 0;"),
        ([stage(keep={"mass": 1.1})], "mass is 1.1"),
        ([stage(keep={"mass": float("nan")})], "mass is nan"),
        ([stage(keep={"mass": "0.9"})], "mass is '0.9'; expected a number"),
        ([stage(keep={"mass": True})], "mass is True; expected a number"),
        ([stage(keep={"mass": 0.9, "at_least": -0.1})], "at_least is -0.1"),
        ([stage(keep={"mass": 0.9, "at_most": 0})], "at_most is 0;"),
        ([stage(keep={"mass": 0.9, "at_most": 1.5})], "at_most is 1.5"),
        ([stage(keep={"mass": 0.9, "at_least": 0.6, "at_most": 0.5})], "at_least=0.6 .*at_most=0.5.*upside down"),
        ([stage(keep={"mas": 0.9})], r"stages\[0\].keep has the unknown key 'mas'; did you mean 'mass'"),
        ([stage(keep={"at_most": 0.9})], r"stages\[0\].keep has no 'mass'"),
        ([stage(keep=0.9)], r"stages\[0\].keep is 0.9; expected a mapping such as {mass: 0.9}"),
        ([stage(kep={"mass": 0.9})], "'kep'; did you mean 'keep'"),
        ([stage(keep={"mass": 0.9}, keep_ratio=0.5)], "keep_ratio=0.5.*exactly one"),
        ([stage(keep={"mass": 0.9}, keep_count=5)], "keep_count=5.*exactly one"),
        ([stage(criterion="random", keep={"mass": 0.9})], "'random' at layer 2 reads no attention"),
        ([stage(criterion="stride", keep={"mass": 0.9})], "'stride' at layer 2 reads no attention"),
        ([stage(keep={"mass": 0.9, "at_most": 0.5}), stage(3, keep={"mass": 0.9, "at_most": 0.6})], "0.6.*0.5"),
        ([stage(keep={"mass": 0.9, "at_most": 0.5}), stage(3, keep_ratio=0.6)], "0.6.*0.5"),
        ([stage(keep_ratio=0.5), stage(3, keep={"mass": 0.9, "at_most": 0.6})], "0.6.*0.5"),
        ([stage(keep_ratio=0.5), stage(3, keep={"mass": 0.9, "at_least": 0.6})], "0.6.*0.5"),
    ],
)
def test_a_bad_stage_says_what_is_wrong(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        PruningSchedule.from_dict({"stages": stages})


def test_python_is_told_to_give_an_object() -> None:
    with pytest.raises(ValueError, match=r"expected Ratio\(0.5\), Count\(72\) or Mass\(0.9\)"):
        PruningStage(2, "instruction", keep={"mass": 0.9})  # type: ignore[arg-type]


def test_bounds_that_bind_nothing_may_follow_any_stage() -> None:
    stages = [stage(keep_ratio=0.5), stage(3, keep={"mass": 0.9}), stage(4, keep={"mass": 0.9, "at_least": 0.4})]
    assert len(PruningSchedule.from_dict({"stages": stages}).stages) == 3


def test_cost_is_that_of_at_most_or_of_what_was_kept() -> None:
    def with_ratios(*ratios: float) -> PruningSchedule:
        stages = zip(MASS.stages, ratios, strict=True)
        return PruningSchedule(tuple(replace(one, keep=None, keep_ratio=ratio) for one, ratio in stages))

    bound, same = MASS.cost(LLAVA_7B), with_ratios(0.8, 0.8, 0.0).cost(LLAVA_7B)
    assert bound.upper_bound and not same.upper_bound
    assert (bound.flops, bound.kv_bytes) == (same.flops, same.kv_bytes)
    assert bound.image_tokens_per_layer == same.image_tokens_per_layer
    assert schedule_cost(MASS, LLAVA_7B, kept=(288, 72, 0)) == with_ratios(0.5, 0.125, 0.0).cost(LLAVA_7B)


def test_a_budget_cannot_be_set_and_the_benchmark_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer 2 keeps by attention mass.*give keep_ratio"):
        MASS.at_budget(LLAVA_7B, 0.5)
    (tmp_path / "mass.yaml").write_text(yaml.safe_dump(FIELDS))
    with pytest.raises(ValueError, match="random weights.*give keep_ratio"):
        find_method(str(tmp_path / "mass.yaml"), 32)


def test_a_plan_and_a_card_give_upper_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model.path", "embedded", "--model.schedule", json.dumps({"stages": FIELDS["stages"][:1]}))
    assert planned(tmp_path, *options)["sides"][1]["image_tokens"] == [144, 115]
    assert "upper bounds" in " ".join(capsys.readouterr().out.split())
    card = model_card("a/b", TINY, tiny_llava().config, RunFacts({}))
    assert "pruned, at most" in card and "hold the share m of the attention" in card and "mass: 0.7" in card
    assert "at most" not in model_card("a/b", PruningSchedule((TINY.stages[1],)), tiny_llava().config, RunFacts({}))


@pytest.fixture(scope="module")
def photos() -> Source:
    """Questions about one image each, and one without."""
    records = [conversation(i, "what is it? " * (1 + i % 2)) for i in range(5)]
    return Source([*records, conversation(9, "hello", images=0)])


def test_an_evaluation_reports_mean_and_spread(photos: Source, tmp_path: Path) -> None:
    model, processor = tiny_llava(), tiny_processor()
    rows = compare(model, processor, photos, {"dense": None, "mass": TINY}, batch_size=4, **QUIET)
    install_pruning(model, TINY)
    counts, ratios, paper = [], [], []
    for record in photos:
        with record_pruning(model) as trace:
            alone = evaluate(model, processor, Source([record]), **QUIET)
        image, text = round(alone.image_tokens), round(alone.text_tokens)
        counts.append([len(stage[0]) - text for stage in trace.kept])
        layers = [image] * 2 + [counts[-1][0]] * 2 + [counts[-1][1]] * 2
        fixed = PruningSchedule(
            tuple(replace(s, keep=None, keep_count=k) for s, k in zip(TINY.stages, counts[-1], strict=True))
        )
        cost = fixed.cost(model.config, image, text)
        assert list(cost.image_tokens_per_layer) == layers
        if image:  # text alone has nothing to save
            ratios.append(cost.flops_ratio)
            paper.append(cost.image_only_flops_ratio)
    first = [kept[0] for kept in counts]
    assert len(set(first)) > 2
    found = rows[1].result
    assert found.kept == pytest.approx([_mean(c) for c in zip(*counts, strict=True)])
    assert found.kept_sd == pytest.approx([_sd(c) for c in zip(*counts, strict=True)])
    assert (found.flops_ratio.mean, found.flops_ratio.sd) == pytest.approx((_mean(ratios), _sd(ratios)))
    assert found.image_only_flops_ratio.mean == pytest.approx(_mean(paper))
    assert (
        rows[0].result.kept_sd == () and rows[0].result.flops_ratio.mean == 1.0 and rows[0].result.flops_ratio.sd == 0
    )
    assert found.flops_ratio.mean < rows[1].cost.flops_ratio and rows[1].cost.upper_bound
    dense, mass = markdown_table(rows).splitlines()[2:4]
    assert (
        f"-> {_mean(first):.1f} ± {_sd(first):.1f} ->" in mass
        and f"| {_mean(ratios):.3f} ± {_sd(ratios):.3f} |" in mass
    )
    assert "-> " not in dense and "| 1.000 | 1.000 |" in dense
    save_table(rows, tmp_path)
    saved = json.loads((tmp_path / "metrics.json").read_text())["rows"][1]
    assert saved["flops_ratio"] == {"mean": found.flops_ratio.mean, "sd": found.flops_ratio.sd}
    assert saved["kept_sd"] == list(found.kept_sd) and saved["cost"]["upper_bound"] is True
    card = model_card("a/b", TINY, model.config, RunFacts({}, rows=[saved]))
    assert f"{found.flops_ratio.mean:.3f} ± {found.flops_ratio.sd:.3f}" in card


def test_training_logs_what_each_stage_keeps(tmp_path: Path) -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.rows: list[list[int]] = []
            self.logged: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.rows.append(pruning_of(pl_module.peft_model).last.kept)
            self.logged.append({key: float(value) for key, value in trainer.logged_metrics.items() if "kept_" in key})

    seen = Seen()
    model = tuner(save_tiny(tmp_path / "tiny"), schedule=TINY.to_dict())
    options = {"max_steps": 4, "log_every_n_steps": 2, "logger": CSVLogger(tmp_path)}
    quiet_trainer(tmp_path, callbacks=[Throughput(), seen], **options).fit(model, datamodule=ToyData())
    assert len(seen.rows) == 4 and any(kept[0] != seen.rows[0][0] for kept in seen.rows)
    for last in (1, 3):  # two batches of two samples each since the last time
        means = [(a + b) / 4 for a, b in zip(seen.rows[last - 1], seen.rows[last], strict=True)]
        assert list(seen.logged[last].values()) == pytest.approx(means)


def test_an_adapter_and_a_merged_model_carry_the_schedule(tmp_path: Path) -> None:
    tuned = trained(save_tiny(tmp_path / "base"), schedule=TINY)
    adapter = save_adapter(tuned, tmp_path / "adapter", TINY, tiny_processor())
    assert pruning_of(load_checkpoint(adapter)[0]).schedule == TINY
    export_merged(adapter, tmp_path / "merged")
    assert pruning_of(load_checkpoint(tmp_path / "merged")[0]).schedule == TINY
    assert check_agreement(adapter, tmp_path / "merged").same_kept


def test_an_export_may_keep_one_token_more_where_the_mass_is_nearly_reached() -> None:
    """Merged weights are rounded anew."""
    logits = torch.zeros(1, 40, 8)
    kept = [list(range(20))], [list(range(21))], [list(range(30))]
    by_mass = [Outputs("float32", logits, logits, [stage], by_mass=True) for stage in kept]
    assert _nearly_the_same(by_mass[0], by_mass[1]) and not _nearly_the_same(by_mass[0], by_mass[2])
    fixed = [replace(one, by_mass=False) for one in by_mass]
    assert not _nearly_the_same(fixed[0], fixed[1]) and not _nearly_the_same(fixed[0], by_mass[1])


def _mean(values: Any) -> float:
    return sum(values) / len(values)


def _sd(values: Any) -> float:
    return (sum((value - _mean(values)) ** 2 for value in values) / len(values)) ** 0.5
