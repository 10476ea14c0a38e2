"""Whether an exported model computes what the checkpoint computes that it was made from."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from himap_train.checkpoint import load_checkpoint
from himap_train.data.encode import encode_prompt
from himap_train.data.records import Conversation, Turn
from himap_train.models.llava import pruning_of, record_pruning

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits over their largest size: merging rounds, the more the fewer bits the weights have."""


@dataclass(frozen=True)
class Agreement:
    """Largest difference of logits, relative to the largest logit; `same_kept`: every stage keeps the same tokens."""

    dense: float
    pruned: float
    same_kept: bool
    tolerance: float

    def __str__(self) -> str:
        kept = "the same image tokens kept" if self.same_kept else "other image tokens kept where scores nearly tie"
        return f"logits differ by {self.dense:.1e} dense and {self.pruned:.1e} pruned ({kept})"


def check_agreement(first: Path | str, second: Path | str, base: str | None = None) -> Agreement:
    """Load two checkpoints from disk, one after the other, and compare their logits on an image and a question.

    Raises:
        ValueError: They differ by more than rounding.
    """
    dtype, dense, pruned, kept = _outputs(first, base)
    _, other_dense, other_pruned, other_kept = _outputs(second, None)
    same_kept = kept == other_kept
    result = Agreement(_gap(dense, other_dense), _gap(pruned, other_pruned), same_kept, TOLERANCE[dtype])
    if result.dense > result.tolerance or (same_kept and result.pruned > result.tolerance):
        raise ValueError(
            f"{second} does not compute what {first} computes: {result}, at most {result.tolerance} expected"
        )
    return result


@torch.no_grad()
def _outputs(path: Path | str, base: str | None) -> tuple[torch.dtype, Tensor, Tensor, list[Any]]:
    """Weights' dtype, logits dense and pruned, and the kept columns of each stage."""
    model, processor = load_checkpoint(path, None, base=base)
    inputs = _example(processor)
    dense = model(**inputs).logits.float()
    del model
    gc.collect()  # two 13B models may not fit side by side
    module: nn.Module
    module, _ = load_checkpoint(path, base=base)
    pruning = pruning_of(module)
    if pruning is None or not pruning.schedule.stages:
        return next(module.parameters()).dtype, dense, dense, []
    with record_pruning(module) as trace:
        pruned = module(**inputs).logits.float()
    kept = [[row.tolist() for row in stage] for stage in trace.kept]
    return next(module.parameters()).dtype, dense, pruned, kept


def _example(processor: Any) -> dict[str, Tensor]:
    """A noise image and a question, as a batch of one."""
    noise = torch.randint(0, 256, (336, 336, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    question = Turn("user", "<image>\nWhat is in the picture?")
    sample = encode_prompt(Conversation("example", (Image.fromarray(noise.numpy()),), (question,)), processor)
    ids = sample["input_ids"][None]
    pixels = sample["pixel_values"]
    assert pixels is not None
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())
