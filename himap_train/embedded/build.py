"""Build an embedded LLaVA from nothing: tokenizer, processor and an untrained model of stock Hugging Face classes.

Only `recipes/train_embedded.py` and tests need this; everybody else loads the trained folder (`model.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from himap_train.embedded.model import embedded_folder

IMAGE_SIZE, PATCH_SIZE = 96, 8  # 144 tokens
WIDTH = 128
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that takes any text, with one token for each of `words` after a space.

    A capitalised word is one token also where no space stands before it, at the start of a turn. The merges of a word
    join its letters from left to right. Those of the spaced words come first: their pieces always start at the space,
    so no merge of another word can break into one; likewise at a capital letter.
    """
    words = ["USER", "ASSISTANT", *words]
    space = chr(0x120)  # stands for a space in byte-level vocabularies
    forms = [space + word for word in words] + [word for word in words if word[0].isupper()]
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: index for index, token in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for form in forms:
        for end in range(1, len(form)):
            if form[: end + 1] not in vocab:
                vocab[form[: end + 1]] = len(vocab)
                merges.append((form[:end], form[end]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(words: Iterable[str], image_size: int = IMAGE_SIZE, patch_size: int = PATCH_SIZE) -> LlavaProcessor:
    """LlavaProcessor for square images; by default 96x96, of 144 tokens.

    The chat template in the package is LLaVA-1.5's conversation, as llava-hf writes it; an answer ends with </s>, and
    owns the space before it as the tokenizer's words do.
    """
    size = {"height": image_size, "width": image_size}
    half = [0.5, 0.5, 0.5]
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size=size, do_center_crop=False, crop_size=size, image_mean=half, image_std=half
        ),
        tokenizer=build_tokenizer(words),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(embedded_folder("embedded") / "chat_template.jinja").read_text("utf-8"),
    )


def build_model(
    vocab_size: int, layers: int = 8, seed: int = 0, image_size: int = IMAGE_SIZE, patch_size: int = PATCH_SIZE
) -> LlavaForConditionalGeneration:
    """An untrained LLaVA, all 128 wide: CLIP tower of 5 layers, projector, Llama decoder of `layers` layers."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **shape,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=5,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=WIDTH,
        ),
        text_config=LlamaConfig(
            **shape,
            vocab_size=vocab_size,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=layers,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            initializer_range=0.05,  # 0.02 starts a decoder this narrow with almost no signal
            # turns slowly, so that content can match across a hundred image tokens
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2, do_sample=False)
    return model


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write the Hugging Face folder. Weights are stored in fp16, half the size, and load as the config's float32."""
    model.set_attn_implementation("sdpa")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    weights = load_file(out / "model.safetensors")
    save_file({name: w.half() for name, w in weights.items()}, out / "model.safetensors", metadata={"format": "pt"})
