"""What the data costs a run: waiting for the loader, and padding.

The loader notes in each batch how long the training process waited for it. On a GPU, which may still compute while the
process waits, the share is an upper bound of what is lost.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from himap_train.data.windows import WAITED
from himap_train.training.callbacks.progress import logs_now
from himap_train.training.run.launch import say

HINT_ABOVE = 0.05
"""Share of the training time spent waiting above which a hint is printed."""


class DataCosts(Callback):
    """Logs `data/wait`, the share of the time since the last log that was spent waiting for batches, and for each epoch
    `data/padding_waste`, the share of padding among all positions; says both at the end.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._waited = 0.0
        self._total = [0.0, 0.0]  # seconds waited, seconds
        self._tokens: Any = 0  # a tensor on the device: adding up there waits for nothing
        self._positions = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Workers start anew: the first batch comes late, once."""
        self._since, self._tokens, self._positions = None, 0, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock where it is stopped; then the wait for this batch lies before."""
        if self._since is None:
            self._since, self._waited = time.perf_counter(), 0.0
        else:
            self._waited += batch.get(WAITED, 0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and read the clock where the loggers are fed."""
        self._tokens = self._tokens + batch["attention_mask"].sum()
        self._positions += batch["attention_mask"].numel()
        if self._since is not None and logs_now(trainer, batch_idx):
            waited, seconds = self._read()
            pl_module.log("data/wait", waited / seconds, prog_bar=True)
            self._since, self._waited = time.perf_counter(), 0.0

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
