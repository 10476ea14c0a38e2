"""Runs that train a ranking: what they save, load, export and go on from, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import NEEDS_DEEPSPEED, run_scenarios
from distributed_worker import train
from pruning_runs import config, error_of, logged
from safetensors.torch import load_file, save_file
from training_toys import collate, finetune, sample
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, load_checkpoint, record_pruning
from himap_train.checkpoints.export import export_adapter, export_merged
from himap_train.checkpoints.ranking import RANKING_FILE
from himap_train.models.foresight import untrained
from himap_train.models.installed import scorers_of
from himap_train.models.stock import text_decoder
from himap_train.pruning.learned.scorer import Lesson
from himap_train.training.callbacks import learn_ranking

BY = {"name": "learned", "width": 16, "spread": 0.25}
STAGES = [{"layer": 0, "criterion": BY, "keep_ratio": 0.5}, {"layer": 3, "criterion": BY, "keep_ratio": 0.25}]
LEARN = {"learning_rate": 0.01, "remembered": 1, "updates": 30}


@pytest.fixture(scope="module")
def run(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps; its folder."""
    folder = tmp_path_factory.mktemp("ranked")
    settings = {"learn_ranking": LEARN}
    assert finetune("--config", config(tiny_path, folder, settings, model={"schedule": {"stages": STAGES}})) == 0
    return folder / "run"


def kept(model: torch.nn.Module) -> list[list[list[int]]]:
    """Columns that stay of eight rows, at each stage."""
    batch = collate([sample(number) for number in range(8)])
    with torch.no_grad(), record_pruning(model) as trace:
        model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"], **batch["images"])
    return [[row.tolist() for row in stage] for stage in trace.kept]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = scorers_of(text_decoder(model)).items()
    return {f"{layer}.{name}": tensor for layer, scorer in found for name, tensor in scorer.state_dict().items()}


