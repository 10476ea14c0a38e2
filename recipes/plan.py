"""What a fine-tuning run will take, before a machine is rented: no weights are loaded, no GPU is needed.

python recipes/plan.py --config configs/llava_himap.yaml --trainer.devices 8 --effective-batch 128 --gpu-memory 80
python recipes/plan.py --config configs/llava_himap.yaml --tflops 250 --records 665000 --gpu-price 2.5   # hours, cost
python recipes/plan.py --config configs/quickstart.yaml --measured   # hours, after a few real steps on this machine
python recipes/plan.py --config configs/llava_himap.yaml --config configs/llava_13b_himap.yaml --text-tokens 300
python recipes/plan.py --verify                      # runs two small models: predicted, measured, error
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import sys
from collections.abc import Sequence
from pathlib import Path

from himap_train.command_line import USER_ERRORS
from himap_train.evaluation.tables import write_json
from himap_train.planning.plan_cli import PlanCLI
from himap_train.planning.plan_tables import print_plan
from himap_train.planning.verify import markdown_table, verify


def run(cli: PlanCLI) -> None:
    """Print a plan or, with --verify, how good plans are."""
    if cli.config.verify:
        print(markdown_table(verify()), end="")
        return
    plan = cli.plan()
    print_plan(plan)
    if cli.config.json:
        write_json(Path(cli.config.json), plan.to_dict())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 after an error that the user can mend."""
    try:
        run(PlanCLI(argv))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
