"""The LightningModule: a LLaVA with LoRA, pruned by its schedule in every forward, and the loss on it.

The loss of an optimizer step is the mean over its supervised tokens (see `averaging`). With the mean of means instead
(`loss_average="batch"`, what LLaVA's own trainer did) a batch of one-word answers weighs as much as a batch of essays.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import LlavaProcessor

from himap_train.checkpoints.finite import NonFiniteError
from himap_train.models.features import weights_are_spread
from himap_train.models.foresight import make_scorers
from himap_train.models.install import install_pruning
from himap_train.models.loading import load_llava
from himap_train.models.lora import DECODER_LINEAR, Part, Projector, attach_lora
from himap_train.models.loss import calls_needed, distilled_loss, supervised_loss
from himap_train.models.quantize import Quantize
from himap_train.models.stock import base_model, text_decoder
from himap_train.models.versions import checkpoint_activations
from himap_train.pruning.reading import fit_preset, is_preset, read_schedule
from himap_train.pruning.schedule import PruningSchedule
from himap_train.ranges import require_possible
from himap_train.training.adapter_module import AdapterModule, Teacher
from himap_train.training.averaging import WindowMean
from himap_train.training.callbacks.progress import step_ended
from himap_train.training.init_adapter import rank_from, read_start, start_from
from himap_train.training.optim import cosine_with_warmup, parameter_groups
from himap_train.training.precision import weights_dtype


class LlavaFineTuner(AdapterModule):
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
        use_dora: Train magnitude and direction of each weight apart; better at small ranks, slower.
        use_rslora: Scale LoRA's update by `lora_alpha / sqrt(lora_r)`, for large ranks.
        init_adapter: Go on from this adapter, run folder or training checkpoint, of the same base and LoRA settings;
            only its weights are taken, the schedule is that of this config.
        vision_tower: "freeze", "lora" or "train" (all its weights; not with data.cache_image_features).
        decoder: "lora", "train" (decoder, embeddings and head; not with quantize) or "freeze".
        lora_lr: Peak learning rate of LoRA.
        projector_lr: Peak learning rate of the projector.
        vision_lr: Peak learning rate of the vision tower; null for `lora_lr` under LoRA and 2e-6 for all its weights.
        decoder_lr: Peak learning rate of a decoder whose weights are all trained.
        weight_decay: Decay of weight matrices; biases have none.
        warmup_ratio: Share of the optimizer steps in which the rate rises linearly; then it falls as a cosine.
        betas: AdamW's decay rates.
        gradient_checkpointing: Compute each decoder layer again in the backward pass instead of keeping it.
        attn_implementation: "sdpa", "eager", "flash_attention_2", or null for the model's own choice.
        quantize: "4bit" stores the frozen decoder in 4 bits (QLoRA; needs bitsandbytes and CUDA), null as it is.
        loss_average: "token" averages over all tokens of an optimizer step, "batch" over micro-batches.
        loss_chunk: Supervised positions whose logits exist at a time; 0 for all at once.

    Raises:
        ValueError: A number cannot be; names key, value and what is allowed.
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
        use_dora: bool = False,
        use_rslora: bool = False,
        init_adapter: str | None = None,
        vision_tower: Part = "freeze",
        decoder: Part = "lora",
        lora_lr: float = 2e-4,
        projector_lr: float = 2e-5,
        vision_lr: float | None = None,
        decoder_lr: float = 2e-5,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.999),
        gradient_checkpointing: bool = True,
        attn_implementation: str | None = None,
        quantize: Quantize | None = None,
        loss_average: Literal["token", "batch"] = "token",
        loss_chunk: int = 1024,
    ) -> None:
        require_possible({f"model.{name}": value for name, value in locals().items()})
        super().__init__(read_schedule(schedule))
        self.path = path
        self._preset = is_preset(schedule)
        self.attach = partial(
            attach_lora,
            r=lora_r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            targets=lora_targets,
            projector=projector,
            dora=use_dora,
            rslora=use_rslora,
            vision=vision_tower,
            decoder=decoder,
        )
        self.trains_in_place = "train" in (vision_tower, decoder)
        self.init_adapter = init_adapter
        self.lora_dropout = lora_dropout
        if vision_lr is None:
            vision_lr = lora_lr if vision_tower == "lora" else 2e-6
        self.rates = {"lora": lora_lr, "projector": projector_lr, "vision tower": vision_lr, "decoder": decoder_lr}
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.betas = betas
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.quantize = quantize
        self.loss_average = loss_average
        self.loss_chunk = loss_chunk
        self.processor: LlavaProcessor | None = None
        self._window = WindowMean()
        self.step_loss: Tensor | float = 0.0
        self._validation = torch.zeros(2, dtype=torch.float64)  # sum of losses, supervised tokens

    def configure_model(self) -> None:
        """Load the weights, attach LoRA, install the pruner. Lightning calls this on every rank; again does nothing."""
        if self.llava is not None:
            return
        start = read_start(self.init_adapter, self.path) if self.init_adapter else None
        # Frozen weights in the trainer's precision; what is trained stays in fp32 (see `attach_lora`), spread as such.
        whole = self.trains_in_place and self._trainer and getattr(self.trainer.strategy, "zero_stage_3", False)
        dtype = weights_dtype(str(self.trainer.precision) if self._trainer and not whole else "")
        how: dict[str, Any] = {"attn_implementation": self.attn_implementation, "quantize": self.quantize}
        model, processor = load_llava(self.path, dtype=dtype, **how)
        self.processor = self.processor or processor
        with torch.random.fork_rng(devices=[]):  # LoRA starts the same however the weights were loaded
            torch.manual_seed(torch.initial_seed())
            self.llava = self.attach(model)
        if start is not None:
            start_from(self.llava, start, str(self.init_adapter))
        decoder = text_decoder(self.llava)
        if self.gradient_checkpointing:
            checkpoint_activations(decoder)
        self.schedule = self.fitted_schedule(decoder.config.num_hidden_layers)
        install_pruning(self.llava, self.schedule)
        make_scorers(self.llava, self.schedule)
        if start is not None:
            rank_from(self.llava, start, self.schedule, str(self.init_adapter))
        self.train()

    def fitted_schedule(self, layers: int) -> PruningSchedule:
        """The schedule for a decoder of so many layers: presets are written for 32."""
        return fit_preset(self.schedule, layers) if self._preset else self.schedule

    def on_train_start(self) -> None:
        """Give a resumed loader its place in the epoch back, which would start again.

        Lightning does so when it makes the loader, but the learning-rate schedule has asked for it before that.
        """
        self.trainer.fit_loop._load_combined_loader_states()
        self._window = WindowMean()  # another fit may have stopped within one

    def batch_loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Sum of the losses of one batch and the number of supervised tokens.

        Raises:
            RuntimeError: The schedule says that image tokens go, and they did not.
        """
        hidden, calls = self.states(batch), self._lm_head_calls(batch["labels"])
        return supervised_loss(hidden, batch["labels"], base_model(self.peft_model).lm_head, self.loss_chunk, calls)

    def distilled_batch_loss(self, batch: dict[str, Any], teacher: Teacher) -> tuple[Tensor, Tensor, Tensor]:
        """As `batch_loss`, with the summed divergence from the teacher between loss and number."""
        expected = self.teacher_states(batch, teacher.schedule)
        hidden, calls = self.states(batch), self._lm_head_calls(batch["labels"])
        lm_head = base_model(self.peft_model).lm_head
        return distilled_loss(hidden, expected, batch["labels"], lm_head, self.loss_chunk, calls)

    def _lm_head_calls(self, labels: Tensor) -> int:
        """As many on every rank, where the weights are spread over them."""
        if not weights_are_spread(self.peft_model):
            return 1
        needed = torch.tensor(calls_needed(labels, self.loss_chunk), dtype=torch.float32, device=self.device)
        return int(self.trainer.strategy.reduce(needed, reduce_op="max"))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One micro-batch; see the module's docstring for what is averaged over what."""
        if not self._window.begun:
            self._window.begin(batch, self.trainer, self.device)
        teacher = self._step.teacher if self._step else None
        with self.running_step(self._step):
            if teacher is None:
                total, count = self.batch_loss(batch)
                self._window.add(loss=total)
            else:
                cross_entropy, divergence, count = self.distilled_batch_loss(batch, teacher)
                self._window.add(loss=cross_entropy, divergence=divergence)
                total = cross_entropy + teacher.weight * divergence
        if step_ended(self.trainer, batch_idx):
            means = self._window.means(self.trainer)
            self.step_loss = torch.stack([*means.values()]).sum()
            for name, mean in means.items():  # divergence: of the last step with a teacher
                self.log(f"train/{name}", mean, prog_bar=True, batch_size=len(batch["input_ids"]))
        if self.loss_average == "batch":
            return total / count.clamp(min=1) * self._window.weight_of_mean(self.trainer)
        return total * self._window.weight(self.trainer)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add up loss and tokens; accuracies come from the `GenerationAccuracy` callback."""
        with self.running_step(None):
            total, count = self.batch_loss(batch)
        self._validation = self._validation.to(total.device) + torch.stack([total.double(), count.double()])

    def on_validation_epoch_end(self) -> None:
        """Log the mean over the supervised tokens of all ranks; raises NonFiniteError where it is none."""
        total, count = self.trainer.strategy.reduce(self._validation, reduce_op="sum").tolist()
        self._validation = torch.zeros_like(self._validation)
        if count and not math.isfinite(total):
            raise NonFiniteError(
                f"the validation loss at step {self.trainer.global_step} is {total / count}; training has ended. The "
                "checkpoint before it was kept. Usual reasons: too high a learning rate, fp16 in place of bf16"
            )
        if count:
            self.log("val/loss", total / count, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over what is trained, each part with its own rate; cosine with warm-up, stepped each optimizer step."""
        groups = parameter_groups(self.peft_model, self.rates, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=self.betas)
        scheduler = cosine_with_warmup(optimizer, self.trainer.estimated_stepping_batches, self.warmup_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
