"""The LightningModule: a LLaVA with LoRA, pruned by its schedule in every forward, and the loss on it.

Averaging. The loss of an optimizer step is the mean over all supervised tokens of its micro-batches and ranks, as if
they were one batch. So each micro-batch contributes its *sum*, divided by the number of tokens of the whole window on
all ranks. That number is known in time because the loader reads a window ahead (`himap_train.data.windows`). With the
mean of means instead (`loss_average="batch"`, what LLaVA's own trainer did) a batch of one-word answers weighs as much
as a batch of essays.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftModel
from torch import Tensor
from transformers import LlavaProcessor

from himap_train.checkpoint import read_schedule
from himap_train.data.windows import WINDOW_TOKENS
from himap_train.evaluation.schedule_argument import fit_preset, is_preset
from himap_train.export.adapter import CHECKPOINT_KEY, adapter_facts
from himap_train.models.llava import base_llava, hidden_states, install_pruning, pruning_of, weights_are_spread
from himap_train.models.loading import load_llava
from himap_train.models.lora import DECODER_LINEAR, Projector, attach_lora
from himap_train.models.quantize import Quantize
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.guard import check_pruned, check_trained_weights
from himap_train.training.loss import calls_needed, supervised_loss
from himap_train.training.optim import cosine_with_warmup, parameter_groups
from himap_train.training.place import begin_next_epoch, continue_in_this_split
from himap_train.training.progress import step_ended

_WEIGHTS = {"bf16": torch.bfloat16, "16": torch.float16}


def weights_dtype(precision: str) -> torch.dtype:
    """Dtype of the frozen weights under one of Lightning's precisions."""
    return _WEIGHTS.get(precision.split("-")[0], torch.float32)


