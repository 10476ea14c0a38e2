"""Encoding: what is supervised, where images go, how prompts and truncation behave, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from data_examples import (
    ENDS,
    TEMPLATES,
    encode,
    encode_prompt,
    llama_like_tokenizer,
    merging_tokenizer,
    picture,
    pixels,
    processor_with,
    talk,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE_TOKENS, tiny_processor

from himap_train.data.encode import Encoder, SampleTooLongError
from himap_train.data.records import Conversation, RecordError, Turn, blank

IMAGE = "<image>" * IMAGE_TOKENS
TWO_TURNS = talk("<image>\nWhat is it?", "A cat.", "What colour?", "Grey and white.", images=(picture(),))


def text_of(processor, ids) -> str:
    return processor.tokenizer.decode(ids)


def supervised(processor, sample) -> str:
    return text_of(processor, sample["labels"][sample["labels"] >= 0])


GOLDEN = {
    "tiny": (
        f"USER: {IMAGE}\nWhat is it? ASSISTANT: A cat.</s>USER: What colour? ASSISTANT: Grey and white.</s>",
        " A cat.</s> Grey and white.</s>",
    ),
    "llava": (
        f"USER: {IMAGE}\nWhat is it? ASSISTANT: A cat.</s>USER: What colour? ASSISTANT: Grey and white.</s>",
        " A cat.</s> Grey and white.</s>",
    ),
    "chatml": (
        f"<|im_start|>user\n{IMAGE}What is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nWhat colour?<|im_end|>\n<|im_start|>assistant\nGrey and white.<|im_end|>",
        "A cat.<|im_end|>Grey and white.<|im_end|>",
    ),
    "string": (
        f"<s>[INST] {IMAGE}\nWhat is it? [/INST] A cat. </s>[INST] What colour? [/INST] Grey and white. </s>",
        " A cat. </s> Grey and white. </s>",
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_golden_text_and_mask(template):
    processor = processor_with(template)
    sample = encode(TWO_TURNS, processor)
    text, answers = GOLDEN[template]
    assert text_of(processor, sample["input_ids"]) == text
    assert supervised(processor, sample) == answers
    keep = sample["labels"] >= 0
    assert torch.equal(sample["labels"][keep], sample["input_ids"][keep])
    assert (sample["labels"][~keep] == -100).all()
    assert pixels(sample).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_is_what_stands_before_the_last_answer(template):
    processor = processor_with(template)
    sample, prompt = encode(TWO_TURNS, processor), encode_prompt(TWO_TURNS, processor)
    length = len(prompt["input_ids"])
    assert torch.equal(prompt["input_ids"], sample["input_ids"][:length])
    assert sample["labels"][length] >= 0 and sample["labels"][length - 1] == -100
    assert (sample["labels"][length:] >= 0).all()
    assert torch.equal(pixels(prompt), pixels(sample))
    assert prompt["answer"] == "Grey and white."
    assert "labels" not in prompt


def test_prompt_of_a_question_without_answer():
    processor = tiny_processor()
    open_end = talk("<image>\nWhat is it?", "A cat.", "What colour?", images=(picture(),))
    assert torch.equal(
        encode_prompt(open_end, processor)["input_ids"], encode_prompt(TWO_TURNS, processor)["input_ids"]
    )


def test_same_ids_and_pixels_as_the_processor_itself():
    """One question: nothing but the end token differs from LlavaProcessor's own output."""
    processor = processor_with("llava")
    conversation = talk("<image>\nWhat is it?", "A cat.", images=(picture(50, 41),))
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    expected = processor(text=text, images=[picture(50, 41)], return_tensors="pt")
    prompt = encode_prompt(conversation, processor)
    assert torch.equal(prompt["input_ids"], expected["input_ids"][0])
    assert torch.equal(pixels(prompt), expected["pixel_values"])


@pytest.mark.parametrize("answer", ["A cat", " cat", "Ax", "\nA", "s>"])
def test_prompt_ids_do_not_depend_on_the_answer_when_tokens_would_cross_the_border(answer):
    processor = processor_with("llava")
    processor.tokenizer = merging_tokenizer()
    whole = processor.tokenizer("ASSISTANT: A")["input_ids"]
    assert whole[: len("ASSISTANT:")] != processor.tokenizer("ASSISTANT:")["input_ids"]  # the border is crossed
    prompt = encode_prompt(talk("Q:", answer, "Q2", answer), processor)["input_ids"]
    sample = encode(talk("Q:", answer, "Q2", answer), processor)
    assert torch.equal(sample["input_ids"][: len(prompt)], prompt)
    assert supervised(processor, sample) == f" {answer}</s>" * 2


