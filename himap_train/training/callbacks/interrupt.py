"""Ctrl-C, SIGTERM and SIGUSR1: finish the optimizer step, save, and say how to go on.

Clusters send SIGTERM or a signal of the user's choice some time before they end a job. One process that gets it is
enough: all of them decide together, once in an optimizer step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from himap_train.training.callbacks.progress import between_steps, step_ended


class Interrupted(Exception):
    """Training was stopped by the user, and what was trained is saved.

    Attributes:
        status: exit status, 128 and the signal's number.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class SaveOnInterrupt(Callback):
    """Save when the running optimizer step is done, then raise `Interrupted`. A second Ctrl-C stops at once.

    Args:
        checkpoint: Where to save.
        how_to_resume: The command that goes on from there.
    """

    def __init__(self, checkpoint: Path, how_to_resume: str) -> None:
        self.checkpoint = checkpoint
        self.how_to_resume = how_to_resume
        self.requested = 0
        """The number of the signal; 0 for none."""
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the data loaders' workers are forked, so that they do not die of the same Ctrl-C."""
        self._listen(signal.SIGINT)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In place of Lightning's handlers, which talk to other processes from within the signal handler."""
        self._listen(signal.SIGTERM)
        self._listen(signal.SIGUSR1)

    def _listen(self, number: int) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a forked worker; the main process decides
        previous = self._previous.get(number, signal.SIG_DFL)
        if number not in self._previous or (self.requested and number == signal.SIGINT):
            previous(number, frame) if callable(previous) else signal.default_int_handler(number, frame)
        elif not self.requested:
            self.requested = number
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            text = f"\n{name}: saving after this step; Ctrl-C once more to stop at once without saving"
            print(text, file=sys.stderr, flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Only where an optimizer step ends: gradients of half a window are not in a checkpoint."""
        if step_ended(trainer, batch_idx):
            self._stop_if_requested(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A validation may take long; one within an optimizer step goes on, as gradients are not in a checkpoint."""
        if not trainer.sanity_checking and between_steps(trainer):
            self._stop_if_requested(trainer)

    def _stop_if_requested(self, trainer: Trainer) -> None:
        # Ctrl-C in a terminal reaches all ranks, but not in the same step; other signals reach some.
        if trainer.strategy.reduce_boolean_decision(bool(self.requested), all=False):
            trainer.save_checkpoint(self.checkpoint)
            message = f"saved {self.checkpoint} at step {trainer.global_step}; go on with:\n  {self.how_to_resume}"
            raise Interrupted(message, 128 + (self.requested or signal.SIGTERM))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows needs no saving."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals their meaning back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out after an error; instead it puts our handler back after this."""
        self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
