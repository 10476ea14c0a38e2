"""Plans, and small LLaVAs with LoRA and batches of equal rows to compare them with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny import TEXT_CONFIGS
from torch import nn
from training_toys import run_main
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from himap_train import PruningSchedule, install_pruning
from himap_train.models.lora import attach_lora
from himap_train.models.stock import base_model
from himap_train.models.versions import checkpoint_activations
from himap_train.planning.facts import Batch

BATCH = Batch(rows=2, image_tokens=64, text_tokens=36, supervised=7)


def toy_config(text: str = "llama", kv_heads: int = 4, attn: str = "sdpa") -> LlavaConfig:
    """Wide enough that matrix products and token vectors are what costs."""
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    decoder = TEXT_CONFIGS[text](
        vocab_size=264, hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=kv_heads, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=decoder, image_token_id=4, vision_feature_layer=-2)
    config._attn_implementation = attn
    return config


def toy_model(
    config: LlavaConfig,
    schedule: PruningSchedule,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    **lora: Any,
) -> nn.Module:
    """In training mode, pruned, with LoRA."""
    torch.manual_seed(0)
    base = LlavaForConditionalGeneration(config).to(dtype)
    model = attach_lora(base, **{"r": 4, "alpha": 8, **lora})
    if checkpointing:
        checkpoint_activations(base_model(model).model.language_model)
    return install_pruning(model, schedule, cpu_blocks=False).train()


def toy_batch(size: int = 32) -> dict[str, Any]:
    """`BATCH` as tensors."""
    ids = torch.randint(5, 260, (BATCH.rows, BATCH.length), generator=torch.Generator().manual_seed(0))
    ids[:, 1 : 1 + BATCH.image_tokens] = 4
    labels = ids.clone()
    labels[:, : -BATCH.supervised] = -100
    pixels = torch.ones(BATCH.rows, 3, size, size)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "images": {"pixel_values": pixels},
    }


def planned(tmp_path: Path, *options: str) -> dict[str, Any]:
    file = tmp_path / "plan.json"
    assert run_main("plan", *options, "--json", str(file)) == 0
    return json.loads(file.read_text())
