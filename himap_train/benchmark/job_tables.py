"""What the jobs took, as JSON and Markdown: throughput, and where a step goes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from himap_train.benchmark.benchmark_tables import heading, spread, write_results
from himap_train.benchmark.contenders import DENSE
from himap_train.benchmark.job import PEERS, Results
from himap_train.benchmark.timing import Pairs, Spread
from himap_train.evaluation.tables import markdown_lines

JOB_FILES = ("job.json", "job.md")
DECODER = ("decoder forward", "decoder backward")
ONCE = ("loading", "waiting", "caching", "saving")
PARTS = ("loading", "waiting", "caching", "tower", *DECODER, "lm_head", "optimizer", "saving", "other")


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
    return f"All train {trained.popitem()[1]} numbers; those that prune nothing have the same first loss."
