"""What a run shows while it trains: loss, speed, image tokens kept, waiting for data, padding."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from himap_train.data.loader import WAITED
from himap_train.models.install import pruning_of
from himap_train.training.run.launch import say

HINT_ABOVE = 0.05
"""Share of the training time spent waiting, or of padding, above which a hint is printed."""


def step_ended(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer has stepped after this micro-batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def between_steps(trainer: Trainer) -> bool:
    """Whether no gradient of a window that goes on is held, which no checkpoint has: a validation may begin within."""
    return step_ended(trainer, trainer.fit_loop.epoch_loop.batch_idx)


def stops(trainer: Trainer) -> bool:
    """Whether no more is trained, and not only asked to stop before `min_epochs` or `min_steps`."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def logs_now(trainer: Any, batch_idx: int) -> bool:
    """Whether Lightning hands its metrics to the loggers after this micro-batch."""
    return step_ended(trainer, batch_idx) and trainer.global_step % trainer.log_every_n_steps == 0


def peak_memory() -> float:
    """The most memory, in GiB, that this process has had: of its GPU, or without one of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Throughput(Callback):
    """Logs `tokens/s` (image tokens as loaded, padding left out), `s/step` (an optimizer step), `min left` at this
    rate without validations, `memory GiB` (see `peak_memory`), `image tokens kept`, the fraction behind the last
    stage, and `train/kept_stage0` and so on: image tokens of a sample with images after each stage, mean since the last
    time. These counts lie on the host since the forward pass. Not Lightning's `ThroughputMonitor`, which waits for the
    GPU after every micro-batch, wants the tokens of each on the host, and shows nothing in the progress bar.

    And what the data costs: `data/wait`, the share of the time since the last log that was spent waiting for batches,
    and for each epoch `data/padding_waste`, the share of padding among all positions; says both at the end. The loader
    notes in each batch how long the training process waited for it. On a GPU, which may still compute while the process
    waits, the share is an upper bound of what is lost.
    """

    def __init__(self) -> None:
        self._pruned = False  # whether a step was
        self._kept: list[int] = []
        self._samples = 0
        self._since: float | None = None
        self._steps = 0  # that were done at that time
        self._waited = 0.0  # seconds since then
        self._total = [0.0, 0.0]  # seconds waited, seconds
        self._tokens: Any = 0  # of the epoch; a tensor on the device: adding up there waits for nothing
        self._told: Any = 0  # of them, before the clock was started
        self._positions = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Workers start anew: the first batch comes late, once."""
        self._since, self._tokens, self._positions = None, 0, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock where it is stopped; then the wait for this batch lies before."""
        if self._since is None:
            self._start(trainer)
        else:
            self._waited += batch.get(WAITED, 0.0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the clock where the loggers are fed, so that the GPU is not waited for more often than anyway."""
        self._tokens = self._tokens + batch["attention_mask"].sum()
        self._positions += batch["attention_mask"].numel()
        pruning = pruning_of(pl_module.peft_model)
        counts = pruning.last if pruning else None
        if counts and counts.kept and counts.image_tokens:
            self._pruned = True
            pl_module.log("image tokens kept", counts.kept[-1] / counts.image_tokens, prog_bar=True)
            if len(self._kept) != len(counts.kept):  # also where the schedule has changed since
                self._kept, self._samples = [0] * len(counts.kept), 0
            self._kept = [old + new for old, new in zip(self._kept, counts.kept, strict=True)]
            self._samples += int((counts.image_rows > 0).sum())
        elif pruning and counts is None and (self._pruned or pl_module.schedule.stages):
            pl_module.log("image tokens kept", 1.0, prog_bar=True)  # a dense step of a pruned run
        if self._samples and logs_now(trainer, batch_idx):
            for stage, kept in enumerate(self._kept):
                pl_module.log(f"train/kept_stage{stage}", kept / self._samples)
            self._kept, self._samples = [], 0
        if self._since is not None and logs_now(trainer, batch_idx):
            tokens = float(self._tokens - self._told)  # the device first: the clock must see its work
            waited, seconds = self._read()
            per_step = seconds / max(trainer.global_step - self._steps, 1)
            left = (trainer.estimated_stepping_batches - trainer.global_step) * per_step / 60
            figures = {"tokens/s": tokens * trainer.world_size / seconds, "data/wait": waited / seconds}
            figures |= {"s/step": per_step, "memory GiB": peak_memory()}
            figures |= {"min left": left} if math.isfinite(left) else {}  # a loader may be endless
            pl_module.log_dict(figures, prog_bar=True)
            self._start(trainer)  # waiting for the next batch counts

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Padding of the epoch, or of what max_steps has left of it, on all ranks."""
        self._stop()
        counts = torch.stack([torch.as_tensor(float(self._tokens)), torch.as_tensor(float(self._positions))]).double()
        tokens, positions = trainer.strategy.reduce(counts.to(pl_module.device), reduce_op="sum").tolist()
        if not positions:
            return  # resumed at its end
        waste = 1 - tokens / positions
        pl_module.log("data/padding_waste", waste)
        grouped = getattr(getattr(trainer, "datamodule", None), "group_by_length", None)
        way = "; data.group_by_length true saves most of it" if waste > HINT_ABOVE and grouped is False else ""
        say(f"epoch {trainer.current_epoch}: {100 * waste:.1f} % of the positions were padding{way}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how long the slowest rank waited, with the way out where that is long."""
        self._stop()
        waited, seconds = self._total
        own = torch.tensor(waited / max(seconds, 1e-9), dtype=torch.float32, device=pl_module.device)
        share = float(trainer.strategy.reduce(own, reduce_op="max"))
        workers = getattr(getattr(trainer, "datamodule", None), "num_workers", None)
        hint = share > HINT_ABOVE and workers is not None
        way = f"; raise data.num_workers (it is {workers}) if cores are idle" if hint else ""
        say(f"waited for data {100 * share:.1f} % of the training time{way}")

    def _start(self, trainer: Trainer) -> None:
        self._since, self._waited = time.perf_counter(), 0.0
        self._told, self._steps = self._tokens, trainer.global_step

    def _stop(self) -> None:
        if self._since is not None:
            self._read()
        self._since = None

    def _read(self) -> tuple[float, float]:
        """Seconds waited and seconds since the clock was started; adds them up."""
        assert self._since is not None
        waited, seconds = self._waited, max(time.perf_counter() - self._since, 1e-9)
        self._total = [self._total[0] + waited, self._total[1] + seconds]
        return waited, seconds


class ProgressLines(Callback):
    """One line each time the loggers are fed, where there is no terminal to draw a bar on."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print step, loss, learning rate and speed."""
        if trainer.is_global_zero and logs_now(trainer, batch_idx):
            shown = [f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items()]
            print(f"step {trainer.global_step} of {trainer.estimated_stepping_batches}: {', '.join(shown)}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation's metrics."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            print(f"validation at step {trainer.global_step}: {found}", flush=True)
