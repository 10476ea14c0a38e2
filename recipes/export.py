"""Write a trained checkpoint in a form that others load. Needs neither a GPU nor DeepSpeed, and memory for one tensor.

python recipes/export.py --checkpoint runs/mine --output exported/mine                     # merged Hugging Face folder
python recipes/export.py --checkpoint runs/mine --output exported/adapter --format adapter # PEFT adapter and schedule
python recipes/export.py --checkpoint runs/mine --weights best --dtype bfloat16 --output exported/best
python recipes/export.py --checkpoint runs/mine/checkpoints/last.ckpt --output exported/last    # while the run goes on
python recipes/export.py --checkpoint exported/mine --output half --dtype float16 --push-to-hub me/half --private
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import sys
from pathlib import Path
from typing import Literal

from himap_train.checkpoints.agreement import check_agreement
from himap_train.checkpoints.export import ExportDtype, export_adapter, export_merged
from himap_train.checkpoints.hub import push_to_hub as push
from himap_train.checkpoints.hub import require_hub
from himap_train.checkpoints.source import Weights, adapter_source
from himap_train.command_line import run_command


def main(
    checkpoint: str,
    output: Path,
    format: Literal["merged", "adapter"] = "merged",
    weights: Weights = "adapter",
    base: str | None = None,
    dtype: ExportDtype = "as-base",
    max_shard_size: str = "5GB",
    push_to_hub: str | None = None,
    private: bool = False,
    no_check: bool = False,
) -> None:
    """Export, then load what was written in a fresh process and compare its logits, pruned and dense.

    Args:
        checkpoint: A run folder, an adapter folder, a training checkpoint (a file), or a merged model, which is written
            anew in another dtype or other shards.
        output: A folder that is not there yet or empty.
        format: "merged" is an ordinary LLaVA with the schedule in config.json; "adapter" is small and needs its base.
        weights: Those to take from a run folder: the "adapter" that it kept, its "last" or "best" training checkpoint.
        base: The base model, where it is not at the place that the adapter recorded.
        dtype: Dtype of the merged weights; "as-base" is that of the base model.
        max_shard_size: Merged weights beyond this size go into several files.
        push_to_hub: Upload the folder to this repository (owner/name) when all is well.
        private: Make the repository private if it is new.
        no_check: Do not load the models, where they do not fit into memory.
    """
    if push_to_hub:
        require_hub(push_to_hub)
    if format == "adapter" and dtype != "as-base":
        raise ValueError(f"dtype={dtype} is for --format merged; an adapter stays in the precision of its training")
    source = str(adapter_source(checkpoint, weights) or checkpoint)
    if format == "merged":
        export_merged(source, output, base=base, dtype=dtype, max_shard_size=max_shard_size)
    else:
        export_adapter(source, output, base=base)
    if no_check:
        print(f"wrote {output}; not checked against {source}")
    else:
        print(f"wrote {output}; checking it against {source} in a fresh process")
        print(check_agreement(source, output, base, fresh_process=True))
    if push_to_hub:
        print(f"uploaded to {push(output, push_to_hub, private)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
