"""What no CPU can show of a model in the shape of a published one: kernels held to one another, memory to its plan.

Each check gives some rows of a table. Weights are random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from himap_train.benchmark.tasks import cache_bytes, peak_bytes
from himap_train.benchmark.timing import Task, free_memory, time_once, time_pairs
from himap_train.models.families import family_of
from himap_train.models.features import hidden_states, prompt_inputs
from himap_train.models.install import install_pruning, record_pruning, remove_pruning, running
from himap_train.models.stock import base_model, text_decoder
from himap_train.models.versions import checkpoint_activations
from himap_train.planning.cases import Case, build_model, inputs_of, published_case
from himap_train.planning.device_memory import GIB, RESERVE
from himap_train.planning.facts import model_facts
from himap_train.planning.run_plan import Plan, RunSettings, Sample, make_plan
from himap_train.planning.verify import step_loss
from himap_train.pruning.cost import schedule_cost
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

PRECISION, HALF = "bf16-mixed", torch.bfloat16
ROUNDING = 0.03
"""Largest relative difference of what bfloat16 computes in two ways."""
PRUNED = PruningSchedule((PruningStage(1, "instruction", 0.5), PruningStage(2, "uniform", 0.25)))
"""Layer 0 gives queries and keys before any attention has run: what is kept does not depend on the kernel."""
_ALONE = "one device"


@dataclass(frozen=True)
class Check:
    """One line: what is looked at, what was found, what it is held against, and whether both are equal as they must be
    (None where nothing must be).
    """

    what: str
    found: str
    expected: str = ""
    holds: bool | None = None


class NotHereError(Exception):
    """This machine cannot run a check; says why."""


def run_checks(checks: Mapping[str, Callable[[], Iterable[Check]]]) -> Iterator[tuple[str, Check]]:
    """The rows of all checks; one that cannot run here is a row that says so, one that breaks a row that fails."""
    for name, check in checks.items():
        try:
            for row in check():
                yield name, row
        except (ImportError, NotHereError, torch.OutOfMemoryError) as error:
            yield name, Check("not run", str(error).splitlines()[0])
        except Exception as error:  # whatever a kernel raises: the other checks still say something
            yield name, Check("broken", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", holds=False)
        free_memory()


def close(what: str, found: Tensor, expected: Tensor, other: str) -> Check:
    """Whether two results are equal to rounding."""
    off = float((found - expected).norm() / expected.norm())
    return Check(what, f"{off:.4f} off", f"{other} to {ROUNDING}", off <= ROUNDING)


def equalities(name: str, device: torch.device, kernel: str, layers: int = 4) -> Iterator[Check]:
    """A shallow model, named as in `published_case`: no stages against stock, checkpointing, and another attention
    kernel against SDPA, over a padded batch.
    """
    case = published_case(name, 2, layers, dropout=0.0)
    model, inputs = build_model(case, PruningSchedule(), False, PRECISION, device), inputs_of(case, device)
    inputs["attention_mask"][1, -8:], inputs["labels"][1, -8:] = 0, -100
    base = base_model(model)
    with torch.no_grad(), torch.autocast(device.type, HALF):  # once: a tower's rounding would choose other tokens
        inputs["mm_encoder_outputs"] = {"image": family_of(base).encode_images(base, inputs["images"])}

    def states() -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, HALF):
            return hidden_states(model, **inputs)[inputs["attention_mask"].bool()].float()

    def gradients() -> Tensor:
        model.zero_grad()
        step_loss(model, inputs, 0, HALF).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def kept_and_states() -> tuple[Tensor, Tensor]:
        install_pruning(model, PRUNED, cpu_blocks=False)
        with record_pruning(model) as trace:
            found = states()
        return torch.cat([*chain(*trace.kept)]), found

    installed = states()
    remove_pruning(model)
    differing = int((installed != states()).sum())
    yield Check("no stages: states", f"{differing} numbers differ", "0 from the stock model", not differing)
    kept, expected = kept_and_states()
    plain = gradients()
    checkpoint_activations(text_decoder(model))
    yield close("gradients with checkpointing", gradients(), plain, "without")
    remove_pruning(model)
    base.set_attn_implementation(kernel)
    others, found = kept_and_states()
    same = torch.equal(others, kept)
    yield Check(f"{kernel}: kept tokens", "the same" if same else "others", "those of sdpa", same)
    yield close(f"{kernel}: states", found, expected, "sdpa")
    yield close(f"{kernel}: gradients", gradients(), plain, "sdpa")


def full_size(
    name: str, device: torch.device, rows: int, rounds: int, attention: str = "sdpa", new_tokens: int = 32
) -> Iterator[Check]:
    """A whole model, named as in `published_case`, with checkpointing in bf16: steps (in pairs, `rounds` times) and
    `generate` dense and pruned, memory against the plan.

    Raises:
        NotHereError: By the plan it does not fit.
    """
    case = published_case(name, rows)
    case.tuner.attn_implementation, batch, chunk = attention, case.batch, case.tuner.loss_chunk
    facts = model_facts(case.config, case.tuner)
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**50
    run = RunSettings(PRECISION, _ALONE, 1, rows, 1, True, attention, chunk, False, there / GIB)
    text, answer = batch.text_tokens, batch.supervised
    sample = Sample(1, batch.image_tokens, text, text, answer, answer)
    plan = make_plan(facts, run, case.tuner.fitted_schedule(facts.layers), sample)
    needed = plan.peak(_ALONE, plan.sides[0]) + RESERVE
    if needed > there:
        raise NotHereError(f"needs {_gib(needed)} by the plan, the GPU has {_gib(there)}")
    try:
        yield from _against_plan(case, plan, device, rounds, new_tokens)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        yield Check("memory", reason, f"{_gib(needed)} by the plan, of {_gib(there)}", holds=False)


def _against_plan(case: Case, plan: Plan, device: torch.device, rounds: int, new_tokens: int) -> Iterator[Check]:
    """Steps, memory and `generate` of a model that fits by the plan."""
    model, inputs = build_model(case, PruningSchedule(), True, PRECISION, device), inputs_of(case, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        step_loss(model, inputs, case.tuner.loss_chunk, HALF).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # as a plan has it: gradients are there, as in a second micro-batch

    tasks = [Task(step, partial(running, model, side.schedule)) for side in plan.sides]
    pairs = time_pairs(tasks[0], tasks[1], rounds, device)
    yield Check("training step, dense", f"{1e3 * median(pairs.first):.0f} ms")
    share = plan.sides[1].flops.total / plan.sides[0].flops.total
    yield Check("training step, pruned / dense", f"{pairs.ratio.median:.3f}", f"{share:.3f} of the FLOPs")
    held = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    held += [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
    given = [*model.buffers(), *inputs["images"].values(), inputs["input_ids"], inputs["labels"]]
    for side, task in zip(plan.sides, tasks, strict=True):
        peak, planned = sum(t.nbytes for t in held) + peak_bytes(task, device, [*held, *given]), plan.peak(_ALONE, side)
        off = f"{100 * (planned / peak - 1):+.1f} %"
        yield Check(f"peak memory, {side.name}", _gib(peak), f"{_gib(planned)} by plan.py ({off})")
    yield from _generation(model.eval(), case, inputs, device, plan.sides[1].schedule, new_tokens)


def _generation(
    model: nn.Module, case: Case, inputs: dict[str, Any], device: torch.device, schedule: PruningSchedule, new: int
) -> Iterator[Check]:
    """The clock, `generate` against a forward pass over all that it wrote, and its cache against the cost model."""
    base, batch = base_model(model), case.batch
    base.generation_config.update(pad_token_id=0, eos_token_id=None, do_sample=False)  # never stops early

    @torch.no_grad()
    def generate() -> Any:
        with torch.autocast(device.type, HALF):
            return base.generate(
                **prompt_inputs(base, inputs), max_new_tokens=new, return_dict_in_generate=True, output_logits=True
            )

    for which, one in (("dense", PruningSchedule()), ("pruned", schedule)):
        task = Task(generate, partial(running, model, one))
        seconds = min(time_once(task, device) for _ in range(2))
        yield Check(f"generate, {which}", f"{batch.rows * new / seconds:.0f} tokens/s")
    begun = time.perf_counter()
    share = time_once(Task(generate), device) / (time.perf_counter() - begun)
    yield Check("clock of the device / wall clock", f"{share:.3f}", "0.9 to 1", 0.9 <= share <= 1.001)
    even = PruningSchedule(tuple(PruningStage(stage.layer, "uniform", keep=stage.keep) for stage in schedule.stages))
    with running(model, even), torch.no_grad(), torch.autocast(device.type, HALF):
        out = generate()
        labels = out.sequences.clone()
        labels[:, : batch.length] = -100
        whole = {**inputs, "input_ids": out.sequences, "attention_mask": torch.ones_like(labels)}
        again = base(**prompt_inputs(base, whole), labels=labels, use_cache=False).logits[:, batch.length - 1 : -1]
    yield close("generate: logits", torch.stack(out.logits, 1).float(), again.float(), "one pass over all")
    tokens, found = batch.text_tokens + new - 1, cache_bytes(out.past_key_values)
    expected = batch.rows * schedule_cost(even, case.config, batch.image_tokens, tokens, HALF.itemsize).kv_bytes
    yield Check("generate: cache", f"{found} B", f"{expected} B by the cost model", found == expected)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
