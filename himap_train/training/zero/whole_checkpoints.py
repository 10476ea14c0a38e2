"""Checkpoints of a ZeRO run: the one file that every other strategy writes, in place of folders of shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import nn
from torch.optim import Optimizer

from himap_train.training.zero.gather import load_optimizer_state, optimizer_state, set_full_value, trained_state


class WholeCheckpoints(DeepSpeedStrategy):
    """Gathers trained weights and moments for a checkpoint, and spreads them again when one is loaded."""

    _groups: list[list[nn.Parameter]]
    """The parameters of each group of the optimizer, before DeepSpeed flattened them."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, whole, in the first process."""
        assert self.lightning_module is not None
        return trained_state(self.lightning_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As torch's AdamW would have it on one device."""
        return optimizer_state(self.deepspeed_engine.optimizer, self._groups)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """One file, as every other strategy."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """That file."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put trained weights where ZeRO keeps them."""
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        for name, value in checkpoint["state_dict"].items():
            set_full_value(parameters[name], value)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes: it is in the file."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Spread AdamW's moments over the processes."""
        load_optimizer_state(self.deepspeed_engine.optimizer, self._groups, checkpoint["optimizer_states"][0])
