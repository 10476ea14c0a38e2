"""Training checkpoints: written atomically, the last and the best, and what a resumed run must agree with."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from himap_train.checkpoints.adapter import CHECKPOINT_KEY
from himap_train.checkpoints.finite import require_finite
from himap_train.ranges import require_possible
from himap_train.storage import atomic_file
from himap_train.structured import check_shape
from himap_train.training.callbacks.progress import between_steps, step_ended, stops
from himap_train.training.precision import full_precision

logger = logging.getLogger(__name__)

CONFIG_KEY = "himap_config"
MAY_DIFFER = (
    # where it runs and what it shows, not what it computes
    "output",
    "loggers",
    "evaluation",
    "keep",
    "save_every",
    "data.num_workers",
    "data.cache_image_features",
    "data.batch_size",  # with trainer.accumulate_grad_batches and the processes: the global batch, see check_same_order
    "data.eval_batch_size",
    "data.validation",
    "data.test",
    "data.validation_limit",
    "data.test_limit",
    "data.max_skipped",
    "trainer",
)
BUT_NOT = ("trainer.precision", "trainer.gradient_clip_val")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old checkpoint and then moves the new one over it; reads weights and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one file.

        Raises:
            OSError: It could not be written; names the checkpoint that is still good.
            NonFiniteError: A weight is nan or inf; the checkpoint that was there stays.
        """
        target = Path(path)
        way_out = "The checkpoint before it was kept; train anew with a lower model.lora_lr"
        ranking = checkpoint.get(CHECKPOINT_KEY, {}).get("ranking") or {}
        weights = [*checkpoint.get("state_dict", {}).items(), *ranking.items()]
        require_finite(weights, f"{target} was not saved: the model", way_out)
        with atomic_file(target, lambda: newest_good(target.parent) or target) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Read one file, never code from it."""
        return super().load_checkpoint(path, map_location, weights_only=True)


class SaveLast(Checkpoint):
    """`last.ckpt` after each validation, at the end of each epoch and of training, and every so many optimizer steps.

    Where a validation lies within an optimizer step, when that has ended: its gradients are in no checkpoint.
    """

    def __init__(self, file: Path, every_n_steps: int | None = None) -> None:
        require_possible({"save_every": every_n_steps})
        self.file = file
        self.every_n_steps = every_n_steps
        self._validated = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where an optimizer step ends; the last one may lie within an epoch, and where `max_time` stops within one."""
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        last = trainer.global_step == trainer.max_steps
        if stops(trainer) or (step_ended(trainer, batch_idx) and (due or last or self._validated)):
            trainer.save_checkpoint(self.file)
            self._validated = False
        if last:  # Lightning validates where it is told to stop, but not where max_steps ends within an epoch
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Within training only."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            if between_steps(trainer) or stops(trainer):
                trainer.save_checkpoint(self.file)
            else:
                self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also where nothing is validated, but not where max_steps has cut the epoch: it would count as done."""
        if trainer.is_last_batch:
            trainer.save_checkpoint(self.file)


class RememberConfig(Callback):
    """Puts the resolved config into every checkpoint. On resume it was compared, never taken over."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called for every checkpoint."""
        checkpoint[CONFIG_KEY] = self.config


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A training checkpoint, its tensors left on the disk until they are used.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no whole checkpoint. Both name the newest good one beside it.
    """
    if not file.is_file():
        reason = "a checkpoint is one file, this is a folder" if file.is_dir() else "leave out --resume to start anew"
        raise FileNotFoundError(f"there is no checkpoint {file} to resume from{_other_good(file)}; {reason}")
    try:
        return _read(file)
    except _DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the checkpoint {file} is damaged or incomplete ({reason}){_other_good(file)}") from error


def newest_good(folder: Path, but: Path | None = None) -> Path | None:
    """The checkpoint of the highest step in a folder; damaged ones are reported and passed over."""
    found: list[tuple[int, bool, Path]] = []
    for file in sorted(folder.glob("*.ckpt")):
        if file == but or not file.is_file():
            continue
        try:
            step = _read(file).get("global_step", -1)
            if not isinstance(step, int):
                raise ValueError(f"its global_step is {step!r}; expected a number")
        except _DAMAGE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("the checkpoint %s is damaged or incomplete (%s); passed over", file, reason)
        else:
            # Of the same step the last one, which remembers which the best was.
            found.append((step, file.stem.startswith("last"), file))
    return max(found)[-1] if found else None


_DAMAGE = (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError, TypeError)


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    check_shape(found, {"state_dict": dict, "optimizer_states": list, "loops": dict}, str(file))
    return found


def _other_good(file: Path) -> str:
    other = newest_good(file.parent, but=file)
    return f"; {other} is good: --resume {other}" if other else ""


def refuse_other_config(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint was made with this config, as far as it decides what is computed.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is damaged, or the config differs; lists the keys.
    """
    saved = read_checkpoint(checkpoint).get(CONFIG_KEY)
    if saved is None:
        raise ValueError(f"{checkpoint} holds no config; it was not written by finetune.py")
    then, now = _flat(saved), _flat(config)
    then["trainer.precision"] = full_precision(then.get("trainer.precision"))  # which earlier versions kept as given
    differing = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key) and _matters(key)]
    if differing:
        lines = [f"  {key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in differing]
        raise ValueError(
            "\n".join([f"{checkpoint} was made with another config:", *lines])
            + "\nGive the config of that run (config.yaml in its folder), or start anew with another --output"
        )


def _matters(key: str) -> bool:
    """Whether a key decides what is computed."""
    return _below(key, BUT_NOT) or not _below(key, MAY_DIFFER)


def _below(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return result
