"""Made the folders beside it with version 0.1: PYTHONPATH=tests python tests/data/checkpoint_v0_1/make.py

Do not run it again: the folders are here because later versions must load what this one wrote. A version that writes
another form gets a folder of its own, made by a copy of this script.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from export_toys import shaken
from safetensors.torch import save_file
from tiny import tiny_llava, tiny_processor
from training_toys import collate, sample

from himap_train import PruningSchedule, load_checkpoint, load_llava, record_pruning, remove_pruning
from himap_train.checkpoints.export import export_merged
from himap_train.checkpoints.load import save_adapter
from himap_train.models.lora import attach_lora

SCHEDULE = PruningSchedule.from_dict(
    {
        "stages": [
            {"layer": 1, "criterion": "instruction", "keep_ratio": 0.5},
            {"layer": 2, "criterion": "image", "keep_count": 3},
        ]
    }
)


def main() -> None:
    os.chdir(Path(__file__).parent)  # the adapter records the name of its base as it was given
    tiny_llava(layers=4, hidden=16).half().save_pretrained("base")
    tiny_processor().save_pretrained("base")
    model = shaken(attach_lora(load_llava("base")[0], r=2, alpha=4))
    save_adapter(model, "adapter", SCHEDULE, tiny_processor())
    export_merged("adapter", "merged")
    made = collate([sample(0), sample(1, answer=5)])
    inputs = {key: made[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    loaded = load_checkpoint("adapter", dtype="float32")[0]
    with torch.no_grad(), record_pruning(loaded) as trace:
        outputs = {"pruned": loaded(**inputs).logits}
    kept = {f"kept.{row}": columns for row, columns in enumerate(trace.kept[-1])}
    with torch.no_grad():
        outputs["dense"] = remove_pruning(loaded)(**inputs).logits
    save_file({**inputs, **outputs, **kept}, "expected.safetensors")


if __name__ == "__main__":
    main()
