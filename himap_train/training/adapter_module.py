"""A LightningModule around a LLaVA of which only an adapter is trained: its checkpoints hold that, and nothing else."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from peft import PeftModel

from himap_train.export.adapter import CHECKPOINT_KEY, adapter_facts
from himap_train.models.llava import base_llava
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.guard import check_trained_weights
from himap_train.training.place import begin_next_epoch, continue_in_this_split


class AdapterModule(LightningModule):
    """The model, its modes and its checkpoints.

    Attributes:
        llava: None until it is loaded.
        schedule: What is saved with the adapter.
    """

    schedule: PruningSchedule

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold trained weights only; on_load_checkpoint checks those
        self.llava: PeftModel | None = None

    @property
    def peft_model(self) -> PeftModel:
        """The model, once `configure_model` has loaded it."""
        if self.llava is None:
            raise RuntimeError("the model is not loaded yet; call configure_model() first")
        return self.llava

    def train(self, mode: bool = True) -> AdapterModule:
        """As `nn.Module.train`, but the frozen vision tower stays in evaluation mode."""
        super().train(mode)
        if self.llava is not None:
            base_llava(self.llava).model.vision_tower.eval()
        return self

    def trained_names(self) -> set[str]:
        """Names of the trained parameters in this module's state dict."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained weights only, the rest is where it was loaded from; and what makes an adapter of them."""
        checkpoint[CHECKPOINT_KEY] = adapter_facts(self.peft_model, self.schedule)
        names = self.trained_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Not strict about what is absent by design, but strict about what was trained."""
        check_trained_weights(set(checkpoint["state_dict"]), self.trained_names())
        if self._trainer:
            continue_in_this_split(checkpoint, getattr(self.trainer, "datamodule", None))
            if self.trainer.max_steps != -1:
                begin_next_epoch(checkpoint)
