"""The rows of an ablation: each schedule answers the data and is timed, and is written down before the next starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from himap_train.bar import progress_bar
from himap_train.benchmark.contenders import DENSE, find_method, scheduled
from himap_train.benchmark.tasks import cache_bytes, inference_task, peak_bytes, prefilled_cache
from himap_train.benchmark.timing import Clock, Spread, time_pairs
from himap_train.benchmark.workload import Batch
from himap_train.data.batches import collate, pad_token_id_of
from himap_train.data.encode import Encoder, Sample
from himap_train.data.records import RecordError, Source
from himap_train.data.sources import parts_of
from himap_train.evaluation.compare import evaluate_row
from himap_train.evaluation.questions import source_length
from himap_train.evaluation.tables import json_ready, write_json
from himap_train.models.features import prompt_inputs
from himap_train.models.foresight import learned_layers
from himap_train.models.installed import scorers_of
from himap_train.models.stock import base_model, text_decoder
from himap_train.pruning.schedule import PruningSchedule
from himap_train.structured import read_json

ROWS = "rows.json"
Run = tuple[PruningSchedule, int]
"""A schedule, and the seed of what it draws."""


def runs_of(schedules: Sequence[PruningSchedule], seeds: Sequence[int]) -> list[Run]:
    """Each schedule once, and for every seed where it chooses by chance."""
    chance = {one: any(stage.method.by_chance for stage in one.stages) for one in schedules}
    return [(one, seed) for one in schedules for seed in (seeds if chance[one] else seeds[:1])]


def require_rankings(model: nn.Module, schedules: Sequence[PruningSchedule]) -> None:
    """Raise ValueError where a schedule ranks by what was learned and the model has learned nothing there: the
    benchmark, whose weights are random, would rank at random.
    """
    held = scorers_of(text_decoder(model))
    lacking = [layer for schedule in schedules for layer in learned_layers(schedule) if layer not in held]
    if lacking:
        raise ValueError(f"criterion learned: this checkpoint has no ranking at layer {lacking[0]}, but at {[*held]}")


def run_all(
    runs: Sequence[Run], measure: Callable[[Run], dict[str, Any]], folder: Path, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows of all runs, in order; those that the folder has under the same settings are not run again. Shows a bar.

    Args:
        runs: What to measure.
        measure: Gives the figures of a row, as JSON types.
        folder: Its rows.json is written anew after each run, and keeps the rows of other runs and settings.
        settings: What the figures depend on beside the run, as JSON types.

    Raises:
        ValueError: rows.json is no such file.
    """
    file, found = folder / ROWS, []
    rows = read_json(file, {"rows": [{"run": dict}]})["rows"] if file.exists() else []
    known = {json.dumps(row["run"], sort_keys=True): row for row in rows}
    with progress_bar("rows", len(runs)) as advance:
        for run in runs:
            facts = {"schedule": run[0].to_dict(), "seed": run[1], **settings}
            key = json.dumps(facts, sort_keys=True)
            if key not in known:
                known[key] = json_ready({"run": facts, **measure(run)})
                write_json(file, {"rows": list(known.values())})
            found.append(known[key])
            advance(1)
    return found


def measured(
    run: Run,
    model: nn.Module,
    processor: Any,
    source: Source,
    batch: Batch,
    rounds: int,
    clock: Clock,
    **settings: Any,
) -> dict[str, Any]:
    """What `compare.Row` holds, with `settings` of `evaluate`; seconds of the prefill of `batch` and of a
    token decoded behind it, in pairs with dense; most bytes of the prefill beside weights and inputs, and its cache's.

    The model is stock and in evaluation mode, before and after.
    """
    dense = find_method(DENSE, 0)
    torch.manual_seed(run[1])
    with scheduled("", run[0]).active(model):
        found = evaluate_row("", model, processor, source, **settings, progress=False).to_dict()
    method = dense if run[0].dense else scheduled("", run[0])
    for measure in ("decode", "prefill"):
        theirs, ours = (inference_task(measure, model, which, batch) for which in (dense, method))
        pairs = time_pairs(theirs, ours, rounds, batch.input_ids.device, clock=clock)
        found[measure] = {"seconds": asdict(Spread.of(pairs.second)), "of_dense": asdict(pairs.ratio)}
    found["peak_bytes"] = peak_bytes(ours, batch.input_ids.device, batch.with_weights(model))
    found["kv_bytes"] = cache_bytes(prefilled_cache(model, method, batch))
    return found


def as_of(name: str, *files: str) -> str:
    """A digest of names, sizes and times of the files that a name stands for, so that rows of others are not taken for
    theirs; "" where it is no file or folder here. Of a folder those count that are like `files`.
    """
    path, _, _ = parts_of(name)
    if not name or not path.exists():
        return ""
    found = [path] if path.is_file() else sorted(file for pattern in files for file in path.rglob(pattern))
    states = [(file.relative_to(path).as_posix(), file.stat()) for file in found]
    told = "".join(f"{inside} {state.st_size} {state.st_mtime_ns}\n" for inside, state in states)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def timed_batch(
    model: nn.Module, processor: Any, source: Source, count: int, limit: int | None = None, **how: Any
) -> Batch:
    """At most `count` prompts with images from the start of a source, of its first `limit` records, padded to the left;
    images are read as `Encoder` is told.

    Raises:
        ValueError: No usable record has an image.
    """
    encoder, samples = Encoder(processor, None, **how), list[Sample]()
    for index in range(source_length(source, limit)):
        try:
            samples.append(encoder.encode_prompt(source[index]))
        except RecordError:
            continue  # the evaluation reports it
        samples = [sample for sample in samples if sample["images"]]
        if len(samples) == count:
            break
    if not samples:
        raise ValueError("no usable record that is evaluated has an image, so there is nothing to prune")
    given = prompt_inputs(base_model(model), collate(samples, pad_token_id_of(processor.tokenizer), "left"))
    ids = given.pop("input_ids")
    return Batch(ids, ids, given=given)
