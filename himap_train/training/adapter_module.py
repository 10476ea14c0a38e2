"""A LightningModule around a LLaVA of which only an adapter is trained: its checkpoints hold that, and nothing else.

`schedule` is what the adapter is trained for and saved with, and what is installed on the decoder. Training steps may
run another one (a curriculum, elastic training); the decoder has its own back after each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from peft import PeftModel
from torch import Tensor

from himap_train.checkpoints.adapter import CHECKPOINT_KEY, FACTS_SHAPE, adapter_facts
from himap_train.checkpoints.ranking import give_ranking
from himap_train.checkpoints.same_base import require_same_base
from himap_train.models.families import family_of
from himap_train.models.features import hidden_states
from himap_train.models.guard import check_pruned, check_trained_weights
from himap_train.models.install import change_schedule, pruning_of, running
from himap_train.models.stock import base_model
from himap_train.pruning.schedule import PruningSchedule
from himap_train.structured import check_shape
from himap_train.training.run.resume_split import begin_next_epoch, continue_in_this_split


@dataclass(frozen=True)
class Teacher:
    """A pass without gradients over the same batch and weights, which the trained pass is also drawn to.

    Attributes:
        schedule: Under which it runs.
        weight: That of the divergence beside the cross-entropy.
    """

    schedule: PruningSchedule
    weight: float


@dataclass(frozen=True)
class Step:
    """What one optimizer step runs.

    Attributes:
        schedule: That of the pass that is trained.
        teacher: A pass before it without gradients, whose answers it should also give; None for none.
        figures: What the loggers are told about it.
        ratios: The schedule's ratios of all layers, where these get a gradient; see `running`.
    """

    schedule: PruningSchedule
    teacher: Teacher | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    ratios: Tensor | None = None


class AdapterModule(LightningModule):
    """The model, its modes and its checkpoints.

    Attributes:
        llava: None until it is loaded.
        schedule: What is saved with the adapter.
    """

    def __init__(self, schedule: PruningSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self._step: Step | None = None
        self.strict_loading = False  # checkpoints hold trained weights only; on_load_checkpoint checks those
        self.llava: PeftModel | None = None

    @property
    def peft_model(self) -> PeftModel:
        """The model, once `configure_model` has loaded it."""
        if self.llava is None:
            raise RuntimeError("the model is not loaded yet; call configure_model() first")
        return self.llava

    @property
    def vision_tower(self) -> torch.nn.Module:
        """The vision tower of the loaded model."""
        base = base_model(self.peft_model)
        return cast(torch.nn.Module, family_of(base).vision(base))

    def train(self, mode: bool = True) -> AdapterModule:
        """As `nn.Module.train`, but a frozen vision tower stays in evaluation mode."""
        super().train(mode)
        if self.llava is not None and not any(p.requires_grad for p in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    def on_fit_start(self) -> None:
        """Hugging Face models load in evaluation mode, in which nothing is checkpointed and dropout is off."""
        self.train()

    def adopt(self, schedule: PruningSchedule) -> None:
        """Train for another schedule from now on: the one that is installed and saved.

        Raises:
            ValueError: A stage lies outside the decoder, or the model has lost its pruner.
        """
        change_schedule(self.peft_model, schedule)
        self.schedule = schedule

    def use_step(self, step: Step) -> None:
        """Let the next training steps run this, until they are told otherwise."""
        self._step = step

    @property
    def running_schedule(self) -> PruningSchedule:
        """What the training step runs."""
        return self._step.schedule if self._step else self.schedule

    @contextmanager
    def running_step(self, step: Step | None) -> Iterator[None]:
        """The schedule of a step inside the block; the module's own where it is None.

        Raises:
            RuntimeError: The decoder had not the module's own before.
        """
        pruning = pruning_of(self.peft_model)
        if self.schedule != (pruning.schedule if pruning else PruningSchedule()):
            raise RuntimeError(
                f"the model has lost its pruner or runs another schedule than {self.schedule}; found {pruning}"
            )
        with nullcontext() if step is None else running(self.peft_model, step.schedule, step.ratios):
            yield

    def teacher_states(self, batch: dict[str, Any], schedule: PruningSchedule) -> Tensor:
        """What a pass under a schedule gives for a batch, without gradients, (B, S, D)."""
        with running(self.peft_model, schedule), torch.no_grad():
            states = self.states(batch)
        torch.clear_autocast_cache()  # older torch uses weights that were cast here again: without gradients
        return states

    def states(self, batch: dict[str, Any]) -> Tensor:
        """Final decoder states (B, S, D) of a batch.

        Raises:
            RuntimeError: The schedule that runs now says that image tokens go, and they did not.
        """
        pruning = pruning_of(self.peft_model)
        before, schedule = (pruning.last, pruning.schedule) if pruning else (None, self.schedule)
        image_tokens = batch["input_ids"] == base_model(self.peft_model).config.image_token_id
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "images", "labels")}
        hidden = hidden_states(self.peft_model, **inputs, image_features=batch.get("image_features"))
        check_pruned(schedule, pruning_of(self.peft_model), before, image_tokens)
        return hidden

    def trained_names(self) -> set[str]:
        """Names of the trained parameters in this module's state dict."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained weights only, the rest is where it was loaded from; and what makes an adapter of them."""
        checkpoint[CHECKPOINT_KEY] = adapter_facts(self.peft_model, self.schedule)
        names = self.trained_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}

    def take_ranking(self, checkpoint: dict[str, Any]) -> None:
        """Rank at learned stages as a training checkpoint did."""
        ranking = checkpoint.get(CHECKPOINT_KEY, {}).get("ranking") or {}
        give_ranking(self.peft_model, ranking, self.schedule, "the checkpoint")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Not strict about what is absent by design, but strict about what was trained."""
        facts = checkpoint.get(CHECKPOINT_KEY)  # None: of an early version
        if facts is not None:
            check_shape(facts, FACTS_SHAPE, "the checkpoint", CHECKPOINT_KEY)
            config = base_model(self.peft_model).config
            name = str(self.peft_model.peft_config["default"].base_model_name_or_path)
            require_same_base(facts["base"], config, name, facts["peft"]["base_model_name_or_path"])
        check_trained_weights(set(checkpoint["state_dict"]), self.trained_names())
        self.take_ranking(checkpoint)
        if self._trainer:
            continue_in_this_split(checkpoint, getattr(self.trainer, "datamodule", None))
            begin_next_epoch(checkpoint, by_steps=self.trainer.max_steps != -1)
