"""Where a resumed run stands when a global batch is divided in another way than before.

The data loader remembers records, which do not depend on the number of processes. Lightning counts micro-batches, so
its counters are translated before it reads them.
"""

from __future__ import annotations

import math
from typing import Any


def begin_next_epoch(checkpoint: dict[str, Any], by_steps: bool) -> None:
    """Let a run go on with the next epoch from a checkpoint that was made at the end of one, in place.

    Lightning loses count there: of an epoch whose batches are done but which was not ended, it leaves the next one out
    of its counters, so that a second interruption starts that one again; and with `max_steps` it ends an ended epoch a
    second time.

    Args:
        checkpoint: Lightning's.
        by_steps: Whether `max_steps` ends the run.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if not loops:
        return
    epoch, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    epochs, now = epoch["current"], batches["current"]
    not_ended = epochs["processed"] < epochs["ready"] and batches["is_last_batch"] and now["processed"] == now["ready"]
    ended = epochs["completed"] < epochs["processed"] == epochs["ready"]
    if not (ended if by_steps else not_ended):
        return
    for counts in epoch.values():
        counts["completed"] = counts["processed"] = counts["ready"]
    if now["completed"] < now["processed"]:  # interrupted within the last batch's hooks
        batches["total"]["completed"] += 1
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    batches["current"] = dict.fromkeys(now, 0)
    batches["is_last_batch"] = False


def continue_in_this_split(checkpoint: dict[str, Any], data: Any) -> None:
    """Change the batch counters of a checkpoint, in place, to those of this run's batch size and processes.

    Args:
        checkpoint: A Lightning checkpoint; left alone where it has no data state, or was made with the same split.
        data: The run's `LlavaDataModule`, or None.
    """
    then = checkpoint.get(type(data).__qualname__)
    now = data.state_dict() if then else None
    if not then or not now or not then.get("records") or "batch_size" not in then:
        return
    before, after = (state["batch_size"] * state["processes"] for state in (then, now))
    if before == after:
        return
    records = min(then["records"], then["train_limit"] or then["records"])
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    ready, total = progress["current"]["ready"], progress["total"]["ready"]
    epochs = round((total - ready) / math.ceil(records / before))
    wanted = math.ceil(min(ready * before, records) / after)
    # The other counters are the same, or one less within a batch; that stays so.
    for name, shift in (
        ("current", wanted - ready),
        ("total", epochs * math.ceil(records / after) + wanted - total),
    ):
        progress[name] = {key: value + shift for key, value in progress[name].items()}
