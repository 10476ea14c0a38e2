"""Random Qwen2-VL, Qwen2.5-VL and Qwen3-VL of the stock classes with their processors' files, and ragged batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip
IMAGE_ID, VIDEO_ID = 5, 6
PATCH, MERGE, VALUES = 4, 2, 3 * 2 * 4 * 4
# As Qwen2-VL and Qwen2.5-VL ship it, without the branches for numbered pictures and for videos.
QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_TEMPLATE = (  # no system prompt of its own
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def config_of(kind: str, layers: int = 6) -> Any:
    """Configuration of a small model; head width 12, six frequencies, two for each axis."""
    text = {
        "vocab_size": 264, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 2]},
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
        "initializer_range": 0.3,
    }  # fmt: skip
    tokens = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, "vision_start_token_id": 3,
              "vision_end_token_id": 4}  # fmt: skip
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 16, "mlp_ratio": 2, "hidden_size": 48}
        return Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    if kind == "qwen2_5_vl":  # windows of 2x2 tokens
        vision |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 48, "window_size": 16,
                   "fullatt_block_indexes": [1]}  # fmt: skip
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    vision |= {"depth": 4, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 48,
               "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 2]}  # fmt: skip
    text |= {"head_dim": 12}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)


def tiny_qwen(kind: str, layers: int = 6, attn: str = "sdpa", seed: int = 0) -> Any:
    """Random weights, fp32, eval mode."""
    torch.manual_seed(seed)
    config = config_of(kind, layers)
    config._attn_implementation = attn
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # random weights: do not stop by chance
    return model


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the family's special tokens: 263 ids."""
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def save_qwen(folder: Path, kind: str, **kwargs: Any) -> str:
    """A checkpoint as the hub has it: the processor's settings and template in files of their own."""
    tiny_qwen(kind, **kwargs).save_pretrained(folder)
    qwen_tokenizer().save_pretrained(folder)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor", "patch_size": PATCH,
        "merge_size": MERGE, "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "min_pixels": 8 * 8 * 4, "max_pixels": 8 * 8 * 24,
    }  # fmt: skip
    if kind == "qwen3_vl":
        settings["size"] = {"shortest_edge": settings.pop("min_pixels"), "longest_edge": settings.pop("max_pixels")}
        settings["image_processor_type"] = "Qwen2VLImageProcessorFast"
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    template = QWEN3_TEMPLATE if kind == "qwen3_vl" else QWEN2_TEMPLATE
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return str(folder)


RAGGED = ("t3 i3x4 t4", "t9", "t2 i2x2 t3 i4x2 t5", "i1x5 t1", "t5 i3x3")
RAGGED_ANSWERS = ("t3 i3x4 t4 a3", "t5 a4", "t2 i2x2 t3 i4x2 t5 a1", "i1x5 t1 a6 t2", "t5 i3x3 a2")


@dataclass
class QwenCase:
    """A padded batch of rows written as strings: "t3 i3x4 t4 a2" is text, an image of 3x4 tokens, text, an answer."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixels: list[Tensor]
    grids: list[tuple[int, int]]  # tokens down and across
    images_of: list[int]  # of each row

    def images(self) -> dict[str, Tensor]:
        """Images by the keywords of the forward."""
        if not self.pixels:
            return {}
        grid = [[1, rows * MERGE, columns * MERGE] for rows, columns in self.grids]
        return {"pixel_values": torch.cat(self.pixels), "image_grid_thw": torch.tensor(grid)}

    def inputs(self, labels: bool = False) -> dict[str, Any]:
        """Keyword arguments of the model."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.images()}
        if self.pixels:
            given["mm_token_type_ids"] = (self.input_ids == IMAGE_ID).int()
        return given | ({"labels": self.labels} if labels else {})

    def columns(self, row: int) -> Tensor:
        """Columns of a row that are not padding."""
        return self.attention_mask[row].nonzero()[:, 0]

    def own(self, row: int) -> slice:
        """Images of a row."""
        start = sum(self.images_of[:row])
        return slice(start, start + self.images_of[row])


def make_case(rows: tuple[str, ...] | list[str], side: str = "right", seed: int = 0, dtype: Any = None) -> QwenCase:
    """The content of row `b` depends on `seed + b` only, so that it can be made alone."""
    ids, labels, pixels, grids, images_of = [], [], [], [], []
    for number, spec in enumerate(rows):
        draws = {kind: torch.Generator().manual_seed(1000 * (seed + number) + i) for i, kind in enumerate("tia")}
        row: list[Tensor] = []
        targets: list[Tensor] = []
        before = len(grids)
        for segment in spec.split():
            kind = segment[0]
            if kind == "i":
                down, across = map(int, segment[1:].split("x"))
                grids.append((down, across))
                pixels.append(torch.randn(down * across * MERGE**2, VALUES, generator=draws[kind], dtype=dtype))
                row.append(torch.full((down * across,), IMAGE_ID))
            else:
                row.append(torch.randint(7, 263, (int(segment[1:]),), generator=draws[kind]))
            targets.append(row[-1] if kind == "a" else torch.full_like(row[-1], -100))
        images_of.append(len(grids) - before)
        ids.append(torch.cat(row))
        labels.append(torch.cat(targets))
    length = max(map(len, ids))

    def padded(values: list[Tensor], fill: int) -> Tensor:
        gaps = [(length - len(v), 0) if side == "left" else (0, length - len(v)) for v in values]
        return torch.stack([pad(v, gap, value=fill) for v, gap in zip(values, gaps, strict=True)])

    mask = padded([torch.ones_like(row) for row in ids], 0)
    return QwenCase(padded(ids, 0), mask, padded(labels, -100), pixels, grids, images_of)
