"""Answers end at the token that closes a turn of the chat template, also where that is not eos (Llama-3, Qwen2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_examples import encode_prompt, processor_with
from evaluation_toys import Source, conversation
from export_toys import PRUNED, trained
from recipes_cli import run_recipe
from tiny import tiny_llava, tiny_processor
from transformers import AutoModelForImageTextToText, GenerationConfig

from himap_train.checkpoints.export import export_adapter, export_merged
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.data.batches import collate
from himap_train.data.end_of_answer import end_token_ids
from himap_train.evaluation.evaluate import evaluate
from himap_train.models.stock import base_model

END = 262  # <|im_end|> of the ChatML processor, whose eos is 2
QUESTION = conversation(0, "What is it?")
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '\n\n' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] | trim }}"
    "{% endfor %}{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
)


def llama3_processor() -> Any:
    processor = tiny_processor()
    processor.chat_template = LLAMA3
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|eot_id|>"]})
    return processor


def ending_llava(processor: Any) -> tuple[Any, str]:
    """A model that closes its answer with `END` after a few tokens, and would go on; and that answer."""
    model = tiny_llava()
    batch = collate([encode_prompt(QUESTION, processor)], 0, padding_side="left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | batch["images"]
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, batch["input_ids"].shape[1] :]
    stop = int(new[2])
    weight = model.lm_head.weight.data
    weight[[stop, END]] = weight[[END, stop]]
    return model, processor.tokenizer.decode(new[: new.tolist().index(stop)], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("processor", "own", "ends"),
    [
        (processor_with("chatml"), 2, [2, END]),
        (processor_with("chatml"), [2, END], [2, END]),
        (processor_with("chatml"), None, [END]),
        (llama3_processor(), 2, [2, END]),
        (processor_with("llava"), 2, [2]),  # no end in the template: training adds eos
        (processor_with("string"), 2, [2]),
    ],
)
def test_end_tokens(processor: Any, own: Any, ends: list[int]) -> None:
    assert end_token_ids(processor, own) == ends


def test_without_a_chat_template_nothing_is_added() -> None:
    processor = tiny_processor()
    processor.chat_template = None
    assert end_token_ids(processor, 2) == [2]


@pytest.mark.parametrize("processor", [processor_with("chatml"), llama3_processor()])
def test_evaluation_ends_where_the_template_closes_an_answer(processor: Any) -> None:
    model, answer = ending_llava(processor)
    result = evaluate(model, processor, Source([QUESTION]), max_new_tokens=6, progress=False)
    assert result.predictions[0].prediction == answer
    assert model.generation_config.eos_token_id is None  # the model's own is left alone


def test_generate_recipe_and_written_checkpoints_end_there_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = processor_with("chatml")
    model, answer = ending_llava(processor)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    QUESTION.images[0].save(tmp_path / "a.png")

    options = ["--image", tmp_path / "a.png", "--question", "What is it?", "--max_new_tokens", 6]
    assert run_recipe("generate", "--checkpoint", tmp_path / "base", *options) == 0
    assert capsys.readouterr().out.split("ASSISTANT: ")[1].strip() == answer

    turns = [{"from": who, "value": text} for who, text in (("system", "Be short."), ("human", "<image><image>Same?"))]
    record = {"image": ["a.png", "a.png"], "conversations": [*turns, {"from": "gpt", "value": "yes"}]}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    options = ["--data", tmp_path / "a.json", "--record", 0, "--max_new_tokens", 6]
    for question in ([], ["--question", "Same?"]):
        assert run_recipe("generate", "--checkpoint", tmp_path / "base", *options, *question) == 0
        assert capsys.readouterr().out.split("\nASSISTANT: ")[0] == "USER: Same?"

    saved = save_adapter(trained(str(tmp_path / "base")), tmp_path / "run" / "adapter", PRUNED, processor)
    folders = [saved, export_adapter(saved, tmp_path / "copy"), export_merged(saved, tmp_path / "merged")]
    for folder in folders:
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, END]
        loaded, _ = load_checkpoint(folder)
        assert base_model(loaded).generation_config.eos_token_id == [2, END]
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert stock.generation_config.eos_token_id == [2, END]


def test_export_leaves_a_generation_config_as_it_is_that_ends_there(tmp_path: Path) -> None:
    processor = processor_with("chatml")
    tiny_llava().save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    text = json.dumps({"eos_token_id": END, "temperature": 0.5})  # which transformers would not write
    (tmp_path / "base" / "generation_config.json").write_text(text)
    written = export_merged(tmp_path / "base", tmp_path / "merged") / "generation_config.json"
    assert written.read_text() == text
