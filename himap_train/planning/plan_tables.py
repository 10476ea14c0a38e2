"""A plan as tables on the screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from himap_train.evaluation.tables import screen_table
from himap_train.models.training_cost import TrainingFlops
from himap_train.planning.device_memory import GIB, RESERVE
from himap_train.planning.facts import Activations
from himap_train.planning.run_plan import Duration, Plan, Side

_FLOPS: dict[str, Callable[[TrainingFlops], float]] = {
    "decoder forward": lambda f: f.forward,
    "decoder backward": lambda f: f.backward,
    "decoder forward again": lambda f: f.recompute,
    "vision tower": lambda f: f.vision,
    "projector": lambda f: f.projector,
    "lm_head": lambda f: f.lm_head,
    "all": lambda f: f.total,
}
_ACTIVATIONS: dict[str, Callable[[Activations], int]] = {
    "saved": lambda a: a.saved,
    "logits": lambda a: a.logits,
    "layer": lambda a: a.working,
    "ranking": lambda a: a.ranking,
    "peak": lambda a: a.peak,
}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """All tables, then what they assume."""
    console = console or Console()
    for table in (_parameters(plan), _flops(plan), _activations(plan), _memory(plan), _fits(plan)):
        console.print(table)
    for note in (*plan.notes, *_assumptions(plan)):
        console.print(f"- {note}", highlight=False)
    if plan.duration:
        console.print(_duration(plan, plan.duration))


def _parameters(plan: Plan) -> Table:
    rows = [(name, f"{total:,}", f"{trained:,}") for name, (total, trained) in plan.facts.parts.items()]
    total, trained = (sum(pair[place] for pair in plan.facts.parts.values()) for place in (0, 1))
    rows.append(("all", f"{total:,}", f"{trained:,} ({100 * trained / total:.2f} %)"))
    return _table("Parameters", ("part", "all", "trained"), rows)


def _flops(plan: Plan) -> Table:
    tokens = ["image tokens", *(" -> ".join(map(str, side.image_tokens)) for side in plan.sides)]
    rows = [tokens, ["text tokens", *[str(plan.sample.text_tokens)] * len(plan.sides)]]
    rows += [[name, *(f"{get(side.flops) / 1e12:.3g}" for side in plan.sides)] for name, get in _FLOPS.items()]
    rows.append(["prefill (no LoRA)", *(f"{side.prefill.flops / 1e12:.3g}" for side in plan.sides)])
    if len(plan.sides) > 1:
        ratio = plan.sides[1].flops.total / plan.sides[0].flops.total
        rows = [[*row, ""] for row in rows]
        rows[-2][-1], rows[-1][-1] = f"{ratio:.3f}", f"{plan.sides[1].prefill.flops_ratio:.3f}"
    header = ("", *(side.name for side in plan.sides), *(["pruned / dense"] if len(plan.sides) > 1 else []))
    return _table("A sample in a training step: tokens, TFLOP", header, rows)


def _activations(plan: Plan) -> Table:
    settings = [(side, again) for again in (True, False) for side in plan.sides]
    found = [side.activations[again] for side, again in settings]
    rows = [
        [_setting(side, again), *(_gib(get(one)) for get in _ACTIVATIONS.values()), one.moment]
        for (side, again), one in zip(settings, found, strict=True)
    ]
    length = plan.sample.longest_text + plan.sample.images * plan.sample.image_tokens
    title = f"Activations of {plan.run.batch_size} rows of {length} tokens, GiB"
    return _table(title, ("", *_ACTIVATIONS, "peak at"), rows)


def _memory(plan: Plan) -> Table:
    header = ("", "frozen", "trained", "grads", "optim", "bufs", *(side.name for side in plan.sides), "host")
    rows = []
    for name, static in plan.memory.items():
        parts = (static.frozen, static.trained, static.gradients, static.optimizer, static.buffers)
        total = [_mark(plan, plan.peak(name, side)) for side in plan.sides]
        rows.append([_name(plan, name), *map(_gib, parts), *total, _gib(static.host)])
    state = "with" if plan.run.checkpointing else "without"
    sides = " and ".join(side.name for side in plan.sides)
    title = (
        f"GiB on each of {plan.run.devices} GPUs by part, and peak {sides} at batch {plan.run.batch_size} {state} "
        "checkpointing"
    )
    return _table(title, header, rows)


def _fits(plan: Plan) -> Table:
    columns = [(side, again) for again in (True, False) for side in plan.sides]
    header = ("", *(_setting(side, again) for side, again in columns))
    rows = [[_name(plan, name), *(_batch(side, again, name) for side, again in columns)] for name in plan.memory]
    return _table(f"Largest batch of one GPU in {plan.run.gpu_memory:g} GiB", header, rows)


def _duration(plan: Plan, duration: Duration) -> Table:
    hours = [duration.gpu_hours(side) for side in plan.sides]
    rows = [
        ["TFLOP", *(f"{duration.flops(side) / 1e12:,.3g}" for side in plan.sides)],
        ["GPU hours", *(f"{of_all:,.3g}" for of_all in hours)],
        [f"hours on {plan.run.devices} GPUs", *(f"{of_all / plan.run.devices:,.3g}" for of_all in hours)],
    ]
    if duration.price is not None:
        price = duration.price
        rows.append([f"cost at {price:g} a GPU hour", *(f"{of_all * price:,.2f}" for of_all in hours)])
    title = f"Training on {duration.samples:,} samples at {duration.tflops:.3g} TFLOP/s a GPU, without validations"
    return _table(title, ("", *(side.name for side in plan.sides)), rows)


def _assumptions(plan: Plan) -> list[str]:
    run = plan.run
    bounds = [
        "stages that keep by attention mass are counted at at_most: all figures of the pruned side are upper bounds"
    ]
    return [
        *(bounds if plan.sides[-1].prefill.upper_bound else []),
        f"* as configured: {run.strategy}, {run.precision}; an optimizer step takes {run.batch_size} x "
        f"{run.accumulate} x {run.devices} = {run.effective_batch} samples (--effective_batch N sets accumulation)",
        "all rows of a batch have the length shown; a peak in brackets does not fit",
        f"{RESERVE / GIB:g} GiB of a GPU are left to CUDA's context, workspaces and fragmentation",
        "ZeRO with ZeroStrategy's default buckets of 50 M elements; gathered weights of stage 3 are an upper bound",
    ]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return screen_table(title, header, rows, title_justify="left", padding=(0, 1) if len(header) < 7 else 0)


def _setting(side: Side, checkpointing: bool) -> str:
    return f"{side.name}{', checkpointing' if checkpointing else ''}"


def _name(plan: Plan, strategy: str) -> str:
    return f"{strategy} *" if strategy == plan.run.strategy else strategy


def _mark(plan: Plan, peak: int) -> str:
    return _gib(peak) if peak + RESERVE <= plan.run.gpu_memory * GIB else f"({_gib(peak)})"


def _batch(side: Side, checkpointing: bool, strategy: str) -> str:
    return str(side.largest[checkpointing][strategy] or "none fits")


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
