"""FLOPs of a training step, from the same layer formulas as the prefill's in `cost`.

A training step with LoRA (p parameters a layer) on frozen weights: the backward pass needs the gradient of every input
but of no frozen weight, so the layer's projections cost once their forward again, LoRA (`2 p t` forward) twice, the two
attention products four products, or five in a flash kernel, which makes its scores anew. Gradient checkpointing adds
one forward of the layers; the ranking is not repeated. Vision tower and projector are the family's; the tower runs
forward only, since it is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from himap_train.models.families import family_of_config
from himap_train.pruning.cost import (
    attention_flops,
    choosing_flops,
    head_width,
    image_tokens_per_layer,
    kv_width,
    linear_flops,
)
from himap_train.pruning.schedule import PruningSchedule

FLASH_BACKWARD = 2.5
"""A flash kernel's backward is five products to its forward's two."""


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of one sample in a training step.

    Attributes:
        forward: Decoder layers with LoRA and ranking.
        backward: The same layers backward.
        recompute: Their forward again, under gradient checkpointing.
        lm_head: Logits of the supervised positions, forward and backward.
        vision: Vision tower, forward.
        projector: Forward and backward.
    """

    forward: float
    backward: float
    recompute: float
    lm_head: float
    vision: float
    projector: float

    @property
    def decoder(self) -> float:
        """Decoder layers in the whole step."""
        return self.forward + self.backward + self.recompute

    @property
    def total(self) -> float:
        """The whole step."""
        return self.decoder + self.lm_head + self.vision + self.projector


def backward_of_attention(implementation: str) -> float:
    """Attention's backward in units of its forward: eager attention has its probabilities, a kernel makes them anew."""
    return 2 if implementation == "eager" else FLASH_BACKWARD


def training_flops(
    schedule: PruningSchedule,
    config: Any,
    image_tokens: int,
    text_tokens: int,
    *,
    lora_parameters: Sequence[int],
    supervised: float = 0,
    images: float = 1,
    trains_projector: bool = True,
    checkpointing: bool = False,
    ends_adapted: bool = True,
    lm_head_passes: int = 3,
    attention_backward: float = FLASH_BACKWARD,
    causal: bool = False,
) -> TrainingFlops:
    """FLOPs of one sample in a training step with LoRA; an upper bound where stages keep by attention mass.

    Args:
        schedule: What is removed where.
        config: Hugging Face configuration of the model.
        image_tokens: Image tokens of the sample.
        text_tokens: All other tokens.
        lora_parameters: Parameters of LoRA in each decoder layer.
        supervised: Positions whose logits are computed.
        images: That go through the vision tower.
        trains_projector: Whether its weights get gradients.
        checkpointing: Whether layers run again in the backward pass.
        ends_adapted: Whether layers end in LoRA, on `down_proj`. Else the second forward of checkpointing stops before
            that last product, which nothing needs.
        lm_head_passes: Forward and backward; 3 where the loss is computed in chunks and so its forward twice, else 2.
        attention_backward: Attention's backward in units of its forward: `FLASH_BACKWARD`, or 2 product by product.
        causal: Leave out the half of attention that is masked.
    """
    text, family = config.text_config, family_of_config(config)
    of_image = round(image_tokens / images) if images else 0
    first, others = family.projector_flops(config, of_image)
    schedule.validate_for(text.num_hidden_layers)
    layers = image_tokens_per_layer(schedule, text.num_hidden_layers, image_tokens)
    forward = backward = last = 0.0
    for count, parameters in zip(layers, lora_parameters, strict=True):
        tokens = count + text_tokens
        linear, attention = linear_flops(text, tokens), attention_flops(text, tokens, causal)
        lora = 2.0 * parameters * tokens
        forward += linear + attention + lora
        backward += linear + 2 * lora + attention_backward * attention
        last += 2.0 * tokens * text.hidden_size * text.intermediate_size
    if not trains_projector and not checkpointing:  # nothing before the first layer needs a gradient
        widths = text.num_attention_heads * head_width(text) + 2 * kv_width(text)
        backward -= 2.0 * (image_tokens + text_tokens) * text.hidden_size * widths
    ranking = choosing_flops(schedule, text, layers, image_tokens, text_tokens)
    return TrainingFlops(
        forward=forward + ranking,
        backward=backward,
        recompute=(forward - (0.0 if ends_adapted else last)) if checkpointing else 0.0,
        lm_head=lm_head_passes * 2.0 * supervised * text.hidden_size * text.vocab_size,
        vision=images * family.vision_flops(config, of_image),
        projector=images * (2 * first + 3 * others if trains_projector else first + others),
    )


def tokens_of_image(config: Any) -> int:
    """Image tokens of a typical image, from a model's config alone."""
    return family_of_config(config).tokens_of_config(config)
