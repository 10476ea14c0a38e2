"""What a run of several processes needs around Lightning's launchers.

Processes come from Lightning itself (`--trainer.devices 2`: the first one starts the others when training starts, each
with the same command line), from torchrun, or from SLURM. What only one process may do, such as making the run folder,
is done by the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from himap_train.checkpoints.finite import NonFiniteError
from himap_train.processes import from_all
from himap_train.storage import told

_RANK = ("RANK", "SLURM_PROCID")
_RANK_BY_PARTS = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def is_first_process() -> bool:
    """Whether this is the process of rank 0, also before anything is set up."""
    ranks = [os.environ[name] for name in _RANK if name in os.environ][:1]
    ranks += [os.environ[name] for name in _RANK_BY_PARTS if name in os.environ and not ranks]
    return all(int(rank) == 0 for rank in ranks)


def say(*parts: object) -> None:
    """Print, in the first process only."""
    if is_first_process():
        print(*parts, sep="\n", flush=True)


@contextmanager
def together() -> Iterator[None]:
    """A block of all processes: raises OSError in all of them where it fails with one in any."""
    failure = None
    try:
        yield
    except OSError as error:
        failure = str(error)
    first = next((reason for reason in from_all(failure) if reason), None)
    if first:
        raise OSError(first)


def report_error(error: Exception, patience: float = 5.0) -> None:
    """Print an error: once where all processes have the same one, with its rank where only some do.

    The first process leaves its message in the store that joined the processes. The others look for it there, and print
    their own unless it is the same; what cannot be compared is printed.
    """
    text = f"error: {told(error)}"
    store, key = _shared_store(patience), f"himap_error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if is_first_process():
        print(text, file=sys.stderr, flush=True)  # before others learn of it: launchers may end this one when they end
        if store is not None:
            store.set(key, text)
        return
    try:
        if store is not None:
            store.wait([key], timedelta(seconds=patience))
            if store.get(key) == text.encode():
                return
    except RuntimeError:
        pass  # the first process goes on, or is gone
    ranks = [os.environ[name] for name in (*_RANK, "LOCAL_RANK") if name in os.environ]
    print(f"rank {dist.get_rank() if dist.is_initialized() else ranks[0]}: {text}", file=sys.stderr, flush=True)


def _shared_store(patience: float) -> Any:
    """What all processes can read and write; None before Lightning or SLURM have joined them."""
    if dist.is_initialized():
        return _get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, timeout=timedelta(seconds=patience), wait_for_workers=False)
    except RuntimeError:
        return None


def end_children(trainer: Trainer, patience: float = 20.0) -> None:
    """Wait for the processes that Lightning started here; end those that hang, as on an error of this one."""
    children: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    limit = time.monotonic() + patience
    for child in children:
        try:
            child.wait(max(limit - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            child.kill()


class AroundTraining(Callback):
    """Runs something before and after training, in all processes, on the model as it is set up for training.

    Outside `Trainer.fit` there may be no other processes yet, and a model whose weights are spread over them cannot
    run. Needs a `FineTuneTrainer`, which calls `after`.
    """

    def __init__(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        self.before, self.after = before, after

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also where a resumed run has nothing left to train.

        Raises:
            TypeError: Another trainer, which would leave out what comes after training.
        """
        if not isinstance(trainer, FineTuneTrainer):
            raise TypeError(f"AroundTraining needs a FineTuneTrainer, not a {type(trainer).__name__}")
        self.before()


class FineTuneTrainer(Trainer):
    """Lightning's Trainer, which all processes leave together when one of them cannot save, and in which what comes
    after training finds the model as it was trained.
    """

    def _run_stage(self) -> Any:
        """Lightning's, and what `AroundTraining` has to do after it; not after an error or an interruption.

        Lightning's own `on_fit_end` is too late: the strategy has let go by then. Weights are on the CPU, and
        transformers no longer know that ZeRO-3 spreads them.
        """
        result = super()._run_stage()
        if self.state.fn == TrainerFn.FITTING:
            self._signal_connector.teardown()  # a SIGTERM now ends the run: there are no more steps to wait for
            for callback in self.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, AroundTraining):
                    callback.after()
        return result

    def save_checkpoint(
        self, filepath: Any, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Save; only the first process writes.

        Raises:
            OSError: In all processes: it could not be written.
            NonFiniteError: In all processes: a weight is nan or inf.
        """
        checkpoint = self._checkpoint_connector.dump_checkpoint(bool(weights_only))
        failure: tuple[type[Exception], str] | None = None
        try:
            self.strategy.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        except (OSError, NonFiniteError) as error:
            failure = NonFiniteError if isinstance(error, NonFiniteError) else OSError, str(error)
        failure = self.strategy.broadcast(failure)
        if failure:
            raise failure[0](failure[1])