def test_a_run_learns_and_what_it_saves_ranks_alike_in_every_form(run: Path, tiny_path: str, tmp_path: Path) -> None:
    losses = logged(run, "train/ranking_loss")
    # Of each step's own lesson after all updates; above 1 before them, and the last step's rate is next to nothing.
    assert len(losses) == 6 and max(losses[:-1]) < 0.5
    model, _ = load_checkpoint(run)
    expected, learned = kept(model), weights(model)
    assert {name.split(".")[0] for name in learned} == {"0", "3"}
    assert [len(row) for row in expected[0]] == [18] * 8 and [len(row) for row in expected[1]] == [14] * 8
    alone = Path(shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "alone.ckpt"))
    merged = export_merged(run, tmp_path / "merged")
    forms = (alone, export_adapter(alone, tmp_path / "adapter"), merged, export_merged(merged, tmp_path / "again"))
    for form in forms:
        other, _ = load_checkpoint(form)
        found = weights(other)
        assert found.keys() == learned.keys() and all(torch.equal(found[name], learned[name]) for name in learned)
        assert kept(other) == expected, form
    # untrained scorers would keep others, and stock loading sees nothing of them
    stock, facts = LlavaForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not any(facts[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(stock.state_dict()) == set(LlavaForConditionalGeneration.from_pretrained(tiny_path).state_dict())
    assert [file.name for file in merged.glob("*.safetensors")] == ["model.safetensors"]


def test_a_learned_criterion_needs_no_settings(tiny_path: str, tmp_path: Path) -> None:
    model = {"schedule": {"stages": STAGES[:1]}}
    assert finetune("--config", config(tiny_path, tmp_path, {}, model=model), "--trainer.max_steps", "2") == 0
    assert len(logged(tmp_path / "run", "train/ranking_loss")) == 2


def test_every_micro_batch_is_learned_from_whatever_comes_between(
    tiny_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches a step, of which the last two steps' are remembered; answers are generated in between."""
    learned: list[Lesson] = []
    loss = learn_ranking.ranking_loss

    def watched(scores: torch.Tensor, lesson: Lesson) -> Any:
        learned.append(lesson)
        return loss(scores, lesson)

    monkeypatch.setattr(learn_ranking, "ranking_loss", watched)
    model, ranking = {"schedule": {"stages": STAGES[:1]}}, {"learn_ranking": {"remembered": 4, "updates": 2}}
    file = config(tiny_path, tmp_path, ranking, model=model, evaluation={"during": 2, "after": False})
    options = (
        "--trainer.accumulate_grad_batches",
        "2",
        "--trainer.max_epochs",
        "2",
        "--data.validation",
        "embedded:validation",
    )
    assert finetune("--config", file, *options, "--trainer.val_check_interval", "2") == 0
    distinct = {id(lesson): lesson for lesson in learned}  # they are all held, so no two have the same
    assert len(learned) == 12 and len(distinct) == 12


def test_a_run_that_goes_on_from_an_adapter_ranks_as_it_did(run: Path, tiny_path: str, tmp_path: Path) -> None:
    still = {"learn_ranking": {**LEARN, "learning_rate": 1e-12}}
    model = {"schedule": {"stages": STAGES[1:]}, "init_adapter": str(run)}
    assert finetune("--config", config(tiny_path, tmp_path, still, model=model), "--trainer.max_steps", "1") == 0
    before, after = weights(load_checkpoint(run)[0]), weights(load_checkpoint(tmp_path / "run")[0])
    assert {name.split(".")[0] for name in after} == {"3"}
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in after)


def test_what_was_learned_is_put_aside_for_a_while(run: Path) -> None:
    model, _ = load_checkpoint(run)
    learned, ranks = weights(model), kept(model)
    schedule = PruningSchedule.from_dict({"stages": STAGES})
    with untrained(model, schedule):
        assert any(not torch.equal(tensor, learned[name]) for name, tensor in weights(model).items())
        assert kept(model) != ranks
    assert kept(model) == ranks


def test_another_schedule_ranks_by_what_was_learned(run: Path) -> None:
    model, _ = load_checkpoint(run)
    first = kept(model)[0]
    only = PruningSchedule.from_dict({"stages": STAGES[:1]})
    other, _ = load_checkpoint(run, schedule=only)
    assert kept(other) == [first]


def test_a_ranking_that_is_gone_or_of_another_shape(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    (folder / RANKING_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="has no himap/ranking.safetensors, by which its schedule ranks"):
        load_checkpoint(folder)
    with pytest.raises(FileNotFoundError, match="has no himap/ranking.safetensors"):
        export_merged(folder, tmp_path / "merged")
    for schedule in (None, {"stages": [{"layer": 0, "criterion": "divprune", "keep_ratio": 0.5}]}, "vtw"):
        load_checkpoint(folder, schedule=schedule)
    held = load_file(run / "adapter" / RANKING_FILE)
    save_file({name: tensor[..., :-1].contiguous() for name, tensor in held.items()}, folder / RANKING_FILE)
    with pytest.raises(ValueError, match="has another ranking than its schedule and its model ask for"):
        load_checkpoint(folder)


def test_resumed_runs_go_on_with_what_was_learned(run: Path, tmp_path: Path) -> None:
    """Two more steps of a run that was at its end, from its weights and moments."""
    again = Path(shutil.copytree(run, tmp_path / "again"))
    before = weights(load_checkpoint(again)[0])
    options = ("--config", str(run / "config.yaml"), "--output", str(again), "--trainer.max_steps", "8")
    assert finetune(*options, "--trainer.max_epochs", "2", "--resume") == 0
    after = weights(load_checkpoint(again)[0])
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved < 0.1


@pytest.mark.parametrize(
    ("schedule", "pruning", "message"),
    [
        ("himap", {"learn_ranking": {}}, "whose criterion is learned, and there is none"),
        ({"stages": STAGES}, {"learn_ranking": {"updates": 0}}, "learn_ranking.updates is 0"),
        ({"stages": STAGES}, {"learn_ranking": {"share": 0.5}}, "share"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: Any, pruning: Any, message: str
) -> None:
    file = config(tiny_path, tmp_path, pruning, model={"schedule": schedule})
    error = error_of(capsys, "--config", file)
    assert re.search(message, error), error
    assert not (tmp_path / "run" / "adapter").exists()


@NEEDS_DEEPSPEED
@pytest.mark.slow
def test_two_processes_learn_the_ranking_of_one(tiny_path: str, tmp_path: Path) -> None:
    common = {"model": tiny_path, "data": None, "schedule": "ranked", "accumulate": 1}
    one = train(tmp_path, name="one-ranked", strategy="auto", devices=1, batch_size=4, **common)
    names = ("ddp", "zero2", "zero3")
    found = run_scenarios(tmp_path, [{"name": f"{name}-ranked", "strategy": name, **common} for name in names], 300)
    for name in names:
        for rank in found[f"{name}-ranked"]:
            assert rank["ranking"].keys() == one["ranking"].keys()
            for weight, expected in one["ranking"].items():
                torch.testing.assert_close(rank["ranking"][weight], expected, atol=1e-4, rtol=1e-3)
