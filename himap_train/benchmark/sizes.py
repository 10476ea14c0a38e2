"""Decoders of LLaVA's proportions by name, with random weights: what is measured here depends on shapes alone.

Of the vision tower only `whole` models have a real one; otherwise image features are handed to the decoder as they are,
and a tower that never runs stands in for it, so that no time or memory of a tower is in the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from himap_train.embedded.build import build_processor
from himap_train.pruning.names import nearest

IMAGE_ID = 4
_IMAGE_SIZE, _PATCH = 336, 14
TOKENS_PER_IMAGE = (_IMAGE_SIZE // _PATCH) ** 2
"""576, of a 336-pixel image in 14-pixel patches."""


@dataclass(frozen=True)
class Size:
    """Shape of a model.

    Attributes:
        width: Hidden size of the decoder.
        mlp: Width of its gated MLP.
        layers: Its layers.
        heads: Query heads.
        kv_heads: Key-value heads.
        vocabulary: Tokens of `lm_head`.
        lora_rank: Rank of LoRA on all linear layers of the decoder.
        tower_width: Hidden size of the vision tower.
        tower_layers: Its layers.
    """

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    lora_rank: int
    tower_width: int
    tower_layers: int


SIZES: dict[str, Size] = {
    "tiny": Size(64, 172, 4, 4, 4, 264, 4, 32, 2),  # seconds: for tests, and to see what the output looks like
    "laptop": Size(512, 1376, 12, 8, 8, 4008, 16, 128, 9),
    "100m": Size(768, 2064, 12, 12, 12, 6012, 24, 192, 9),
    "llava-1.5-7b": Size(4096, 11008, 32, 32, 32, 32064, 128, 1024, 24),
    "llava-1.5-13b": Size(5120, 13824, 40, 40, 40, 32064, 128, 1024, 24),
    "llava-next-34b": Size(7168, 20480, 60, 56, 8, 64064, 128, 1024, 24),
}


def find_size(name: str, layers: int | None = None) -> Size:
    """A size by its name, with another depth where `layers` is given.

    Raises:
        ValueError: There is no such size.
    """
    if name not in SIZES:
        raise ValueError(f"size {name!r} is unknown{nearest(name, tuple(SIZES))}")
    return SIZES[name] if layers is None else replace(SIZES[name], layers=layers)


def model_config(size: Size, whole: bool = False) -> LlavaConfig:
    """The Hugging Face configuration of a size; `whole` gives it a vision tower in proportion."""
    width, layers = (size.tower_width, size.tower_layers) if whole else (8, 1)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        image_size=336,
        patch_size=14,
        projection_dim=width,
    )
    text = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=32768,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-2 if whole else -1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def build_model(
    size: Size,
    *,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str = "sdpa",
) -> LlavaForConditionalGeneration:
    """A model with random weights, in evaluation mode, made on its device; a `whole` one has a tower worth timing.

    Raises:
        ValueError: The attention kernel is not installed, or unknown.
    """
    config: Any = model_config(size, whole)
    try:
        with torch.device(device):
            model: Any = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    except ImportError as error:
        raise ValueError(f"attention {attention!r}: {error}") from error
    model.generation_config.update(pad_token_id=0, eos_token_id=None, do_sample=False)  # never stops early
    return model.eval()


def save_whole(folder: Path, size: Size, words: Sequence[str] = (), **made: Any) -> None:
    """Save a whole model of `build_model`, and a processor of these words, each of whose tokens it has a row for."""
    processor = build_processor(words, _IMAGE_SIZE, _PATCH)
    size = replace(size, vocabulary=max(size.vocabulary, len(processor.tokenizer)))
    build_model(size, whole=True, **made).save_pretrained(folder)
    processor.save_pretrained(folder)
