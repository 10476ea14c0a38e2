"""The stopwatch on a job, and what its tables say; whole jobs run in test_benchmark_recipe.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny import tiny_llava
from torch.utils.data import DataLoader

from himap_train.benchmark.job import job_markdown
from himap_train.benchmark.job_peers import Stopwatch


def counting() -> Stopwatch:
    """Its clock advances by one each time that it is read."""
    watch = Stopwatch("cpu")
    watch._now, watch._since = itertools.count(1.0).__next__, 0.0
    return watch


def test_what_runs_inside_another_part_counts_for_the_inner_one_alone() -> None:
    watch = counting()
    with watch.part("saving"):
        with watch.part("loading"):
            watch.switch("waiting")
        assert watch.timed("tower", lambda value: value + 1)(1) == 2
    watch.switch("other")
    assert watch.seconds == {"other": 2, "saving": 3, "loading": 1, "waiting": 1, "tower": 1}


def test_parts_of_steps_and_everything_as_it_was_behind_them() -> None:
    model, watch = tiny_llava(), counting()
    model.requires_grad_(False).model.language_model.layers.requires_grad_(True)
    before = torch.Tensor.backward, model.model.language_model.forward.__func__
    pixels, ids = torch.zeros(1, 3, 32, 32), torch.tensor([[5] * 3 + [4] * 16 + [6] * 4])
    optimizer = torch.optim.AdamW(model.model.language_model.layers.parameters())
    with watch.steps(model):
        for batch in DataLoader([0, 1, 2]):
            loss = model(input_ids=ids + 0 * batch, labels=ids, pixel_values=pixels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(watch.losses) == 3 and watch.losses[0] > watch.losses[2] > 0
    first, last = watch.rounds
    # Of three steps two are counted, each with every part once.
    counts = {name: last[name] - first.get(name, 0) for name in last}
    assert counts["tower"] == counts["decoder forward"] == counts["decoder backward"] == 2
    assert counts["lm_head"] == 6 and counts["optimizer"] >= 2 and counts["loading"] == 2
    assert (torch.Tensor.backward, model.model.language_model.forward.__func__) == before


def job(loss: float, backward: float, **more: Any) -> dict[str, Any]:
    step = {"decoder forward": 1.0, "decoder backward": backward, "lm_head": 0.5}
    run = {"whole": 30.0, "seconds": {"caching": 4.0}, "step": step, "losses": [loss, 1.0], "trained": 7}
    return run | {"versions": {"trl": "9.9"}} | more


def test_tables_give_throughputs_limits_and_what_is_due_to_pruning() -> None:
    found = {"himap": [job(2.5, 0.5)] * 2, "dense": [job(2.0, 2.5)] * 2, "trl": [job(2.0, 8.5, seconds={})] * 2}
    text = job_markdown(found, batch=8)  # 4, 6 and 10 seconds a step; features were cached in 4 seconds for 2 steps
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| himap")]
    assert rows[0][1:5] == ["2.000 [2.000, 2.000]", "1.00 [1.00, 1.00]", "1.50 [1.50, 1.50]", "2.50 [2.50, 2.50]"]
    assert rows[0][6:] == ["2.5000", "trl 9.9"]
    assert rows[1][-1] == "caching, lm_head" and rows[1][1] == "4.000" and "50.0" in rows[1]
    assert "All train 7 numbers" in text


@pytest.mark.parametrize("other", [{"trained": 8}, {"losses": [2.1, 1.0]}])
def test_jobs_that_are_not_the_same_are_named(other: dict[str, Any]) -> None:
    assert "NOT the same job" in job_markdown({"dense": [job(2.0, 1.0)], "trl": [job(2.0, 1.0, **other)]}, batch=1)
