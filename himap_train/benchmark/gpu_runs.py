"""Short runs of `finetune.py` on a model with random weights: what needs several GPUs, or quantises while it loads."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from himap_train.analysis.report import read_curves
from himap_train.benchmark.gpu_checks import HALF, PRECISION, Check, close
from himap_train.benchmark.sizes import Size, save_whole
from himap_train.benchmark.timing import free_memory
from himap_train.experiments import fine_tune_all

_OPTIONS = """--data.train embedded:train --data.validation null --evaluation.before false --evaluation.after false
--trainer.log_every_n_steps 1 --loggers [csv] --trainer.precision"""
_NOT_HERE = ("OutOfMemoryError", "pip install", "needs a CUDA device")


def runs(size: Size, folder: Path, device: str, steps: int, settings: Mapping[str, Sequence[str]]) -> Iterator[Check]:
    """Speed and memory under several settings, options by name; losses are those of the first, and fall where weights
    have 4 bits. A run that ended for want of memory, or of a package that its error names, is a row that says so; any
    other end is a row that fails, and so are losses that have nothing to be held against. The folder is for the model
    and its runs.
    """
    save_whole(folder / "model", size, dtype=HALF, device=device)
    free_memory()  # those that train on the same GPU need it
    common = [*_OPTIONS.split(), PRECISION, "--model.path", str(folder / "model"), "--trainer.max_steps", str(steps)]
    first: tuple[str, torch.Tensor] | None = None
    ended: list[str] = []
    for number, (name, options) in enumerate(settings.items()):
        run = folder / str(number)
        try:
            fine_tune_all({run: [*common, *options]}, 1)
        except RuntimeError:
            said = run.with_name(f"{run.name}.log").read_text(encoding="utf-8").splitlines()
            print(*said[-20:], sep="\n", file=sys.stderr, flush=True)  # the folder goes with its logs
            ended.append(name)
            if lacks := [line for line in said if any(reason in line for reason in _NOT_HERE)]:
                yield Check(f"{name}: not run", lacks[-1])
            else:
                reasons = [line for line in said if line.startswith("error: ")] or said[-1:]
                yield Check(f"{name}: broken", "".join(reasons[-1:]), holds=False)
            continue
        logged = read_curves(run)
        shown = [f"{[*logged[key].values()][-1]:.4g} {key}" for key in ("tokens/s", "s/step", "memory GiB")]
        yield Check(name, ", ".join(shown))
        losses = torch.tensor([*logged["train/loss"].values()])
        if "4bit" in options:
            yield Check(f"{name}: loss", f"{losses[0]:.3f} to {losses[-1]:.3f}", "falls", bool(losses[-1] < losses[0]))
        elif first is not None:
            yield close(f"{name}: losses", losses, first[1], first[0])
        elif ended:
            yield Check(f"{name}: losses", f"not compared: {ended[0]} did not run", holds=False)
        if "4bit" not in options:
            first = first or (name, losses)
