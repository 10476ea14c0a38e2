"""Conversations, chat templates and tokenizers that the tests of the data package share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, fast, tiny_processor
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from himap_train.data.encode import Encoder
from himap_train.data.records import Conversation, ImageSource, Turn

# The template that llava-hf/llava-1.5-7b-hf ships: images first, {% generation %} tags, no end token, a trailing space.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# ChatML as the Qwen2 LLaVAs use it: its own end token.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A text-only model's template: content is a string, and the answers are trimmed.
STRING_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
TEMPLATES = {"tiny": CHAT_TEMPLATE, "llava": LLAVA_TEMPLATE, "chatml": CHATML_TEMPLATE, "string": STRING_TEMPLATE}
ENDS = {"tiny": "</s>", "llava": "</s>", "chatml": "<|im_end|>", "string": " </s>"}


def processor_with(template: str) -> LlavaProcessor:
    """The tiny processor with one of TEMPLATES."""
    processor = tiny_processor()
    processor.chat_template = TEMPLATES[template]
    if template == "chatml":
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return processor


def llama_like_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: a space is written "▁" and belongs to the word after it, and every text begins with one."""
    letters = sorted({chr(code) for code in range(33, 127)} | {"\n", "▁"})
    words = ["▁A", "▁c", "▁ca", "▁cat", "▁▁"]
    merges = [("▁", "A"), ("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("▁", "▁")]
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS + letters + words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return fast(tokenizer)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer whose merges cross every border: ": " and ":A" are tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = SPECIAL_TOKENS + alphabet + [":Ġ", ":A", "ĊA"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(pieces)},
            merges=[(":", "Ġ"), (":", "A"), ("Ċ", "A")],
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


def picture(width: int = 40, height: int = 30, colour: tuple[int, int, int] = (200, 30, 60)) -> Image.Image:
    """One colour."""
    return Image.new("RGB", (width, height), colour)


def talk(*texts: str, images: tuple[ImageSource, ...] = (), name: str = "sample") -> Conversation:
    """Texts of user and assistant in turn."""
    turns = tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
    return Conversation(name, images, turns)


def llava_record(name: str, image: object, *texts: str) -> dict[str, object]:
    """A record as LLaVA-Instruct has them."""
    turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]
    record: dict[str, object] = {"id": name, "conversations": turns}
    return record if image is None else {**record, "image": image}


def image_folder(folder: Path, names: tuple[str, ...]) -> Path:
    """A folder with pictures of these names, each of another colour."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(colour=(40 * number % 256, 99, 10)).save(path)
    return folder


def eleven_records(folder: Path) -> Path:
    """With images and text alone; answers of different lengths; no batch size divides them."""
    names = ("a.png", "b.png", "c.png")
    image_folder(folder, names)
    records = [
        llava_record(
            str(i), names[i % 3] if i % 4 else None, ("<image>\n" if i % 4 else "") + "What?", "x" * (i * 7 % 30 + 1)
        )
        for i in range(11)
    ]
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "data.json"


def encode(conversation, processor, max_length=None, image_aspect_ratio="as_processor"):
    return Encoder(processor, max_length, image_aspect_ratio).encode(conversation)


def encode_prompt(conversation, processor, max_length=None, image_aspect_ratio="as_processor"):
    return Encoder(processor, max_length, image_aspect_ratio).encode_prompt(conversation)


def pixels(sample):
    """Pixel values (N, 3, H, W) of a sample's images."""
    return torch.cat([image["pixel_values"] for image in sample["images"]])