def test_answers_are_tokenized_as_where_they_stand():
    """With Llama's way of writing spaces, an answer tokenized alone would begin with one space too many."""
    processor = processor_with("llava")
    tokenizer = processor.tokenizer = llama_like_tokenizer()
    sample = encode(talk("<image>\nA cat?", "A cat cat", "And A?", "cat", images=(picture(),)), processor)
    answers = tokenizer.convert_ids_to_tokens(sample["labels"][sample["labels"] >= 0].tolist())
    assert answers == ["▁A", "▁cat", "▁cat", "</s>", "▁cat", "</s>"]
    whole = processor(
        text="USER: <image>\nA cat? ASSISTANT: A cat cat</s>USER: And A? ASSISTANT: cat</s>", images=picture()
    )
    assert sample["input_ids"].tolist() == list(whole["input_ids"][0])


def test_bos_is_set_once_and_eos_never_by_the_tokenizer():
    from tokenizers.processors import TemplateProcessing

    processor = tiny_processor()
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids = encode(talk("Hi", "Ho"), processor)["input_ids"]
    assert text_of(processor, ids) == "<s>USER: Hi ASSISTANT: Ho</s>"
    processor.chat_template = "<s>" + processor.chat_template
    assert torch.equal(encode(talk("Hi", "Ho"), processor)["input_ids"], ids)


def test_text_only():
    processor = tiny_processor()
    sample = encode(talk("Hi", "Ho"), processor)
    assert sample["images"] == []
    assert text_of(processor, sample["input_ids"]) == "USER: Hi ASSISTANT: Ho</s>"
    assert encode_prompt(talk("Hi", "Ho"), processor)["images"] == []


def test_images_keep_their_places_and_order():
    processor = processor_with("tiny")
    red, blue = picture(colour=(255, 0, 0)), picture(colour=(0, 0, 255))
    conversation = talk("First <image> then\n<image>\nwhich?", "Red.", "<image>", "Again.", images=(red, blue, red))
    sample = encode(conversation, processor)
    assert text_of(processor, sample["input_ids"]) == (
        f"USER: First {IMAGE}\nthen\n{IMAGE}\nwhich? ASSISTANT: Red.</s>USER: {IMAGE}\n ASSISTANT: Again.</s>"
    )
    means = pixels(sample).mean(dim=(2, 3))  # (3 images, 3 channels)
    assert means[0, 0] > 1 > -1 > means[0, 2] and means[1, 2] > 1 > -1 > means[1, 0]
    assert torch.equal(pixels(sample)[0], pixels(sample)[2])


