"""The two models whose steps are run to check the plan: the embedded LLaVA, and one of 100 million parameters."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from himap_train.models.foresight import make_scorers
from himap_train.models.install import install_pruning
from himap_train.models.loading import EMBEDDED, load_config, load_llava, resolve_model
from himap_train.models.stock import text_decoder
from himap_train.models.training_cost import tokens_of_image
from himap_train.models.versions import checkpoint_activations
from himap_train.planning.quantities import Batch
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.module import LlavaFineTuner, weights_dtype


@dataclass(frozen=True)
class Case:
    """A model and the batch that it takes.

    Attributes:
        name: For the table.
        config: Configuration of the LLaVA.
        path: Where its weights are; None for random ones.
        tuner: How it is trained.
        rows: Number of rows in the batch.
        text_tokens: Text tokens of a row.
        supervised: Supervised tokens of a row.
    """

    name: str
    config: LlavaConfig
    path: str | None
    tuner: LlavaFineTuner
    rows: int
    text_tokens: int
    supervised: int

    @property
    def batch(self) -> Batch:
        """As the plan sees it."""
        return Batch(self.rows, tokens_of_image(self.config), self.text_tokens, self.supervised)


def embedded_case() -> Case:
    """The LLaVA in this package."""
    tuner = LlavaFineTuner(EMBEDDED, lora_r=32, lora_alpha=64, lora_dropout=0.0)
    return Case("embedded", load_config(resolve_model(EMBEDDED)), EMBEDDED, tuner, 8, 40, 8)


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
    return Case("100M", config, None, tuner, 2, 115, 60)


def build_model(case: Case, schedule: PruningSchedule, checkpointing: bool, precision: str) -> nn.Module:
    """As `LlavaFineTuner` sets it up, on weights or random ones."""
    torch.manual_seed(0)
    if case.path is None:
        base: Any = LlavaForConditionalGeneration(deepcopy(case.config))
        base.to(dtype=weights_dtype(precision))
    else:
        base = load_llava(case.path, dtype=weights_dtype(precision))[0]
    model = case.tuner.attach(base)
    if checkpointing:
        decoder: Any = text_decoder(model)
        checkpoint_activations(decoder)
    make_scorers(model, schedule)
    # Plans are for kernels that keep no attention weights.
    return install_pruning(model, schedule, cpu_blocks=False).train()


def inputs_of(case: Case) -> dict[str, Any]:
    """Rows of one image, a prompt and an answer, all of one length."""
    config: Any = case.config
    batch, image_id = case.batch, config.image_token_id
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(image_id + 1, config.text_config.vocab_size, (batch.rows, batch.length), generator=generator)
    ids[:, 1 : 1 + batch.image_tokens] = image_id
    labels = ids.clone()
    labels[:, : -batch.supervised] = -100
    size = config.vision_config.image_size
    pixels = torch.randn(batch.rows, 3, size, size, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "images": {"pixel_values": pixels},
    }
