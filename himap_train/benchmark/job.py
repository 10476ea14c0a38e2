"""The whole job on the clock: from JSON and image files to a saved adapter, with this package and with others.

Each job is a process of its own, from its start to its end; all train on the same weights, records, order and batches.
The tables say what each took: throughput, and where a step goes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from himap_train.bar import progress_bar
from himap_train.benchmark import job_peers
from himap_train.benchmark.bench import Settings
from himap_train.benchmark.benchmark_tables import heading, spread, write_results
from himap_train.benchmark.contenders import DENSE, LEARNING, STOCK, find_method
from himap_train.benchmark.sizes import TOKENS_PER_IMAGE, save_whole
from himap_train.benchmark.timing import Pairs, Spread
from himap_train.benchmark.workload import Workload
from himap_train.data.sampling import BatchOrder
from himap_train.embedded.scene_source import Scenes
from himap_train.evaluation.tables import markdown_lines

HF_TRAINER, TRL = PEERS = ("hf-trainer", "trl")
_PICTURE = 640, 480
_TEMPLATE_TOKENS, _WORDS = 9, "abcdefghijklmnopqrstuvwxyz"
_PRECISION = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
JOB_FILES = ("job.json", "job.md")
DECODER = ("decoder forward", "decoder backward")
ONCE = ("loading", "waiting", "caching", "saving")
PARTS = ("loading", "waiting", "caching", "tower", *DECODER, "lm_head", "optimizer", "saving", "other")
Results = dict[str, list[dict[str, Any]]]


def make_job(folder: Path, settings: Settings, workload: Workload, records: int) -> None:
    """Fill a folder: `model` with random weights, photos of 640x480 in `images`, and a LLaVA file, `train.json`."""
    torch.manual_seed(settings.seed)
    save_whole(folder / "model", settings.size, _WORDS, dtype=settings.dtype)
    scenes, noise = Scenes("train", settings.seed), np.random.default_rng(settings.seed)
    asked, rows = max(workload.text_tokens - workload.answer - _TEMPLATE_TOKENS, 1), []
    (folder / "images").mkdir()
    for number in range(records):
        scenes.scene(number)[1].convert("RGB").resize(_PICTURE).save(folder / "images" / f"{number}.jpg", quality=90)
        question, answer = (" ".join(noise.choice([*_WORDS], count)) for count in (asked, workload.answer))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")


def finetune_config(folder: Path, settings: Settings, batch: int, epochs: int, workers: int, cache: bool) -> Any:
    """What all of these jobs do, as `finetune.py` is told; output and schedule are missing."""
    rank = settings.size.lora_rank
    model: dict[str, Any] = {"path": str(folder / "model"), "lora_r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0}
    model |= {"projector": "freeze", "lora_lr": 1e-4, "gradient_checkpointing": settings.checkpointing}
    data: dict[str, Any] = {
        "train": str(folder / "train.json"),
        "validation": None,
        "image_folder": str(folder / "images"),
    }
    data |= {"batch_size": batch, "num_workers": workers, "max_length": None, "seed": settings.seed}
    accelerator = "cpu" if settings.device == "cpu" else "gpu"
    return {
        "seed_everything": settings.seed,
        "model": model | {"attn_implementation": settings.attention},
        "data": data | {"cache_image_features": cache},
        "trainer": {"accelerator": accelerator, "devices": 1, "max_epochs": epochs}
        | {"precision": _PRECISION[settings.dtype]},
    }


def run_job(
    contenders: Sequence[str],
    settings: Settings,
    workload: Workload,
    folder: Path,
    threads: int | None = None,
    *,
    job_records: int = 32,
    job_epochs: int = 3,
    job_workers: int = 0,
    job_cache: bool = True,
    peer_python: str = sys.executable,
) -> Results:
    """Run each job `settings.rounds` times, in turns.

    Args:
        contenders: Methods of this package, "hf-trainer" and "trl".
        settings: Model, dtype, device, rounds and clock.
        workload: Of it, batch and text.
        folder: Model and data lie there while it runs.
        threads: Of the CPU, in each job.
        job_records: Records of the LLaVA file of a job.
        job_epochs: How often each is trained on.
        job_workers: Processes that load data.
        job_cache: Whether our jobs keep what the frozen tower makes of each image.
        peer_python: Python of the environment that hf-trainer and trl run in.

    Returns:
        For each contender and round: `whole`, seconds of the process; `seconds` of its parts; `step`, those of a step;
        `losses`; `trained`, how many numbers; `versions`.

    Raises:
        ValueError: A contender is unknown, cannot run here, or a job has failed; or a shape is impossible.
    """
    if workload.image_tokens != TOKENS_PER_IMAGE:
        raise ValueError(f"images of a job have {TOKENS_PER_IMAGE} tokens, not image_tokens={workload.image_tokens}")
    if job_records % workload.batch or job_epochs * job_records < 2 * workload.batch:
        raise ValueError(f"{job_epochs} x {job_records} records are no two or more whole batches of {workload.batch}")
    if not contenders:
        raise ValueError(f"--job_methods is empty; give methods, {DENSE}, {HF_TRAINER} or {TRL}")
    methods = {name: find_method(name, settings.size.layers) for name in contenders if name not in PEERS}
    if steps := [name for name, method in methods.items() if method.peer or name in (STOCK, LEARNING)]:
        raise ValueError(f"{', '.join(steps)}: timed in steps alone, no job can run it; leave it out of --job_methods")
    schedules = {name: method.schedule.to_dict() for name, method in methods.items()}
    if TRL in contenders and subprocess.run([peer_python, "-c", "import trl"], capture_output=True).returncode:
        raise ValueError(f"{peer_python} has no TRL: give --peer_python of an environment that has, or leave out trl")
    order = [index for batch in BatchOrder(job_records, workload.batch, seed=settings.seed) for _, index in batch]
    shared = {"order": order, "threads": threads, "clock": settings.clock, "device": settings.device}
    found: Results = {name: [] for name in contenders}
    with TemporaryDirectory(dir=folder) as place:
        make_job(Path(place), settings, workload, job_records)
        config = finetune_config(Path(place), settings, workload.batch, job_epochs, job_workers, job_cache)
        shown = sys.stderr.isatty()
        with progress_bar("jobs", settings.rounds * len(contenders), shown) as advance:
            for number in range(settings.rounds):
                for name in contenders if number % 2 == 0 else reversed(contenders):
                    with TemporaryDirectory(dir=place) as own:
                        model = config["model"] | {"schedule": schedules.get(name)}
                        job = shared | {"contender": name, "results": f"{own}/results.json"}
                        job["config"] = config | {"model": model, "output": f"{own}/run"}
                        found[name].append(_run(job, Path(own) / "job.json", peer_python))
                    advance(1)
                    if not shown:
                        seconds = sum(found[name][-1]["step"].values())
                        print(f"{name}: {seconds:.3f} s/step", file=sys.stderr, flush=True)
    return found


def _run(job: dict[str, Any], file: Path, peer_python: str) -> dict[str, Any]:
    file.write_text(json.dumps(job), encoding="utf-8")
    number = torch.device(job["device"]).index or 0
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    one_gpu = seen[number] if number < len(seen) and seen[0] else str(number)  # Trainer would spread a batch over all
    script, environment = Path(job_peers.__file__), {**os.environ, "CUDA_VISIBLE_DEVICES": one_gpu}
    if job["contender"] in PEERS:  # -P: or files beside the script could be taken for modules of the same name
        command = [peer_python, "-P", str(script)]
    else:
        command = [sys.executable, "-m", "himap_train.benchmark.job_ours"]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    now: Callable[[], float] = time.perf_counter if job["clock"] == "wall" else lambda: sum(os.times()[2:4])
    began = now()
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(f"the job of {job['contender']} has failed:\n{done.stderr[-3000:]}")
    results: dict[str, Any] = json.loads(Path(job["results"]).read_text(encoding="utf-8"))
    return {"whole": now() - began, **results}


def save_job(facts: dict[str, Any], found: Results, folder: Path) -> str:
    """Write `JOB_FILES` and return the Markdown; `facts` are as those of the other tables."""
    text = heading(facts) + job_markdown(found, facts["settings"]["batch"])
    return write_results(folder, JOB_FILES, facts | {"jobs": found}, text)


def job_markdown(found: Results, batch: int) -> str:
    """Two tables of all jobs, and whether they are the same job; `batch` samples are a step."""
    times = {name: [sum(_parts(run).values()) for run in runs] for name, runs in found.items()}
    rates, shares = list[list[str]](), list[list[str]]()
    for name, runs in found.items():
        cells = [spread(Spread.of([batch / seconds for seconds in times[name]]), 1, 3)]
        cells += [spread(Pairs(times[name], times[other]).ratio, 1, 2) for other in found]
        cells += [spread(Spread.of([run["whole"] for run in runs]), 1, 1), f"{runs[0]['losses'][0]:.4f}"]
        rates.append([name, *cells, ", ".join(f"{key} {value}" for key, value in runs[0]["versions"].items())])
        step = {part: statistics.fmean(_parts(run)[part] for run in runs) for part in PARTS}
        percent = {part: 100 * seconds / sum(step.values()) for part, seconds in step.items()}
        limits = [part for part, share in percent.items() if share > 10 and part not in DECODER]
        cells = [f"{sum(step.values()):.3f}", *(f"{share:.1f}" for share in percent.values())]
        shares.append([name, *cells, ", ".join(limits) or "none"])
    rate_header = ["job", "samples/s", *(f"x {name}" for name in found), "whole job, s", "first loss", "versions"]
    return f"""## Whole jobs

{markdown_lines(rate_header, rates)}
`x NAME`: throughput / that of NAME, round by round; against {DENSE} all is due to pruning, of {DENSE} itself nothing.
Throughput leaves out the start and the first step; loading, caching and saving are spread over all steps.
{_sameness(found)}

## A step, % by part

{markdown_lines(["job", "s/step", *PARTS, "limits: above 10 %"], shares)}"""


def _parts(run: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step."""
    once = {part: run["seconds"].get(part, 0.0) / len(run["losses"]) for part in ONCE}
    return {part: once.get(part, run["step"].get(part, 0.0)) for part in PARTS}


def _sameness(found: Results) -> str:
    trained = {name: runs[0]["trained"] for name, runs in found.items()}
    losses = {name: runs[0]["losses"][0] for name, runs in found.items() if name in (*PEERS, DENSE)}
    if len({*trained.values()}) > 1 or (losses and max(losses.values()) > 1.001 * min(losses.values())):
        return f"NOT the same job: trained numbers {trained}, first losses {losses}."
    same = "; those that prune nothing have the same first loss" if len(losses) > 1 else ""
    return f"All train {trained.popitem()[1]} numbers{same}."
