"""What pruning saves on this machine, and whether all of the saving that the FLOPs promise arrives.

python recipes/benchmark.py                                        # a small LLaVA, every method, some minutes
python recipes/benchmark.py --size tiny --rounds 1                 # what the output looks like, in a minute or two
python recipes/benchmark.py --methods [himap] --series [image_tokens,batch,depth,text_tokens]
python recipes/benchmark.py --job true --peer_python ENV/bin/python # beside Trainer and TRL, files to adapter
python recipes/benchmark.py --size llava-1.5-7b --device cuda --dtype bfloat16 --batch 8 --gradient_checkpointing true

Weights are random; of times and memory that changes nothing. Every method is timed in pairs with dense.
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import sys
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch

from himap_train.benchmark.bench import Settings
from himap_train.benchmark.benchmark_tables import FILES, command_line, environment, load_average, save
from himap_train.benchmark.contenders import DENSE, MEASURES, METHODS
from himap_train.benchmark.job import JOB_FILES, PEERS, run_job, save_job
from himap_train.benchmark.measurements import planned, run_all
from himap_train.benchmark.sizes import find_size
from himap_train.benchmark.timing import Clock
from himap_train.benchmark.workload import Workload
from himap_train.checkpoints.load import usable_device
from himap_train.command_line import new_output_folder, run_command

ALL = [name for name in METHODS if name != DENSE]


def main(
    size: str = "laptop",
    layers: int | None = None,
    methods: list[str] = ALL,  # noqa: B006 - never changed; the default that --help shows
    measures: list[str] = list(MEASURES),  # noqa: B006, B008
    series: list[str] = [],  # noqa: B006
    series_values: list[int] | None = None,
    series_methods: list[str] = ["himap", "divprune", "average-pool", "hidrop"],  # noqa: B006
    series_measures: list[str] = list(MEASURES),  # noqa: B006, B008
    rounds: int = 5,
    batch: int = 1,
    image_tokens: int = 576,
    text_before: int = 35,
    text_after: int = 80,
    whole_model: bool = False,
    gradient_checkpointing: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attention: str = "sdpa",
    device: str = "auto",
    threads: int | None = None,
    clock: Clock = "wall",
    seed: int = 0,
    job: bool = False,
    job_methods: list[str] = ["himap", DENSE, *PEERS],  # noqa: B006
    output: Path = Path("runs/benchmark"),
    overwrite: bool = False,
    **jobs: Any,
) -> None:
    """Time every method against dense in pairs and compare with what the cost model promises.

    Args:
        size: tiny, laptop, 100m, llava-1.5-7b, llava-1.5-13b or llava-next-34b.
        layers: Another depth than that of the size.
        methods: Presets, schedules as YAML, fastv-attention-maps, pyramiddrop-ranking, masking, stock.
        measures: training_step, prefill, decode (one token), generate (64 tokens).
        series: Also along image_tokens, dynamic_resolution, batch, depth or text_tokens.
        series_values: The values of the axis instead of its own; with one series.
        series_methods: Methods of the series.
        series_measures: Measures of the series.
        rounds: Pairs of each.
        batch: Samples in a batch.
        image_tokens: Image tokens of a sample.
        text_before: Text tokens before the image.
        text_after: Text tokens behind it; half of them are the answer.
        whole_model: With a vision tower in proportion, which is timed too.
        gradient_checkpointing: In training.
        dtype: Dtype of the weights; LoRA is float32 under mixed precision.
        attention: "sdpa", "eager" or "flash_attention_2".
        device: "auto", "cpu", "cuda", ...
        threads: Threads of the CPU; by default torch's own choice.
        clock: On a CPU, "wall", or "cpu" for the time of this process alone (one thread, on a machine that is shared).
        seed: Seed of weights and inputs.
        job: Time whole fine-tunings instead, from a LLaVA file and images to a saved adapter.
        job_methods: What fine-tunes: methods, hf-trainer (Trainer and PEFT) and trl (SFTTrainer).
        output: Folder for benchmark.json and benchmark.md; or job.json and job.md.
        overwrite: Replace results that are there.
        **jobs: Options of `run_job`.

    Raises:
        ValueError: A name is unknown, a shape impossible, or an option would be ignored.
    """
    if job and series:
        raise ValueError("--job times whole fine-tunings and --series steps: give one of them")
    steps = {"methods": methods, "measures": measures}
    along = {"series_methods": series_methods, "series_measures": series_measures}
    _refuse_ignored(not job, {**jobs, "job_methods": job_methods}, "without --job true")
    _refuse_ignored(job, steps, "beside --job true, which ignores them")
    _refuse_ignored(not series, along, "without --series")
    if series_values is not None and len(series) != 1:
        raise ValueError(f"--series_values are those of one series, and --series is {series}")
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; expected 1 or more")
    if threads is not None:
        torch.set_num_threads(threads)
    place = usable_device(device)
    settings = Settings(
        size=find_size(size, layers),
        whole=whole_model,
        dtype=getattr(torch, dtype),
        device=place,
        attention=attention,
        checkpointing=gradient_checkpointing,
        rounds=rounds,
        seed=seed,
        clock=clock,
    )
    workload = Workload(batch, image_tokens, text_before, text_after)
    points = planned(settings, workload, methods, measures) if methods and not job else []
    for axis in series:
        points += planned(settings, workload, series_methods, series_measures, axis, series_values)
    if not job and not any(point.rows for point in points):
        raise ValueError(f"nothing to measure: --methods {methods} are held against {DENSE}; name another, or --series")
    clear = new_output_folder(output, JOB_FILES if job else FILES, overwrite)

    shown = {"size": size, **asdict(workload), "dtype": dtype, "attention": attention, "rounds": rounds, "clock": clock}
    shown |= {"layers": layers, "whole_model": whole_model, "gradient_checkpointing": gradient_checkpointing}
    facts: dict[str, Any] = {"command": command_line(), "environment": environment(place), "settings": shown}
    if job:
        clear()  # jobs write into folders of their own there
        done = run_job(job_methods, settings, workload, output, threads, **jobs)
        facts |= {"load_after": load_average(), "settings": shown | jobs}
        print(save_job(facts, done, output))
        return
    found, facts["out_of_memory"] = run_all(points)
    facts["load_after"] = load_average()
    if not found:
        raise ValueError(f"nothing had room in memory: {'; '.join(facts['out_of_memory'])}")
    clear()
    print(save(facts, found, output))
    print(f"saved in {output}")


def _refuse_ignored(ignored: bool, options: dict[str, Any], how: str) -> None:
    usual = {**signature(run_job).parameters, **signature(main).parameters}
    given = [f"--{name}" for name, value in options.items() if value != usual[name].default]
    if ignored and given:
        raise ValueError(f"{', '.join(given)} {how}")


if __name__ == "__main__":
    sys.exit(run_command(main))
