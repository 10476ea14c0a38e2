"""Models whose steps are run to check a plan: the embedded LLaVA, one of 100 million parameters, published shapes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from himap_train.models.families import family_of_config
from himap_train.models.foresight import make_scorers
from himap_train.models.install import install_pruning
from himap_train.models.loading import EMBEDDED, load_config, load_llava, resolve_model
from himap_train.models.published import find_config
from himap_train.models.stock import text_decoder
from himap_train.models.training_cost import tokens_of_image
from himap_train.models.versions import checkpoint_activations
from himap_train.planning.facts import Batch
from himap_train.planning.typical_sample import SUPERVISED, TEXT_TOKENS
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.module import LlavaFineTuner
from himap_train.training.precision import weights_dtype


@dataclass(frozen=True)
class Case:
    """A model and the batch that it takes.

    Attributes:
        name: For the table.
        config: Configuration of the model.
        path: Where its weights are; None for random ones.
        tuner: How it is trained.
        batch: What it takes.
    """

    name: str
    config: Any
    path: str | None
    tuner: LlavaFineTuner
    batch: Batch


def embedded_case() -> Case:
    """The LLaVA in this package."""
    tuner = LlavaFineTuner(EMBEDDED, lora_r=32, lora_alpha=64, lora_dropout=0.0)
    config = load_config(resolve_model(EMBEDDED))
    return Case("embedded", config, EMBEDDED, tuner, Batch(8, tokens_of_image(config), 40, 8))


def llava_100m_case() -> Case:
    """100 million random parameters."""
    vision = CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=2048, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-2)
    tuner = LlavaFineTuner(lora_r=16, lora_alpha=32, lora_dropout=0.05)
    return Case("100M", config, None, tuner, Batch(2, tokens_of_image(config), TEXT_TOKENS, SUPERVISED))


def published_case(name: str, rows: int, layers: int | None = None, dropout: float = 0.05) -> Case:
    """Random weights in the shape of a model: what `model.path` takes, or a name of `assets/configs` where no hub is;
    so many layers of its decoder instead of all, rows of the batch, and dropout of LoRA's inputs.
    """
    config, _ = find_config(name)
    if layers is not None:
        text = config.text_config
        text.num_hidden_layers = layers
        text.layer_types = getattr(text, "layer_types", None) and text.layer_types[:layers]
    batch = Batch(rows, tokens_of_image(config), TEXT_TOKENS, SUPERVISED)
    return Case(name, config, None, LlavaFineTuner(name, lora_dropout=dropout), batch)


def build_model(
    case: Case, schedule: PruningSchedule, checkpointing: bool, precision: str, device: torch.device | str = "cpu"
) -> nn.Module:
    """As `LlavaFineTuner` sets it up, on weights or random ones, which are made on the device."""
    torch.manual_seed(0)
    if case.path is None:
        with torch.device(device):
            base: Any = AutoModelForImageTextToText.from_config(
                deepcopy(case.config),
                dtype=weights_dtype(precision),
                attn_implementation=case.tuner.attn_implementation,
            )
    else:
        base = load_llava(case.path, dtype=weights_dtype(precision))[0].to(device)
    model = case.tuner.attach(base)
    if checkpointing:
        checkpoint_activations(text_decoder(model))
    make_scorers(model, schedule)
    # Plans are for kernels that keep no attention weights.
    return install_pruning(model, schedule, cpu_blocks=False).train()


def inputs_of(case: Case, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Rows of one image, a prompt and an answer, all of one length."""
    config: Any = case.config
    batch, image_id, vocabulary = case.batch, config.image_token_id, config.text_config.vocab_size
    generator = torch.Generator().manual_seed(0)
    first, end = (image_id + 2, vocabulary) if image_id < vocabulary // 2 else (5, image_id - 3)  # no special tokens
    ids = torch.randint(first, end, (batch.rows, batch.length), generator=generator)
    ids[:, 1 : 1 + batch.image_tokens] = image_id
    labels = ids.clone()
    labels[:, : -batch.supervised] = -100
    images = family_of_config(config).typical_images(config, batch.rows)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids, device=device),
        "labels": labels.to(device),
        "images": {name: values.to(device) for name, values in images.items()},
    }
