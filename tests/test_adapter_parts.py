"""What an adapter brings beside LoRA: tokenizer, chat template, embeddings; and its schedule when PEFT merges it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from export_toys import PRUNED, logits, trained
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llava, tiny_processor
from training_toys import finetune, small_run

from himap_train.checkpoints.export import export_adapter, export_merged
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.models.families.llava import Llava
from himap_train.models.install import pruning_of
from himap_train.models.loading import load_llava
from himap_train.training.run.unseen_tokens import unproduced_tokens_warning, unseen_tokens_warning

DECODER = r".*language_model\.layers\.\d+\..*_proj"
TEMPLATE = "{% for message in messages %}NEW {{ message['role'] }}{% endfor %}"


@pytest.fixture
def adapter(base: str, tmp_path: Path) -> Path:
    """As PEFT alone writes it, with the schedule: no processor."""
    return save_adapter(trained(base), tmp_path / "adapter", PRUNED)


def with_own(adapter: Path, what: str) -> Path:
    processor = tiny_processor()
    processor.chat_template = TEMPLATE
    if what == "processor":
        processor.save_pretrained(adapter)
    elif what == "template":
        (adapter / "chat_template.jinja").write_text(TEMPLATE)
    else:
        processor.tokenizer.chat_template = TEMPLATE
        processor.tokenizer.pad_token = "z"
        processor.tokenizer.save_pretrained(adapter)
    return adapter


@pytest.mark.parametrize("what", ["processor", "template", "tokenizer"])
def test_tokenizer_and_template_are_the_adapters_own(adapter: Path, tmp_path: Path, what: str) -> None:
    with_own(adapter, what)
    _, processor = load_checkpoint(adapter)
    folders = [export_adapter(adapter, tmp_path / "again"), export_merged(adapter, tmp_path / "merged")]
    for found in (processor, *(load_checkpoint(folder)[1] for folder in folders)):
        assert found.chat_template == TEMPLATE
        assert found.image_processor is not None
        assert (found.tokenizer.pad_token == "z") == (what == "tokenizer")


def test_adapter_without_any_has_the_bases(adapter: Path) -> None:
    assert load_checkpoint(adapter)[1].chat_template == tiny_processor().chat_template


@pytest.mark.parametrize(
    ("what", "read"),
    [("nothing", ["base"]), ("tokenizer", ["base"]), ("processor", ["adapter"]), ("mute", ["adapter", "base"])],
)
def test_each_processor_is_read_once(
    base: str, adapter: Path, what: str, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "mute":  # a processor without a template
        with_own(adapter, "processor")
        (adapter / "chat_template.jinja").unlink()
    elif what != "nothing":
        with_own(adapter, what)
    load, found = Llava.load_processor, list[str]()
    names = {base: "base", str(adapter): "adapter"}
    monkeypatch.setattr(Llava, "load_processor", lambda *given: found.append(names[given[1]]) or load(*given))
    assert (load_checkpoint(adapter)[1].chat_template == TEMPLATE) == (what in ("tokenizer", "processor"))
    assert found == read


def test_tokenizers_that_do_not_fit_are_refused(adapter: Path) -> None:
    processor = tiny_processor()
    processor.tokenizer.add_tokens([f"<new{number}>" for number in range(10)])
    processor.save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"tokens without an embedding, .* \(264; text_config.vocab_size"):
        load_checkpoint(adapter)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_by_peft_and_saved_keeps_the_schedule(base: str, tmp_path: Path, kind: str) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=DECODER, use_dora=kind == "dora")
    model = get_peft_model(load_llava(base)[0], config)
    save_adapter(model, tmp_path / "a", PRUNED, tiny_processor())
    loaded, processor = load_checkpoint(tmp_path / "a")
    expected = logits(loaded)
    loaded.merge_and_unload().save_pretrained(tmp_path / "b")
    processor.save_pretrained(tmp_path / "b")
    again, _ = load_checkpoint(tmp_path / "b")
    assert pruning_of(again).schedule == PRUNED
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)


EMBEDDINGS: dict[str, tuple[dict[str, Any], int | None]] = {
    "whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "resized": ({"modules_to_save": ["embed_tokens", "lm_head"]}, 300),
    "low rank": ({"target_modules": DECODER + "|.*embed_tokens"}, None),
    "some tokens": ({"trainable_token_indices": {"embed_tokens": [7, 8]}}, None),
}


def with_embeddings(base: str, folder: Path, kind: str) -> torch.Tensor:
    settings, tokens = EMBEDDINGS[kind]
    model = load_llava(base)[0]
    if tokens:
        model.resize_token_embeddings(tokens)
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": DECODER, **settings}))
    peft_model.peft_config["default"].base_model_name_or_path = base
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    peft_model.save_pretrained(folder)
    return logits(peft_model.eval())


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_adapters_with_embeddings_load_and_merge_with_peft(base: str, tmp_path: Path, kind: str) -> None:
    expected = with_embeddings(base, tmp_path / "a", kind)
    model, processor = load_checkpoint(tmp_path / "a")
    assert torch.equal(logits(model), expected)
    assert isinstance(model, PeftModel)
    if kind != "whole":
        with pytest.raises(ValueError, match="model.merge_and_unload"):
            export_merged(tmp_path / "a", tmp_path / "never")
    model.merge_and_unload().save_pretrained(tmp_path / "b")
    processor.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "b")[0]), expected, atol=1e-4, rtol=1e-4)


def test_resized_embeddings_may_come_with_a_tokenizer_for_them(base: str, tmp_path: Path) -> None:
    with_embeddings(base, tmp_path / "a", "resized")
    processor = tiny_processor()
    processor.tokenizer.add_tokens([f"<new{number}>" for number in range(39)])  # 261 and 39 are 300
    processor.save_pretrained(tmp_path / "a")
    assert len(load_checkpoint(tmp_path / "a")[1].tokenizer) == 300
    processor.tokenizer.add_tokens(["<one more>"])
    processor.save_pretrained(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"1 tokens without an embedding.*<one more>.*\(300; the adapter's have 300 rows"
    ):
        load_checkpoint(tmp_path / "a")


def test_resized_embeddings_without_their_head_are_refused(base: str, tmp_path: Path) -> None:
    model = load_llava(base)[0]
    model.resize_token_embeddings(300)
    config = LoraConfig(r=4, target_modules=DECODER, modules_to_save=["embed_tokens"])
    peft_model = get_peft_model(model, config)
    peft_model.peft_config["default"].base_model_name_or_path = base
    peft_model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="300 rows of embed_tokens, and the base has 264 tokens.*with both"):
        load_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("kind", ["zero", "constant", "copy", "mean", "beyond"])
def test_tokens_that_the_embeddings_never_saw_are_named(kind: str) -> None:
    processor, rows = tiny_processor(), tiny_llava().model.language_model.embed_tokens.weight.detach().clone()
    tokens = set(range(5, 60)) | {processor.image_token_id}
    rows[processor.image_token_id] = 0.0  # never read
    assert unseen_tokens_warning(tokens, rows, processor) is None
    if kind == "beyond":
        rows = rows[:59]
    else:
        rows[59] = {"zero": 0 * rows[0], "constant": 0 * rows[0] + 0.3, "copy": rows[70], "mean": rows.mean(0)}[kind]
    found = unseen_tokens_warning(tokens, rows, processor)
    assert found is not None and "1 tokens whose embedding was never trained" in found and "(59)" in found
    assert unseen_tokens_warning(tokens, rows[:0], processor) is None  # spread over processes


def test_answers_in_words_that_the_model_never_said() -> None:
    processor, head = tiny_processor(), tiny_llava().lm_head
    head.requires_grad_(False)
    assert unproduced_tokens_warning({40: 3, 41: 1}, head, processor) is None
    head.weight[30:] = head.weight[30] + 0.01 * head.weight[30:]
    found = unproduced_tokens_warning({5: 1, 40: 3}, head, processor)
    assert found is not None and "75 % of the answers' tokens" in found and f"{len(head.weight) - 30} of the" in found
    assert unproduced_tokens_warning({5: 1}, head, processor) is None
    head.requires_grad_(True)
    assert unproduced_tokens_warning({40: 3}, head, processor) is None  # it learns them


def test_run_whose_data_use_such_a_token_says_so(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(base, tmp_path / "base")
    model = tiny_llava()
    processor = tiny_processor()
    number = processor.tokenizer.convert_tokens_to_ids("e")
    model.model.language_model.embed_tokens.weight.data[number] = 0.0
    model.save_pretrained(tmp_path / "base")
    groups = {"model": {"schedule": None}, "data": {"train_limit": 8}, "trainer": {"max_steps": 1}}
    assert finetune("--config", small_run(tmp_path, str(tmp_path / "base"), **groups)) == 0
    assert f"'e' ({number})" in capsys.readouterr().out
