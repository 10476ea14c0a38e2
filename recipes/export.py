"""Write a trained checkpoint in a form that others load.

python recipes/export.py --checkpoint runs/mine --output exported/mine                     # merged Hugging Face folder
python recipes/export.py --checkpoint runs/mine --output exported/adapter --format adapter # PEFT adapter and schedule
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from himap_train.agreement import check_agreement
from himap_train.checkpoint import copy_adapter, export_merged
from himap_train.evaluation.command_line import run_command


def main(
    checkpoint: str, output: Path, format: Literal["merged", "adapter"] = "merged", base: str | None = None
) -> None:
    """Export, then load what was written and compare its logits with the checkpoint's, pruned and dense.

    Args:
        checkpoint: A run folder, or its adapter folder.
        output: A folder that is not there yet or empty.
        format: "merged" is an ordinary LLaVA with the schedule in config.json; "adapter" is small and needs its base.
        base: The base model, where it is not at the place that the adapter recorded.
    """
    if format == "merged":
        export_merged(checkpoint, output, base=base)
    else:
        copy_adapter(checkpoint, output)
    print(f"wrote {output}; checking it against {checkpoint}")
    print(check_agreement(checkpoint, output, base))


if __name__ == "__main__":
    sys.exit(run_command(main))
