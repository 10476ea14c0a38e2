"""A trained tiny model, and what it computes, for tests of what is written to disk."""

from __future__ import annotations

import torch
from peft import PeftModel
from training_toys import SCHEDULE, collate, sample

from himap_train.models.install import install_pruning
from himap_train.models.loading import load_llava
from himap_train.models.lora import attach_lora
from himap_train.pruning.reading import read_schedule
from himap_train.pruning.schedule import PruningSchedule

PRUNED = read_schedule(SCHEDULE)


def trained(path: str, projector: str = "train", schedule: PruningSchedule = PRUNED, **lora: object) -> PeftModel:
    """A model whose LoRA and projector are far from where they started."""
    torch.manual_seed(0)  # two calls give the same adapter, whatever ran before
    model = attach_lora(load_llava(path)[0], **{"r": 4, "alpha": 8, "projector": projector, **lora})  # type: ignore[arg-type]
    return install_pruning(shaken(model).eval(), schedule)


@torch.no_grad()
def shaken(model: PeftModel) -> PeftModel:
    """The same model, what is trained moved at random."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of two rows, an image in each."""
    batch = collate([sample(0), sample(1, answer=5)])
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], **batch["images"]).logits
