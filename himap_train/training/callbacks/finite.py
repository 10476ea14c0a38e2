"""The end of a run whose loss or gradient is not finite: before its optimizer steps, in all processes together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from himap_train.checkpoints.finite import NonFiniteError, not_finite
from himap_train.training.callbacks.checkpoints import newest_good
from himap_train.training.callbacks.progress import step_ended

PATIENCE = 20
"""Steps in a row that may be skipped under fp16's loss scaling, which starts at 2**16 and halves with each of them."""


class GradientNorm(Callback):
    """Logs `train/grad_norm`, that of the whole gradient before clipping, once in an optimizer step, and ends training
    where it or the loss is not finite.

    Both are those of all processes, so all of them end. Comes before what saves and shows metrics. Under ZeRO no
    process has the whole gradient, but the strategy knows its norm after the step. Not Lightning's `grad_norm`, which
    computes and keeps a norm for every parameter and knows nothing of ZeRO.

    Args:
        checkpoints: Where the run's checkpoints are, for the message.
    """

    def __init__(self, checkpoints: Path | None = None) -> None:
        self.checkpoints = checkpoints
        self._skipped = 0
        """Steps in a row that the loss scaling has skipped."""
        self._stepped = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Where gradients are ordinary tensors; under ZeRO the loss alone.

        Raises:
            NonFiniteError: Says what is not finite, what was kept and the way out.
        """
        seen = {"loss": torch.as_tensor(getattr(pl_module, "step_loss", 0.0), device=pl_module.device)}
        if not hasattr(trainer.strategy, "gradient_norm"):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            seen["gradient norm"] = torch.nn.utils.get_total_norm(gradients).to(pl_module.device)
            pl_module.log("train/grad_norm", seen["gradient norm"])
        self._require_finite(trainer, pl_module, seen)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Under ZeRO, after the step."""
        strategy: Any = trainer.strategy
        if hasattr(strategy, "gradient_norm") and step_ended(trainer, batch_idx):
            found = strategy.gradient_norm()
            norm = torch.tensor(float("nan") if found is None else float(found))
            pl_module.log("train/grad_norm", norm)
            self._require_finite(trainer, pl_module, {"gradient norm": norm})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise NonFiniteError where every single step was skipped: nothing has been trained."""
        if self._skipped and not self._stepped:
            raise NonFiniteError(f"all {self._skipped} steps had a gradient that is not finite: nothing was trained")

    def _require_finite(self, trainer: Trainer, pl_module: LightningModule, seen: dict[str, Tensor]) -> None:
        if bool(torch.isfinite(torch.stack([value.double() for value in seen.values()])).all()):
            self._skipped, self._stepped = 0, True
            return
        self._skipped += 1
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled and self._skipped <= PATIENCE:
            return
        found = " and the ".join(f"{name} is {float(value)}" for name, value in seen.items())
        raise NonFiniteError(
            f"step {trainer.global_step + 1}: the {found}"
            + (f", as in the {PATIENCE} steps before, which the loss scaling has skipped" if scaled else "")
            + f"; training has ended and nothing was saved of it.{_cause(pl_module)}{self._kept()} Usual reasons: a "
            "learning rate too high (model.lora_lr, model.projector_lr), no clipping (trainer.gradient_clip_val), "
            "fp16 where bf16-mixed is needed"
        )

    def _kept(self) -> str:
        good = newest_good(self.checkpoints) if self.checkpoints is not None else None
        return f" The last good checkpoint is {good}; recipes/export.py makes an adapter of it." if good else ""


def _cause(module: LightningModule) -> str:
    """The first weight that is not finite, or the first gradient."""
    weight = not_finite(module.named_parameters())
    if weight:
        return f" The model itself is broken, {weight}: fetch it again, or load it in bf16."
    gradient = not_finite((name, p.grad) for name, p in module.named_parameters() if p.grad is not None)
    return f" The first such gradient is that of {gradient}." if gradient else ""
