"""What the cost model says of models that nobody ran here. Every figure of this module is predicted, none measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from himap_train.benchmark.sizes import SIZES, model_config
from himap_train.models.training_cost import training_flops
from himap_train.pruning.cost import schedule_cost
from himap_train.pruning.reading import fit_preset
from himap_train.pruning.schedule import PruningSchedule

MODELS = {"llava-1.5-7b": 576, "llava-1.5-13b": 576, "llava-next-34b": 2880}
"""Image tokens of a sample by model."""
PRESETS = ("none", "himap", "himap-generation")
TEXT_TOKENS, ANSWER = 115, 40
GPUS = 8
SUSTAINED = 400e12
"""FLOP/s that one GPU is taken to sustain in training: about 40 % of an H100's 989e12 in bf16."""


@dataclass(frozen=True)
class Prediction:
    """One model under one schedule; training of LoRA with gradient checkpointing, cache in bf16.

    Attributes:
        model: Name of the size.
        schedule: Name of the preset.
        image_tokens: Image tokens of a sample.
        prefill_flops: FLOPs of the decoder, one sample.
        prefill_ratio: Against dense.
        step_flops: FLOPs of a training step with tower and projector, one sample.
        step_ratio: Against dense.
        samples_per_second: Rate of training on all GPUs.
        kv_bytes: Bytes of one sample's cache after the prefill.
    """

    model: str
    schedule: str
    image_tokens: int
    prefill_flops: float
    prefill_ratio: float
    step_flops: float
    step_ratio: float
    samples_per_second: float
    kv_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def predict() -> list[Prediction]:
    """All models under `PRESETS`."""
    return [_predict(model, preset, tokens) for model, tokens in MODELS.items() for preset in PRESETS]


def _predict(model: str, preset: str, image_tokens: int) -> Prediction:
    size = SIZES[model]
    config: Any = model_config(size, whole=True)
    schedule = fit_preset(PruningSchedule.from_preset(preset), size.layers)
    kv_width = size.kv_heads * size.width // size.heads
    # LoRA of rank r on a linear layer from a to b has r * (a + b) parameters.
    ends = 4 * size.width + 2 * (size.width + kv_width) + 3 * (size.width + size.mlp)
    lora = [size.lora_rank * ends] * size.layers

    def step(kind: PruningSchedule) -> float:
        return training_flops(
            kind,
            config,
            image_tokens,
            TEXT_TOKENS,
            lora_parameters=lora,
            supervised=ANSWER,
            images=image_tokens / 576,
            checkpointing=True,
            lm_head_passes=2,
        ).total

    pruned, dense = step(schedule), step(PruningSchedule())
    cost = schedule_cost(schedule, config, image_tokens, TEXT_TOKENS, bytes_per_value=2)
    return Prediction(
        model=model,
        schedule=preset,
        image_tokens=image_tokens,
        prefill_flops=cost.flops,
        prefill_ratio=cost.flops_ratio,
        step_flops=pruned,
        step_ratio=pruned / dense,
        samples_per_second=GPUS * SUSTAINED / pruned,
        kv_bytes=cost.kv_bytes,
    )
