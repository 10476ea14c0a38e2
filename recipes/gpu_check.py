"""What no CPU can show, in ten minutes on a CUDA GPU: one table for the README; exit status 1 if an equality fails.

python recipes/gpu_check.py                  # kernels, memory against plan.py, training steps, generate, QLoRA
python recipes/gpu_check.py --devices 8      # ZeRO-2 and ZeRO-3 instead: speed, memory, the losses of both

Weights are random, in the shapes of the models: nothing is downloaded. What is not installed or does not fit is a row.
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from himap_train.benchmark.benchmark_tables import environment
from himap_train.benchmark.gpu_checks import Check, equalities, full_size, run_checks
from himap_train.benchmark.gpu_runs import runs
from himap_train.benchmark.sizes import find_size
from himap_train.command_line import run_command
from himap_train.evaluation.tables import markdown_lines


def main(
    models: list[str] = ["llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct"],  # noqa: B006 - never changed
    size: str = "llava-1.5-7b",
    devices: int = 1,
    device: str = "cuda",
    batch: int = 8,
    rounds: int = 5,
    steps: int = 8,
    attention: str = "sdpa",
    kernel: str = "flash_attention_2",
) -> None:
    """Print the table.

    Args:
        models: Whose shapes are run: hub names that are known here, or folders with a config.json.
        size: Of the runs of finetune.py, as benchmark.py has them; for QLoRA with 4 layers.
        devices: GPUs; several are for ZeRO alone.
        device: "cpu" shows the table's form on small models.
        batch: Samples in a batch of one GPU.
        rounds: Pairs of training steps that are timed.
        steps: Of each run of finetune.py.
        attention: Implementation of the training steps.
        kernel: Implementation that is held against SDPA.

    Raises:
        ValueError: There is no such GPU.
    """
    if device != "cpu" and torch.cuda.device_count() < devices:
        raise ValueError(f"{torch.cuda.device_count()} CUDA GPUs are here, and --devices is {devices}; or --device cpu")
    print("\n".join(f"{key}: {value}" for key, value in environment(device).items()), end="\n\n")
    place, rows, failed = torch.device(device), [], False
    with tempfile.TemporaryDirectory() as folder:
        run = partial(runs, folder=Path(folder), device=device, steps=steps)
        common = ["--trainer.devices", str(devices), "--data.batch_size", str(batch)]
        checks: dict[str, Callable[[], Iterable[Check]]] = {}
        if devices > 1:
            stages = {f"ZeRO-{n}": [*common, "--trainer.strategy", f"deepspeed_stage_{n}"] for n in (2, 3)}
            checks = {f"{size}, {devices} GPUs": partial(run, find_size(size), settings=stages)}
        for model in models if devices == 1 else ():
            name = model.rsplit("/", 1)[-1]
            checks[f"{name}, 4 layers"] = partial(equalities, model, place, kernel)
            checks[name] = partial(full_size, model, place, batch, rounds, attention)
        if devices == 1:
            settings = {"QLoRA step": [*common, "--model.quantize", "4bit", "--model.lora_lr", "1e-3"]}
            checks[f"{size}, 4 layers"] = partial(run, find_size(size, 4), settings=settings)
        for name, row in run_checks(checks):
            verdict = {True: "holds", False: "FAILS", None: ""}[row.holds]
            rows.append([name, row.what, row.found, row.expected, verdict])
            failed |= row.holds is False
            print(": ".join(rows[-1][:3]), verdict, file=sys.stderr, flush=True)
    print(markdown_lines(["", "", "found", "expected", ""], rows))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_command(main))
