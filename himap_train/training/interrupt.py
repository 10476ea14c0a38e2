"""Ctrl-C: finish the optimizer step, save, and say how to go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from himap_train.training.progress import step_ended


class Interrupted(Exception):
    """Training was stopped by the user, and what was trained is saved."""


class SaveOnInterrupt(Callback):
    """On SIGINT, save when the running optimizer step is done, then raise `Interrupted`. A second one stops at once.

    Args:
        checkpoint: Where to save.
        how_to_resume: The command that goes on from there.
    """

    def __init__(self, checkpoint: Path, how_to_resume: str) -> None:
        self.checkpoint = checkpoint
        self.how_to_resume = how_to_resume
        self.requested = False
        self._process = os.getpid()
        self._previous: Any = signal.default_int_handler
        self._listening = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the data loaders' workers are forked, so that they do not die of the same Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
            self._listening = True

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a forked worker; the main process decides
        if self.requested or not self._listening:
            self._previous(number, frame)
            return
        self.requested = True
        print("\nCtrl-C: saving after this step; once more to stop at once without saving", file=sys.stderr, flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Only where an optimizer step ends: gradients of half a window are not in a checkpoint."""
        if step_ended(trainer, batch_idx):
            self._stop_if_requested(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A validation may take long."""
        if not trainer.sanity_checking:
            self._stop_if_requested(trainer)

    def _stop_if_requested(self, trainer: Trainer) -> None:
        # Ctrl-C in a terminal reaches all ranks, but not in the same step.
        if trainer.strategy.reduce_boolean_decision(self.requested, all=False):
            trainer.save_checkpoint(self.checkpoint)
            raise Interrupted(
                f"saved {self.checkpoint} at step {trainer.global_step}; go on with:\n  {self.how_to_resume}"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C its meaning back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out after an error; instead it puts our handler back after this."""
        self._restore()

    def _restore(self) -> None:
        if self._listening:
            signal.signal(signal.SIGINT, self._previous)
            self._listening = False
