"""Special tokens in what people wrote are encoded as text; those of the template stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from data_examples import (
    TEMPLATES,
    encode,
    encode_prompt,
    llama_like_tokenizer,
    merging_tokenizer,
    picture,
    processor_with,
    talk,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE, IMAGE_TOKENS, tiny_processor, tiny_tokenizer
from tokenizers import normalizers
from transformers import AddedToken, ByT5Tokenizer

from himap_train.data.plain_text import PlainText
from himap_train.data.records import RecordError


def metaspace() -> Any:
    """A space before the first word of all alone, not of each piece between special tokens."""
    import json

    from transformers import PreTrainedTokenizerFast

    made = json.loads(llama_like_tokenizer().backend_tokenizer.to_str())
    made |= {"normalizer": None}
    made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    backend = type(llama_like_tokenizer().backend_tokenizer).from_str(json.dumps(made))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def greedy() -> Any:
    """Takes the white space beside its end token, as some do."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True, special=True)], special_tokens=True)
    return tokenizer


TOKENIZERS = {
    "bytes": tiny_tokenizer,
    "llama": llama_like_tokenizer,
    "merging": merging_tokenizer,
    "metaspace": metaspace,
    "greedy": greedy,
}
LITERALS = ["<s>", "</s>", "<pad>", "<unk>", "</s></s>", "a<s>b", " </s> ", "<</s>/s>", "</s", "\n</s>\n"]
ordinary = st.text(st.sampled_from("Aab :c\ncat<>s/|é"), max_size=20)


def specials(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ordinary_text_is_encoded_as_the_tokenizer_does(name: str, data: st.DataObject) -> None:
    """Also where it stands beside someone's special token: then by a copy that reads none, with stand-ins."""
    tokenizer = TOKENIZERS[name]()
    plain, own = PlainText(tokenizer, "<image>"), specials(tokenizer)
    parts = data.draw(st.lists(st.one_of(ordinary, st.sampled_from(own)), max_size=6))
    text = "".join(parts)
    for bos in (False, True):
        expected = tokenizer(text, add_special_tokens=bos)["input_ids"]
        assert plain.ids(text, bos) == expected
        assert plain._beside_stand_ins(text, bos) == expected


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_of_a_text_are_text(name: str, literal: str) -> None:
    tokenizer = TOKENIZERS[name]()
    plain = PlainText(tokenizer, "<image>")
    text = f"A {literal} cat"
    hidden = plain.hide(text, "x")
    assert plain.ids(hidden) == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    end = tokenizer.eos_token
    both = plain.ids(f"{end}{hidden}{end}")
    assert [i for i in both if i in tokenizer.all_special_ids and i != tokenizer.unk_token_id] == [
        tokenizer.convert_tokens_to_ids(end)
    ] * 2


@pytest.mark.parametrize("literal", ["</s>", "<pad>", "<s>", "<|im_end|>"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_hold_no_control_token_but_the_end(template: str, literal: str) -> None:
    processor = processor_with(template)
    tokenizer = processor.tokenizer
    conversation = talk(
        f"<image>\n{literal}Why{literal}?", f"By {literal} way", f"{literal}?", literal, images=(picture(),)
    )
    sample, prompt = encode(conversation, processor), encode_prompt(conversation, processor)
    usual = talk("<image>\nWhy?", "By way", "??", "??", images=(picture(),))
    own = [i for i in encode(usual, processor)["input_ids"].tolist() if i in tokenizer.all_special_ids]
    assert [i for i in sample["input_ids"].tolist() if i in tokenizer.all_special_ids] == own
    assert own.count(processor.image_token_id) == IMAGE_TOKENS
    length = len(prompt["input_ids"])
    assert torch.equal(prompt["input_ids"], sample["input_ids"][:length])
    answer = tokenizer.decode(sample["labels"][length:])
    assert answer.strip().removesuffix("</s>").removesuffix("<|im_end|>").strip() in (literal, "")
    text = tokenizer.decode(sample["input_ids"])
    assert f"{literal}Why{literal}?" in text and f"By {literal} way" in text and "\ufdd0" not in text


def test_a_tokenizer_that_cannot_tell_them_apart_is_not_trusted() -> None:
    """One in Python, which has no added tokens that stand in for others."""
    plain = PlainText(ByT5Tokenizer(), "<image>")
    assert plain.ids("A cat</s>") == ByT5Tokenizer()("A cat</s>", add_special_tokens=False)["input_ids"]
    with pytest.raises(RecordError, match="cannot read as text: .</s>A "):
        plain.ids(f"</s>{plain.hide('A </s> cat', 'x')}")


def test_image_token_in_a_text_is_text() -> None:
    """A checkpoint whose image token is not written <image>, and is no special token to its tokenizer."""
    processor = tiny_processor()
    processor.tokenizer.add_tokens([AddedToken("<picture>", special=False)])
    processor.image_token, processor.image_token_id = (
        "<picture>",
        processor.tokenizer.convert_tokens_to_ids("<picture>"),
    )
    processor.chat_template = CHAT_TEMPLATE.replace("<image>", "<picture>")
    ids = encode(talk("<image>\nA <picture>", "no <picture>", images=(picture(),)), processor)["input_ids"]
    assert int((ids == processor.image_token_id).sum()) == IMAGE_TOKENS
    assert "A <picture> ASSISTANT: no <picture></s>" in processor.tokenizer.decode(ids)


def test_letters_that_a_tokenizer_takes_for_others() -> None:
    processor = tiny_processor()
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    processor.tokenizer.add_tokens([AddedToken("<end>", normalized=True, special=True)], special_tokens=True)
    ids = encode(talk("Q", "\uff1cend\uff1e"), processor)["labels"]
    assert processor.tokenizer.convert_tokens_to_ids("<end>") not in ids
    assert processor.tokenizer.decode(ids[ids >= 0]).strip() == "<end></s>"


def test_the_mark_and_half_characters_are_refused() -> None:
    with pytest.raises(RecordError, match=r"sample 'sample': the text holds U\+FDD0"):
        encode(talk("Q\ufdd0", "A"), tiny_processor())
    with pytest.raises(RecordError, match="sample 'sample': the text has half a character"):
        encode(talk("Q\ud83d", "A"), tiny_processor())