class LlavaFineTuner(LightningModule):
    """Fine-tune a LLaVA with LoRA while its image tokens are pruned.

    Args:
        path: The model: a local folder or hub id in the Hugging Face layout, or "embedded".
        schedule: A preset's name (at the same relative depth in a decoder that is too short for it), the stages as a
            mapping, a `pruning.yaml`, or null for dense.
        lora_r: Rank of LoRA.
        lora_alpha: LoRA's update is scaled by `lora_alpha / lora_r`.
        lora_dropout: Dropout on the input of each LoRA branch.
        lora_targets: "decoder-linear", a list of endings such as [q_proj, v_proj], or a regular expression.
        projector: "train", "lora" or "freeze".
        lora_lr: Peak learning rate of LoRA.
        projector_lr: Peak learning rate of the projector.
        weight_decay: Decay of weight matrices; biases have none.
        warmup_ratio: Share of the optimizer steps in which the rate rises linearly; then it falls as a cosine.
        betas: AdamW's decay rates.
        gradient_checkpointing: Compute each decoder layer again in the backward pass instead of keeping it.
        attn_implementation: "sdpa", "eager", "flash_attention_2", or null for the model's own choice.
        quantize: "4bit" stores the frozen decoder in 4 bits (QLoRA; needs bitsandbytes and CUDA), null as it is.
        loss_average: "token" averages over all tokens of an optimizer step, "batch" over micro-batches.
        loss_chunk: Supervised positions whose logits exist at a time; 0 for all at once.
    """

    def __init__(
        self,
        path: str = "embedded",
        schedule: str | dict[str, Any] | None = "himap",
        lora_r: int = 128,
        lora_alpha: float = 256,
        lora_dropout: float = 0.05,
        lora_targets: str | list[str] = DECODER_LINEAR,
        projector: Projector = "train",
        lora_lr: float = 2e-4,
        projector_lr: float = 2e-5,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.999),
        gradient_checkpointing: bool = True,
        attn_implementation: str | None = None,
        quantize: Quantize | None = None,
        loss_average: Literal["token", "batch"] = "token",
        loss_chunk: int = 1024,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold trained weights only; on_load_checkpoint checks those
        self.path = path
        self.schedule = read_schedule(schedule)
        self._preset = is_preset(schedule)
        self.attach = partial(
            attach_lora, r=lora_r, alpha=lora_alpha, dropout=lora_dropout, targets=lora_targets, projector=projector
        )
        self.rates = {"lora_lr": lora_lr, "projector_lr": projector_lr, "weight_decay": weight_decay}
        self.warmup_ratio = warmup_ratio
        self.betas = betas
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.quantize = quantize
        self.loss_average = loss_average
        self.loss_chunk = loss_chunk
        self.llava: PeftModel | None = None
        self.processor: LlavaProcessor | None = None
        self._window_tokens, self._window_loss = 1.0, torch.zeros(())
        self._validation = torch.zeros(2, dtype=torch.float64)  # sum of losses, supervised tokens

    @property
    def peft_model(self) -> PeftModel:
        """The model, once `configure_model` has loaded it."""
        if self.llava is None:
            raise RuntimeError("the model is not loaded yet; call configure_model() first")
        return self.llava

    def configure_model(self) -> None:
        """Load the weights, attach LoRA, install the pruner. Lightning calls this on every rank; again does nothing."""
        if self.llava is not None:
            return
        model, self.processor = load_llava(
            self.path,
            dtype=self._weights_dtype(),
            attn_implementation=self.attn_implementation,
            quantize=self.quantize,
        )
        with torch.random.fork_rng(devices=[]):  # LoRA starts the same however the weights were loaded
            torch.manual_seed(torch.initial_seed())
            self.llava = self.attach(model)
        decoder = base_llava(self.llava).model.language_model
        if self.gradient_checkpointing:
            decoder.activation_checkpointing_enable({"use_reentrant": False})
        self.schedule = self.fitted_schedule(decoder.config.num_hidden_layers)
        install_pruning(self.llava, self.schedule)
        self.train()

    def fitted_schedule(self, layers: int) -> PruningSchedule:
        """The schedule for a decoder of so many layers: presets are written for 32."""
        return fit_preset(self.schedule, layers) if self._preset else self.schedule

    def _weights_dtype(self) -> torch.dtype:
        """Frozen weights in the trainer's precision; what is trained stays in fp32 (see `attach_lora`)."""
        return weights_dtype(str(self.trainer.precision) if self._trainer else "")

    def train(self, mode: bool = True) -> LlavaFineTuner:
        """As `nn.Module.train`, but the frozen vision tower stays in evaluation mode."""
        super().train(mode)
        if self.llava is not None:
            base_llava(self.llava).model.vision_tower.eval()
        return self

    def on_fit_start(self) -> None:
        """Hugging Face models load in evaluation mode, in which nothing is checkpointed and dropout is off."""
        self.train()

    def on_train_start(self) -> None:
        """Give a resumed loader its place in the epoch back.

        Lightning does so when it makes the loader, but the learning-rate schedule has asked for the number of batches
        before, when the checkpoint's loop states were not read yet. Without this the epoch starts again.
        """
        self.trainer.fit_loop._load_combined_loader_states()

    def batch_loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Sum of the losses of one batch and the number of supervised tokens.

        Raises:
            RuntimeError: The schedule says that image tokens go, and they did not.
        """
        pruning = pruning_of(self.peft_model)
        before = pruning.last if pruning else None
        image_tokens = batch["input_ids"] == base_llava(self.peft_model).config.image_token_id
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values", "labels")}
        inputs["image_features"] = batch.get("image_features")
        hidden = hidden_states(self.peft_model, **inputs)
        check_pruned(self.schedule, pruning_of(self.peft_model), before, image_tokens)
        lm_head, calls = base_llava(self.peft_model).lm_head, 1
        if weights_are_spread(self.peft_model):  # as many calls on every rank
            calls = calls_needed(batch["labels"], self.loss_chunk)
            needed = torch.tensor(calls, dtype=torch.float32, device=self.device)
            calls = int(self.trainer.strategy.reduce(needed, reduce_op="max"))
        return supervised_loss(hidden, batch["labels"], lm_head, self.loss_chunk, calls)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One micro-batch; see the module's docstring for what is averaged over what."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._window_tokens, self._window_loss = (
                self._tokens_on_all_ranks(batch),
                torch.zeros_like(self._window_loss),
            )
        total, count = self.batch_loss(batch)
        self._window_loss = self._window_loss.to(total.device) + total.detach()
        if step_ended(self.trainer, batch_idx):
            mean = self.trainer.strategy.reduce(self._window_loss, reduce_op="sum") / self._window_tokens
            self.log("train/loss", mean, prog_bar=True, batch_size=len(batch["input_ids"]))
        if self.loss_average == "batch":
            return total / count.clamp(min=1)
        # Lightning divides by the number of micro-batches, and data-parallel ranks are averaged.
        return total * (self.trainer.accumulate_grad_batches * self.trainer.world_size / self._window_tokens)

    def _tokens_on_all_ranks(self, batch: dict[str, Any]) -> float:
        if WINDOW_TOKENS not in batch:
            raise ValueError(f"the batch has no {WINDOW_TOKENS!r}: let `himap_train.data.windows.Windows` count it")
        tokens = torch.tensor(float(batch[WINDOW_TOKENS]), device=self.device)
        return max(float(self.trainer.strategy.reduce(tokens, reduce_op="sum")), 1.0)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add up loss and tokens; accuracies come from the `GenerationAccuracy` callback."""
        total, count = self.batch_loss(batch)
        self._validation = self._validation.to(total.device) + torch.stack([total.double(), count.double()])

    def on_validation_epoch_end(self) -> None:
        """Log the mean over the supervised tokens of all ranks."""
        total, count = self.trainer.strategy.reduce(self._validation, reduce_op="sum").tolist()
        self._validation = torch.zeros_like(self._validation)
        if count:
            self.log("val/loss", total / count, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over LoRA and projector, each with its own rate; cosine with warm-up, stepped each optimizer step."""
        groups = parameter_groups(self.peft_model, **self.rates)
        optimizer = torch.optim.AdamW(groups, betas=self.betas)
        scheduler = cosine_with_warmup(optimizer, self.trainer.estimated_stepping_batches, self.warmup_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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
