"""Whether an exported model computes what the checkpoint computes that it was made from.

`python -m himap_train.checkpoints.agreement FOLDER RESULTS` is the other side: a process that has seen nothing of the
first model.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor

from himap_train.checkpoints.load import load_checkpoint
from himap_train.checkpoints.source import adapter_source
from himap_train.checkpoints.weight_files import read_infos
from himap_train.data.encode import Encoder
from himap_train.data.records import Conversation, Turn
from himap_train.models.features import prompt_inputs
from himap_train.models.install import pruning_of, record_pruning, remove_pruning
from himap_train.models.loading import local_folder, stock_model
from himap_train.models.stock import base_model

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Norm of the difference of logits over their norm: merging rounds, the more the fewer bits the weights have."""

EXCHANGED = 0.25
"""Share of removed columns that may be others: rounding exchanges a few whose scores nearly tie."""


@dataclass(frozen=True)
class Outputs:
    """Results of one model on the example: dtype of its weights, or a narrower one of its files, logits (1, S, V) dense
    and pruned, columns kept by stage, whether their number follows the scores; of an adapter also the dense logits of
    its base.
    """

    dtype: str
    dense: Tensor
    pruned: Tensor
    kept: list[list[list[int]]]
    by_mass: bool = False
    untrained: Tensor | None = None


@dataclass(frozen=True)
class Agreement:
    """Difference of logits relative to them, both as norms; `same_kept`: every stage keeps the same tokens."""

    dense: float
    pruned: float
    same_kept: bool
    tolerance: float

    def __str__(self) -> str:
        others = "not compared: others are kept where scores nearly tie"
        kept = "the same image tokens kept" if self.same_kept else others
        return f"logits differ by {self.dense:.1e} dense and {self.pruned:.1e} pruned ({kept})"


def check_agreement(
    first: Path | str, second: Path | str, base: str | None = None, fresh_process: bool = False
) -> Agreement:
    """Load two checkpoints from disk, one after the other, and compare their logits on an image and a question.

    Args:
        first: Whatever `load_checkpoint` takes.
        second: The same, made from the first.
        base: Base model of adapters, where it is not at the place that they recorded.
        fresh_process: Load the second one in a process of its own.

    Raises:
        ValueError: They differ by more than rounding, the second has lost what was trained, they prune otherwise, or
            the second does not load as a stock model.
    """
    expected = outputs(first, base)
    gc.collect()  # two 13B models may not fit side by side
    found = _in_fresh_process(second, base) if fresh_process else outputs(second, base)
    same_kept = expected.kept == found.kept
    tolerance = max(TOLERANCE[expected.dtype], TOLERANCE[found.dtype])
    gaps = _gap(expected.dense, found.dense), _gap(expected.pruned, found.pruned)
    result = Agreement(*gaps, same_kept, tolerance)
    if not result.dense <= tolerance or (same_kept and not result.pruned <= tolerance):  # nan is no agreement
        raise ValueError(f"{second} does not compute what {first} computes: {result}, at most {tolerance} expected")
    # An adapter that was trained little changes less than rounding may: then it is by the base that a loss shows.
    if expected.untrained is not None and (left := _gap(expected.untrained, found.dense)) < gaps[0] / 2:
        raise ValueError(
            f"{second} computes what the base of {first} computes without the adapter (logits differ by {left:.1e} "
            f"from it, by {gaps[0]:.1e} from the adapter): what was trained is not in it, or is lost by rounding to "
            f"{found.dtype}, and then --dtype float32 keeps it"
        )
    if not _nearly_the_same(expected, found):
        counts = [[len(stage[0]) for stage in side.kept] for side in (expected, found)]
        raise ValueError(
            f"{second} does not keep the image tokens that {first} keeps: its stages keep {counts[1]} columns, "
            f"those of the first {counts[0]}; has the schedule been changed?"
        )
    return result


@torch.no_grad()
def outputs(path: Path | str, base: str | None = None) -> Outputs:
    """What a checkpoint computes, pruned as it was trained and then dense."""
    model: Any
    model, processor = load_checkpoint(path, base=base)
    inputs = _example(base_model(model), processor)
    with record_pruning(model) as trace, torch.random.fork_rng():
        torch.manual_seed(0)  # the criterion `random` draws
        pruned = model(**inputs).logits.float()
    kept = [[row.tolist() for row in stage] for stage in trace.kept]
    pruning = pruning_of(model)
    by_mass = pruning is not None and pruning.schedule.by_sample
    dense = remove_pruning(model)(**inputs).logits.float()
    untrained = None
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            untrained = model(**inputs).logits.float()
    dtypes = {next(model.parameters()).dtype}
    if adapter_source(path) is None:  # files may be narrower than what config.json says to load them as
        dtypes |= {info.dtype for info in read_infos(local_folder(path)) if info.dtype.is_floating_point}
    named = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return Outputs(max(named, key=lambda name: TOLERANCE.get(name, 0.0)), dense, pruned, kept, by_mass, untrained)


def require_stock_keys(folder: Path | str) -> None:
    """Load a folder with stock transformers.

    Raises:
        ValueError: Keys are missing, unexpected or of another shape.
    """
    _, wrong = stock_model(folder, dtype="auto")
    if any(wrong.values()):
        named = "; ".join(f"{len(keys)} {kind} {keys[:2]}" for kind, keys in wrong.items() if keys)
        raise ValueError(f"{folder} does not load as a stock LLaVA: {named}")


def _in_fresh_process(path: Path | str, base: str | None) -> Outputs:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outputs.pt"
        module = "himap_train.checkpoints.agreement"
        command = [sys.executable, "-m", module, str(path), str(file), *([base] if base else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{path} could not be loaded in a fresh process:\n{done.stderr.strip()[-2000:]}")
        return Outputs(**torch.load(file, weights_only=True))


def _main(path: str, results: str, base: str | None = None) -> None:
    """The fresh process: stock keys first, then what is computed."""
    if adapter_source(path) is None:
        require_stock_keys(path)
    torch.save(vars(outputs(path, base)), results)


def _example(model: Any, processor: Any) -> dict[str, Tensor]:
    """A noise image and a question, as a batch of one."""
    noise = torch.randint(0, 256, (336, 336, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    question = Turn("user", "<image>\nWhat is in the picture?")
    asked = Conversation("example", (Image.fromarray(noise.numpy()),), (question,))
    sample = Encoder(processor).encode_prompt(asked)
    ids = sample["input_ids"][None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "images": sample["images"][0]}
    return prompt_inputs(model, batch)


def _nearly_the_same(first: Outputs, second: Outputs) -> bool:
    """Whether the stages remove the same columns, but for a few whose scores nearly tie, or nearly reach the mass."""
    by_mass = first.by_mass and second.by_mass and len(first.kept) == len(second.kept)
    if not by_mass and [len(stage[0]) for stage in first.kept] != [len(stage[0]) for stage in second.kept]:
        return False
    columns = first.dense.shape[1]
    exchanged = [
        (max(len(set(a[0]) - set(b[0])), len(set(b[0]) - set(a[0]))), columns - len(a[0]))
        for a, b in zip(first.kept, second.kept, strict=True)
    ]
    return all(count <= max(1, EXCHANGED * removed) for count, removed in exchanged)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm()) if a.shape == b.shape else float("inf")


if __name__ == "__main__":
    _main(*sys.argv[1:])
