"""The small LLaVA in the package: stock classes load it, it takes any text, and it answers."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes_cli import run_program
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from himap_train.data.scene_questions import SceneQuestions
from himap_train.embedded import model as embedded
from himap_train.embedded.build import build_model, build_tokenizer
from himap_train.embedded.coarse_training import grow, shrink
from himap_train.embedded.scene_batches import branch_mask, branches
from himap_train.embedded.scene_text import TYPES, WORDS

WRITTEN_BY = re.compile(r'"transformers_version": "[^"]*"')


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return AutoProcessor.from_pretrained(embedded.embedded_model_path())


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(embedded.embedded_model_path()).eval()


def prompt(processor: LlavaProcessor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question.removeprefix("<image>\n")}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_loads_in_stock_classes_with_every_key() -> None:
    model, info = LlavaForConditionalGeneration.from_pretrained(
        embedded.embedded_model_path(), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model) is LlavaForConditionalGeneration and model.dtype == torch.float32
    assert model.config.text_config.num_hidden_layers >= 8
    assert model.config.text_config.max_position_embeddings >= 2048
    assert model.generation_config.eos_token_id == 2 and model.generation_config.pad_token_id == 0
    assets = embedded.embedded_model_path().parent
    assert sum(file.stat().st_size for file in assets.rglob("*") if file.is_file()) < 12_000_000


def test_missing_weights_say_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "models/embedded.py"))
    for name in ("embedded", "embedded-fine"):
        with pytest.raises(FileNotFoundError, match=f"'{name}' is missing.*recipes/train_embedded.py --model {name}$"):
            embedded.embedded_model_path(name)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = build_tokenizer(WORDS)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_shipped_tokenizer_is_the_built_one_and_task_words_are_one_token(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.get_vocab() == build_tokenizer(WORDS).get_vocab()
    for word in WORDS:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word
        if word[0].isupper():
            assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word
    for text in ("Ünï¢ödé 你好 🎉\t\r\n  two  spaces", "mailboxesy theremany 12345"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_processor_writes_the_image_tokens_that_the_tower_makes(
    processor: LlavaProcessor, model: LlavaForConditionalGeneration
) -> None:
    record = SceneQuestions("test", scenes=1)[0]
    inputs = processor(
        images=[record.images[0].resize((200, 120))], text=prompt(processor, "What is this?"), return_tensors="pt"
    )
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    assert count == model.config.image_seq_length == features[0].shape[0] >= 144
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)


def test_prompts_are_short_beside_the_image(processor: LlavaProcessor) -> None:
    source = SceneQuestions("test", scenes=70)
    lengths = [len(processor.tokenizer.encode(prompt(processor, source[i].turns[0].text))) - 1 for i in range(70)]
    assert 8 <= min(lengths) and max(lengths) <= 25, (min(lengths), max(lengths))


def test_chat_template_supervises_the_answer_and_its_end(processor: LlavaProcessor) -> None:
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a cat?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": "Where is the cat?"},
        {"role": "assistant", "content": "top left"},
    ]
    text = processor.apply_chat_template(turns)
    assert text == ("USER: <image>\nIs there a cat? ASSISTANT: yes</s>USER: Where is the cat? ASSISTANT: top left</s>")
    encoded = processor.tokenizer.apply_chat_template(
        turns[2:], chat_template=processor.chat_template, return_assistant_tokens_mask=True, return_dict=True
    )
    marked = [t for t, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert processor.tokenizer.decode(marked) == " top left</s>"


@torch.no_grad()
def test_answers_unseen_scenes(processor: LlavaProcessor, model: LlavaForConditionalGeneration) -> None:
    source = SceneQuestions("test", scenes=36, questions_per_scene=7, seed=11)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(source), 84):
        records = [source[i] for i in range(start, start + 84)]
        inputs = processor(
            images=[r.images[0] for r in records],
            text=[prompt(processor, r.turns[0].text) for r in records],
            return_tensors="pt",
            padding=True,
        )
        made = model.generate(**inputs, max_new_tokens=3)[:, inputs["input_ids"].shape[1] :]
        for record, text in zip(records, processor.batch_decode(made, skip_special_tokens=True), strict=True):
            right[record.meta["type"]].append(text.strip() == record.answer)
    rates = {kind: sum(r) / len(r) for kind, r in right.items()}
    assert set(rates) == set(TYPES) and len(right["digit"]) == 36
    assert sum(rates.values()) / len(rates) > 0.85, rates
    for rate in rates.values():  # every type far above its most frequent answer
        assert rate > 0.65, rates


@torch.no_grad()
def test_a_branch_is_trained_exactly_as_if_it_stood_alone(processor: LlavaProcessor) -> None:
    """The recipe's packed questions, against stock forwards of the single questions."""
    model = build_model(len(processor.tokenizer), layers=2).eval()
    asked = [("What is at the top left?", "cat"), ("How many cats are there?", "3")]
    rows = branches(processor.tokenizer, [asked])
    prefix = processor.tokenizer.encode("USER: no image\n", add_special_tokens=False)
    positions = torch.cat([torch.arange(len(prefix))[None], len(prefix) + rows["position_ids"]], dim=1)
    packed = model.model.language_model(
        input_ids=torch.cat([torch.tensor([prefix]), rows["input_ids"]], dim=1),
        attention_mask=branch_mask(rows["branch"], len(prefix)),
        position_ids=positions,
    ).last_hidden_state[:, len(prefix) :]
    for number, (question, answer) in enumerate(asked):
        text = f"USER: no image\n{question} ASSISTANT: {answer}"
        alone = model.model.language_model(
            input_ids=processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ).last_hidden_state[0, len(prefix) :]
        mine = packed[0, rows["branch"][0] == number]
        torch.testing.assert_close(mine, alone, atol=1e-4, rtol=1e-4)
        labels = rows["labels"][0, rows["branch"][0] == number]
        assert processor.tokenizer.decode(labels[labels != -100]) == f" {answer}</s>"


@torch.no_grad()
def test_a_grown_decoder_says_the_same_with_twice_the_layers() -> None:
    model, ids = build_model(300).eval(), torch.arange(9)[None] + 10
    shrink(model, 2)
    before = model(input_ids=ids).logits
    grow(model)
    decoder = model.model.language_model
    assert len(decoder.layers) == 4 == decoder.config.num_hidden_layers == model.config.text_config.num_hidden_layers
    assert [layer.self_attn.layer_idx for layer in decoder.layers] == [0, 1, 2, 3]
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    decoder.layers[1].mlp.down_proj.weight += 0.1
    assert not torch.allclose(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", ["embedded", "embedded-fine"])
def test_the_recipe_makes_such_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of each stage; the shipped folder has the same files and the same shapes."""
    options = ["--work", tmp_path, "--scale", 0.001, "--out", tmp_path / "made", "--test-scenes", 2]
    assert run_program("train_embedded", "--model", name, *options, patch=monkeypatch) == 0
    shipped = embedded.embedded_model_path(name)
    assert {f.name for f in (tmp_path / "made").iterdir()} == {f.name for f in shipped.iterdir()} - {"README.md"}
    made, mine = (load_file(folder / "model.safetensors") for folder in (tmp_path / "made", shipped))
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (v.shape, v.dtype) for k, v in mine.items()}
    for name in ("config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        made, expected = ((folder / name).read_text() for folder in (tmp_path / "made", shipped))
        assert WRITTEN_BY.sub("", made) == WRITTEN_BY.sub("", expected), name
