"""Qwen3-VL: as Qwen2-VL, and features of the tower's inner layers are added behind the decoder's first (DeepStack)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from himap_train.models.families.positions import LayerInputs, Positions
from himap_train.models.families.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Qwen3-VL (arXiv 2511.21631), dense decoders."""

    name: ClassVar[str] = "qwen3_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    decoder_types: ClassVar[tuple[str, ...]] = ("qwen3_vl_text",)
    # Three mergers for DeepStack in all published sizes. PEFT copies modules, not a list of them.
    projector_names: ClassVar[tuple[str, ...]] = (
        "model.visual.merger",
        *(f"model.visual.deepstack_merger_list.{number}" for number in range(3)),
    )
    weight_renames: ClassVar[tuple[tuple[str, str], ...]] = ()

    def _uncounted(self, numbers: Tensor) -> Positions:
        return Positions(numbers.expand(3, -1, -1), numbers)

    def layer_inputs(self, options: dict[str, Any]) -> LayerInputs | None:
        """`deepstack_visual_embeds`, a plane (image tokens of the batch, D) for each of the first layers."""
        where, planes = options.pop("visual_pos_masks", None), options.pop("deepstack_visual_embeds", None)
        if planes is None:
            return None
        if where is None:
            raise ValueError("deepstack_visual_embeds without visual_pos_masks: pass (B, S) bool, where they belong")
        return LayerInputs(tuple(_placed(plane, where) for plane in planes), where)


def _placed(plane: Tensor, where: Tensor) -> Tensor:
    """(N, D) at the N places of `where` (B, S), zero elsewhere: (B, S, D)."""
    where = where.to(plane.device)
    return plane.new_zeros(*where.shape, plane.shape[-1]).masked_scatter(where.unsqueeze(2), plane)
