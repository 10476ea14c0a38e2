"""The model for fine scenes: what it answers, what an even choice loses and an oracle does not; new words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_toys import finetune

from himap_train.analysis.oracle import oracle_accuracy
from himap_train.data.sources import open_source
from himap_train.embedded.fine_training import ALL_WORDS, fine_processor
from himap_train.evaluation.compare import compare
from himap_train.models.loading import load_llava
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage


def test_its_tokenizer_has_a_token_for_each_word() -> None:
    _, processor = load_llava("embedded-fine")
    assert processor.tokenizer.get_vocab() == fine_processor().tokenizer.get_vocab()
    assert all(len(processor.tokenizer.encode(f" {word}", add_special_tokens=False)) == 1 for word in ALL_WORDS)


def test_output_rows_point_apart() -> None:
    model, _ = load_llava("embedded-fine")
    rows = torch.nn.functional.normalize(model.lm_head.weight.float(), dim=-1)
    alike = (rows @ rows.T).fill_diagonal_(-1).amax(-1) > 0.99
    assert alike.float().mean() < 0.01  # 0.9 of the rows of "embedded" are alike


def test_choosing_matters_on_fine_scenes() -> None:
    """A quarter of the tokens: an even choice and chance lose much, an oracle hardly anything."""
    model, processor = load_llava("embedded-fine", attn_implementation="eager")
    source = open_source("embedded:fine-validation?scenes=120&seed=21")
    quarter = {name: PruningSchedule((PruningStage(0, name, 0.25),)) for name in ("uniform", "random")}
    with torch.autocast("cpu", torch.bfloat16):
        rows = compare(model, processor, source, {"dense": None, **quarter}, progress=False)
        oracle = oracle_accuracy(model, processor, source, 0.25)
    score = {row.name: row.result.overall.score for row in rows}
    assert score["dense"] > 0.85 and oracle > score["dense"] - 0.05, (score, oracle)
    assert max(score["uniform"], score["random"]) < score["dense"] - 0.1, score


WORDS = {
    "crimson": (200, 30, 50),
    "tangerine": (240, 140, 30),
    "emerald": (30, 160, 90),
    "azure": (40, 120, 220),
    "violet": (130, 50, 190),
    "ivory": (245, 240, 220),
}


def own_records(folder: Path, count: int, seed: int) -> Path:
    """Pictures of one colour in patches of another's, and words that no scene uses."""
    rng, records = np.random.default_rng(seed), []
    for index in range(count):
        word = str(rng.choice(list(WORDS)))
        pixels = np.asarray(WORDS[word]) + rng.normal(0, 12, (256, 256, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{seed}-{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhich shade is this?"}, {"from": "gpt", "value": word}]
        records.append({"id": f"{index}", "image": f"{seed}-{index}.png", "conversations": turns})
    file = folder / f"{seed}.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


@pytest.mark.slow
def test_learns_words_that_no_scene_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(WORDS) & set(ALL_WORDS)
    monkeypatch.chdir(Path(__file__).parents[1])
    train, test = own_records(tmp_path, 240, 0), own_records(tmp_path, 24, 1)
    data = [
        part
        for name, file in (("train", train), ("validation", test), ("test", test))
        for part in (f"--data.{name}", str(file))
    ]
    options = ["--config", "configs/own_data.yaml", *data, "--evaluation.before", "false"]
    assert finetune(*options, "--output", str(tmp_path / "run")) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "run/metrics.json").read_text())["rows"]}
    assert rows["adapted pruned"]["overall"]["score"] > 0.9, rows["adapted pruned"]["overall"]
