"""What FLOPs and memory depend on, read from the model on the meta device: the real classes, with shapes and no bytes.

LoRA is attached by the function that training uses, so what is counted is what will be trained. Beside it stand the
size of numbers and of batches, and what a memory plan gives.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from himap_train.models.families import family_of
from himap_train.models.lora import parameter_group
from himap_train.models.stock import base_model
from himap_train.training.module import LlavaFineTuner


@dataclass(frozen=True)
class Numerics:
    """Bytes of an element.

    Attributes:
        element: Frozen weights and activations.
        trained: Trained weights, their gradients and optimizer moments.
        mixed: Whether autocast is on.
        mask: Dropout's mask: 1 in a CUDA kernel; on a CPU it is a tensor of the input's dtype.
    """

    element: int
    trained: int
    mixed: bool
    mask: int = 1

    @classmethod
    def of(cls, precision: str, on_cpu: bool = False) -> Numerics:
        """For one of Lightning's precisions."""
        half, mixed = precision.split("-")[0] in ("16", "bf16"), precision.endswith("-mixed")
        trained = 2 if half and not mixed else 4
        return cls(2 if half else 4, trained, mixed, trained if on_cpu else 1)


@dataclass(frozen=True)
class Batch:
    """One device's micro-batch, its rows all alike.

    Attributes:
        rows: Conversations.
        image_tokens: Image tokens of a row.
        text_tokens: Text tokens of a row.
        supervised: Positions of a row with something to predict.
        images: Images of a row.
    """

    rows: int
    image_tokens: int
    text_tokens: int
    supervised: int
    images: int = 1

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.image_tokens + self.text_tokens


@dataclass(frozen=True)
class Activations:
    """Bytes of one step on one device.

    Attributes:
        saved: Kept by autograd when the forward pass ends.
        logits: Logits of a chunk, their fp32 softmax and gradient.
        working: Temporaries of a layer's backward pass, the layer computed again included.
        ranking: Temporaries of the largest ranking.
        peak: The most at any moment.
        moment: When that is.
    """

    saved: int
    logits: int
    working: int
    ranking: int
    peak: int
    moment: str


@dataclass(frozen=True)
class LayerLora:
    """LoRA in one decoder layer.

    Attributes:
        parameters: Number of them.
        rank: Rank.
        inputs: Input width of each adapted linear layer, by its name: {"q_proj": 4096, ...}.
    """

    parameters: int
    rank: int
    inputs: dict[str, int]


@dataclass(frozen=True)
class ModelFacts:
    """A model with its adapter, in numbers.

    Attributes:
        config: Configuration of the model.
        parts: (all, trained) parameters of each part, without the frozen original of a trained copy.
        frozen: Frozen parameters in memory, that original included.
        quantisable: Those of them in linear layers of the decoder's layers, which QLoRA stores in few bits.
        trained: Trained parameters.
        largest_linear: Weights of the decoder's largest linear layer.
        lora: LoRA of each decoder layer.
        dropout: Dropout of LoRA's inputs.
        trains_projector: Whether the projector has gradients, as a copy or through LoRA.
    """

    config: Any
    parts: dict[str, tuple[int, int]]
    frozen: int
    quantisable: int
    trained: int
    largest_linear: int
    lora: tuple[LayerLora, ...]
    dropout: float
    trains_projector: bool

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.lora)

    @property
    def ends_adapted(self) -> bool:
        """Whether every decoder layer ends in LoRA."""
        return all("down_proj" in layer.inputs for layer in self.lora)


def model_facts(config: Any, tuner: LlavaFineTuner) -> ModelFacts:
    """Build the model without weights, attach LoRA as the tuner does, and count.

    Raises:
        ValueError: The LoRA targets do not fit the model.
    """
    with torch.device("meta"):
        model = tuner.attach(AutoModelForImageTextToText.from_config(config))
    return count(model, tuner.lora_dropout)


def count(model: nn.Module, dropout: float) -> ModelFacts:
    """The numbers of a LLaVA with LoRA, on the meta device or a real one; dropout is that of LoRA's inputs."""
    base = base_model(model)
    family = family_of(base)
    parts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    frozen = trained = 0
    for name, parameter in model.named_parameters():
        trained += parameter.numel() if parameter.requires_grad else 0
        frozen += 0 if parameter.requires_grad else parameter.numel()
        if ".original_module." not in name:
            part = parts["lm_head" if ".lm_head." in name and "lora_" not in name else parameter_group(name, family)]
            part[0] += parameter.numel()
            part[1] += parameter.numel() if parameter.requires_grad else 0
    decoder = family.decoder(base)
    linear = [m.weight.numel() for m in decoder.layers.modules() if isinstance(m, nn.Linear) and not _trained(m)]
    return ModelFacts(
        config=base.config,
        parts={name: (both[0], both[1]) for name, both in sorted(parts.items())},
        frozen=frozen,
        quantisable=sum(linear),
        trained=trained,
        largest_linear=max(linear),
        lora=tuple(_layer_lora(layer) for layer in decoder.layers),
        dropout=dropout,
        trains_projector=any(
            p.requires_grad for name in family.projector_names for p in base.get_submodule(name).parameters()
        ),
    )


def _trained(module: nn.Linear) -> bool:
    return module.weight.requires_grad


def _layer_lora(layer: nn.Module) -> LayerLora:
    adapted: dict[str, Any] = {
        name.rsplit(".", 1)[-1]: module for name, module in layer.named_modules() if hasattr(module, "lora_A")
    }
    ranks = [next(iter(module.lora_A.values())).out_features for module in adapted.values()]
    return LayerLora(
        parameters=sum(p.numel() for name, p in layer.named_parameters() if "lora_" in name),
        rank=max(ranks, default=0),
        inputs={name: module.in_features for name, module in adapted.items()},
    )