def test_system_turn_is_never_supervised():
    processor = processor_with("chatml")
    conversation = Conversation("s", (), (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Ho")))
    sample = encode(conversation, processor)
    assert text_of(processor, sample["input_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert supervised(processor, sample) == "Ho<|im_end|>"


@pytest.mark.parametrize("template", TEMPLATES)
def test_truncation_drops_whole_questions_with_their_answers_and_images(template):
    processor = processor_with(template)
    texts = ("<image>\nOne?", "1", "Two?", "2", "<image>\nThree?", "3")
    images = (picture(), picture(colour=(0, 0, 0)))
    short, middle = (
        encode(talk(*texts[:2], images=images[:1]), processor),
        encode(talk(*texts[:4], images=images[:1]), processor),
    )
    whole = encode(talk(*texts, images=images), processor)
    for limit in range(len(short["input_ids"]), len(whole["input_ids"]) + 1):
        sample = encode(talk(*texts, images=images), processor, limit)
        expected = whole if limit == len(whole["input_ids"]) else middle if limit >= len(middle["input_ids"]) else short
        assert torch.equal(sample["input_ids"], expected["input_ids"])
        assert torch.equal(sample["labels"], expected["labels"])
        assert torch.equal(pixels(sample), pixels(expected))
        assert sample["dropped_exchanges"] == (0 if expected is whole else 1 if expected is middle else 2)
        assert (sample["input_ids"] == 4).sum() == IMAGE_TOKENS * len(pixels(sample))


def test_a_first_question_that_does_not_fit_is_refused():
    processor = tiny_processor()
    length = len(encode(TWO_TURNS, processor, 50 + IMAGE_TOKENS)["input_ids"])
    with pytest.raises(
        SampleTooLongError, match=f"'sample': the first question and answer take {length} tokens.*{length - 1}"
    ):
        encode(TWO_TURNS, processor, length - 1)
    prompt = len(encode_prompt(TWO_TURNS, processor)["input_ids"])
    assert len(encode_prompt(TWO_TURNS, processor, prompt)["input_ids"]) == prompt
    with pytest.raises(SampleTooLongError, match=f"the prompt takes {prompt} tokens"):
        encode_prompt(TWO_TURNS, processor, prompt - 1)


def test_image_tokens_without_decoding_are_those_of_the_sample():
    processor = tiny_processor()
    assert Encoder(processor).image_tokens((640, 480)) == [IMAGE_TOKENS]
    processor.image_processor.do_center_crop = False  # now each image has a size of its own
    encoder = Encoder(processor)
    for size in ((64, 32), (32, 96), (40, 40)):
        sample = encoder.encode(talk("<image>\nQ", "A", images=(picture(*size),)))
        assert encoder.image_tokens(size) == [(sample["input_ids"] == 4).sum()]
    assert encoder.image_tokens((64, 32)) == [2 * IMAGE_TOKENS]


BAD = [
    (talk(images=()), "'sample' has no question"),
    (talk("Only a question"), "'sample' has a question but no answer; training needs both"),
    (talk("Q", "  "), "'sample' has an empty answer"),
    (talk("Q", "\u200b\ufeff\0"), "'sample' has an empty answer"),
    (replace(talk("<video>Q", "A"), meta={"video": "a.mp4"}), "'sample' shows a video, and only images are read"),
    (talk("<image>\nQ", "A"), "'sample': 1 <image> in the conversation but 0 image"),
    (talk("Q", "A", images=(picture(),)), "'sample': 0 <image> in the conversation but 1 image"),
    (talk("<image><image>Q", "A", images=(picture(),)), "'sample': 2 <image> in the conversation but 1 image"),
    (talk("Q", "A <image>", images=(picture(),)), "<image> in a turn that is not the user's"),
    (
        Conversation("s", (), (Turn("assistant", "A"), Turn("user", "Q"))),
        "'s': turn 0 is of the assistant, expected the user",
    ),
    (
        Conversation("s", (), (Turn("user", "Q"), Turn("user", "Q"))),
        "'s': turn 1 is of the user, expected the assistant",
    ),
    (
        Conversation("s", (), (Turn("user", "Q"), Turn("system", "S"), Turn("user", "Q"))),
        "turn 1 is of the system, expected the assistant",
    ),
    (talk("<image>\nQ", "A", images=(b"no image",)), "'sample': the image stored in the record is not an image file"),
]


@pytest.mark.parametrize(("conversation", "message"), BAD)
def test_conversations_that_cannot_be_used_are_refused(conversation, message):
    with pytest.raises(RecordError, match=message):
        encode(conversation, tiny_processor())


def test_template_that_refuses_or_rewrites_turns():
    processor = tiny_processor()
    processor.chat_template = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + (
        processor.chat_template
    )
    encode(talk("Q", "A"), processor)
    with pytest.raises(RecordError, match="'sample': the checkpoint's chat template refuses it: one turn only"):
        encode(TWO_TURNS, processor)
    processor.chat_template = "{{ messages | length }}" + tiny_processor().chat_template
    with pytest.raises(RecordError, match="renders earlier turns differently"):
        encode(TWO_TURNS, processor)


def test_checkpoint_without_template_or_eos_is_refused():
    processor = tiny_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; set processor.chat_template"):
        Encoder(processor)
    processor = tiny_processor()
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        Encoder(processor)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: not blank(text) and "<" not in text
)
PROCESSORS = {name: processor_with(name) for name in TEMPLATES}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(TEXT, TEXT, st.booleans()), min_size=1, max_size=4))
def test_supervised_tokens_are_the_answers(template, exchanges):
    """decode(labels) gives every answer followed by its end token, and nothing else; images are whole."""
    processor = PROCESSORS[template]
    texts = [
        t for question, answer, image in exchanges for t in (f"<image>\n{question}" if image else question, answer)
    ]
    images = tuple(picture() for *_, image in exchanges if image)
    sample = encode(talk(*texts, images=images), processor)
    lead = "" if template == "chatml" else " "
    answers = [answer.strip() if template == "string" else answer for _, answer, _ in exchanges]
    assert supervised(processor, sample) == "".join(f"{lead}{answer}{ENDS[template]}" for answer in answers)
    assert (sample["input_ids"] == 4).sum() == IMAGE_TOKENS * len(images)
    prompt = encode_prompt(talk(*texts, images=images), processor)["input_ids"]
    assert torch.equal(prompt, sample["input_ids"][: len(prompt)])
