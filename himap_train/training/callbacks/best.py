"""The best checkpoint of a run by a validation metric, and what must be there to say which that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from himap_train.training.callbacks.checkpoints import SaveLast


class Best(ModelCheckpoint):
    """`best.ckpt`. A user's own ModelCheckpoint of the same metric has another name in checkpoints."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Under the name that it had in earlier checkpoints too."""
        states, earlier = checkpoint.get("callbacks", {}), self.state_key.replace("Best", "ModelCheckpoint", 1)
        if self.state_key not in states and earlier in states:
            states[self.state_key] = states[earlier]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also where the run's folder has been moved: Lightning would forget what was best, and write over it."""
        here = Path(str(self.dirpath))
        if state_dict.get("dirpath") != str(here) and (here / "best.ckpt").is_file():
            moved = {name: _below(here, state_dict.get(name)) for name in _PATHS}
            scores = {_below(here, path): score for path, score in state_dict.get("best_k_models", {}).items()}
            state_dict = {**state_dict, **moved, "best_k_models": scores, "dirpath": str(here)}
        super().load_state_dict(state_dict)


_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


def _below(folder: Path, path: str | None) -> str:
    """A file of the same name in a folder; none stays none."""
    return str(folder / Path(path).name) if path else ""


def last_and_best(folder: Path, every_n_steps: int | None, monitor: str, mode: str) -> list[Callback]:
    """`best.ckpt` by a validation metric, then `last.ckpt`, which remembers which the best was."""
    best = Best(
        dirpath=folder,
        filename="best",
        monitor=monitor,
        mode=mode,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return [best, SaveLast(folder / "last.ckpt", every_n_steps)]


def require_best(validation: Any, learnable: Any, batches: float | None) -> None:
    """Refuse to keep the best weights where nothing says which these are, or where they go with no saved schedule.

    Args:
        validation: `data.validation`.
        learnable: `pruning.learnable`.
        batches: `trainer.limit_val_batches`.

    Raises:
        ValueError: Naming both keys and the way out.
    """
    if validation is None or batches == 0:
        nothing = "data.validation is null" if validation is None else "trainer.limit_val_batches is 0"
        raise ValueError(
            f"keep is best, but {nothing}, so nothing says which weights are best: give validation "
            "data (a share of the training data: --data.validation 0.05), or keep: last"
        )
    if learnable is not None:
        raise ValueError(
            "keep is best, but pruning.learnable freezes its keep ratios at the end, and the best weights may be "
            "of earlier ones: give keep: last"
        )
