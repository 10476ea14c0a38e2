"""Random models of the families that cut a picture into tiles, of the stock classes, and their processors on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import TEXT_CONFIGS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

TILE, PATCH, SIDE = 16, 4, 4
"""Pixels of a tile and of a patch, patches along a tile."""
IMAGE_ID, START_ID, END_ID = 4, 5, 6
CANVASES = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
"""LLaVA-NeXT's, a 21st of their size."""
MANY_CANVASES = [[TILE * rows, TILE * columns] for rows in range(1, 5) for columns in range(1, 5)]

# As the hub has them.
NEXT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + "
    "'\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{ '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def byte_tokenizer(image: str, end: str, **named: str) -> PreTrainedTokenizerFast:
    """One token a byte, the image token at 4, and further special tokens from 5 on."""
    special = ["<pad>", "<s>", "</s>", "<unk>", image, *named.values(), "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token=end, unk_token="<unk>",
        extra_special_tokens={("context_image_token" if named else "image_token"): image, **named},
    )  # fmt: skip


def text_config(text: str, layers: int, vocabulary: int = 272) -> Any:
    """A small decoder."""
    kinds = {**TEXT_CONFIGS, "qwen3": Qwen3Config}
    extra: dict[str, Any] = {"sliding_window": None} if text == "mistral" else {}
    extra |= {"head_dim": 8} if text == "qwen3" else {}
    return kinds[text](
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False, **extra,
    )  # fmt: skip


def clip(**sizes: int) -> CLIPVisionConfig:
    """A small CLIP tower."""
    return CLIPVisionConfig(**_TOWER, **sizes)


def siglip() -> SiglipVisionConfig:
    """A small SigLIP tower, which has no class token."""
    return SiglipVisionConfig(**_TOWER, vision_use_head=False)


_TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": TILE,
    "patch_size": PATCH,
}  # fmt: skip


def _next(text: str, layers: int) -> Any:
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=clip(), text_config=text_config(text, layers), image_token_index=IMAGE_ID,
            image_grid_pinpoints=CANVASES,
        )
    )  # fmt: skip


def _onevision(text: str, layers: int) -> Any:
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=siglip(), text_config=text_config(text, layers), image_token_index=IMAGE_ID,
            video_token_index=271, image_grid_pinpoints=MANY_CANVASES, vision_aspect_ratio="anyres_max_4",
        )
    )  # fmt: skip


def _internvl(text: str, layers: int) -> Any:
    vision = InternVLVisionConfig(
        **{**_TOWER, "image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]}, layer_scale_init_value=1.0
    )
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=vision, text_config=text_config(text, layers), image_token_id=IMAGE_ID, image_seq_length=4,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def _smolvlm(kind: Any, config: Any) -> Callable[[str, int], Any]:
    def build(text: str, layers: int) -> Any:
        return kind(
            config(
                vision_config=_TOWER, text_config=text_config(text, layers, 288), image_token_id=IMAGE_ID,
                scale_factor=2, pad_token_id=0, tie_word_embeddings=False,
            )
        )  # fmt: skip

    return build


def _vipllava(text: str, layers: int) -> Any:
    return VipLlavaForConditionalGeneration(
        VipLlavaConfig(
            vision_config=clip(), text_config=text_config(text, layers), image_token_index=IMAGE_ID,
            vision_feature_layers=[-2, -1, 0], image_seq_length=16,
        )
    )  # fmt: skip


def _siglip(strategy: str) -> Callable[[str, int], Any]:
    def build(text: str, layers: int) -> Any:
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=siglip(), text_config=text_config(text, layers), image_token_index=IMAGE_ID,
                vision_feature_layer=-1, vision_feature_select_strategy=strategy, image_seq_length=16,
            )
        )  # fmt: skip

    return build


def _save_next(folder: Path) -> None:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=CANVASES
    )
    LlavaNextProcessor(
        image_processor=images, tokenizer=byte_tokenizer("<image>", "</s>"), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=NEXT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


def _save_parts(folder: Path, tokenizer: PreTrainedTokenizerFast, images: Any, template: str, settings: Any) -> None:
    """As older repositories on the hub: a template beside a tokenizer that has one for text alone."""
    tokenizer.save_pretrained(folder)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    written["chat_template"] = "{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    images.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "processor_config.json").write_text(json.dumps(settings))


def _save_onevision(folder: Path) -> None:
    images = LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_grid_pinpoints=MANY_CANVASES
    )  # fmt: skip
    settings = {
        "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": SIDE**2, "image_token": "<image>",
        "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_4",
    }  # fmt: skip
    _save_parts(folder, byte_tokenizer("<image>", "<|im_end|>"), images, ONEVISION_TEMPLATE, settings)


def _save_internvl(folder: Path) -> None:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    images = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=6)
    settings = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    tokenizer = byte_tokenizer("<IMG_CONTEXT>", "<|im_end|>", **named)
    _save_parts(folder, tokenizer, images, INTERNVL_TEMPLATE, settings)


def _save_smolvlm(kind: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        images = {"SmolVLM": SmolVLMImageProcessorPil, "Idefics3": Idefics3ImageProcessorPil}[kind](
            size={"longest_edge": 3 * TILE}, max_image_size={"longest_edge": TILE}
        )
        named = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
        named |= {"end_of_utterance_token": "<end_of_utterance>"}
        rows = {f"row_{r}_{c}": f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)}
        settings = {"processor_class": f"{kind}Processor", "image_seq_len": 4}
        tokenizer = byte_tokenizer("<image>", "<end_of_utterance>", **named, **rows)
        _save_parts(folder, tokenizer, images, SMOLVLM_TEMPLATE, settings)

    return save


def _save_vipllava(folder: Path) -> None:
    images = CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
    LlavaProcessor(
        image_processor=images, tokenizer=byte_tokenizer("<image>", "</s>"), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


def _save_siglip(strategy: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        LlavaProcessor(
            image_processor=SiglipImageProcessorPil(size={"height": TILE, "width": TILE}),
            tokenizer=byte_tokenizer("<image>", "</s>"), patch_size=PATCH, vision_feature_select_strategy=strategy,
            num_additional_image_tokens=0, chat_template=LLAVA_TEMPLATE,
        ).save_pretrained(folder)  # fmt: skip

    return save


@dataclass(frozen=True)
class Tiny:
    """A family's tiny model.

    Attributes:
        family: Name of the family.
        make: Of a decoder's kind and number of layers, with random weights that are still to be drawn anew.
        save: Writes its processor.
        texts: Kinds of decoder, the usual one first.
        tower: Name of the vision tower within the inner model.
        projector: That of the projector.
        decoder: That of the text decoder.
    """

    family: str
    make: Callable[[str, int], Any]
    save: Callable[[Path], None]
    texts: tuple[str, ...]
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    decoder: str = "language_model"

    def model(self, text: str | None = None, layers: int = 6, attn: str = "sdpa") -> Any:
        """Random weights, fp32, evaluation mode; generation does not stop by chance."""
        torch.manual_seed(0)
        model = self.make(text or self.texts[0], layers)
        with torch.no_grad():  # towers start nearly blind: position embeddings of zeros, weights of 0.02
            for name in (self.tower, self.projector):
                for parameter in model.model.get_submodule(name).parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.set_attn_implementation(attn)
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
        return model.eval()

    def folder(self, folder: Path, layers: int = 6) -> str:
        """Model and processor on disk."""
        self.model(layers=layers).save_pretrained(folder)
        self.save(folder)
        return str(folder)


_SMOLVLM_PARTS = ("vision_model", "connector", "text_model")
TILED = {
    "llava_next": Tiny("llava_next", _next, _save_next, ("mistral", "llama")),
    "llava_onevision": Tiny("llava_onevision", _onevision, _save_onevision, ("qwen2",)),
    "internvl": Tiny("internvl", _internvl, _save_internvl, ("qwen2", "qwen3", "llama")),
    "smolvlm": Tiny(
        "smolvlm",
        _smolvlm(SmolVLMForConditionalGeneration, SmolVLMConfig),
        _save_smolvlm("SmolVLM"),
        ("llama",),
        *_SMOLVLM_PARTS,
    ),
    "idefics3": Tiny(
        "smolvlm",
        _smolvlm(Idefics3ForConditionalGeneration, Idefics3Config),
        _save_smolvlm("Idefics3"),
        ("llama",),
        *_SMOLVLM_PARTS,
    ),
}
PLAIN = {
    "vipllava": Tiny("llava", _vipllava, _save_vipllava, ("llama",)),
    "siglip-full": Tiny("llava", _siglip("full"), _save_siglip("full"), ("llama",)),
    "siglip-default": Tiny("llava", _siglip("default"), _save_siglip("default"), ("llama",)),
}
EVERY = {**TILED, **PLAIN}
