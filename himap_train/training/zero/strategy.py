"""DeepSpeed's ZeRO with LoRA: the same checkpoints, averages and precision as on one device.

Lightning's own DeepSpeed strategy writes folders of shards that only DeepSpeed can read, counts accumulation windows by
itself, casts trained weights to bfloat16 and runs on CUDA alone. Here:

- A checkpoint is the one file that every strategy writes. Weights and moments are gathered from where ZeRO keeps them,
  so a run goes on in another ZeRO stage, in another number of processes, or without DeepSpeed.
- Lightning says where an optimizer step ends, so the last window of an epoch may be short.
- "bf16-mixed" is autocast, as elsewhere: frozen weights in bfloat16, trained ones in fp32.
- On the CPU, processes are joined by gloo: tests and rehearsals run what a GPU job runs.
- Nothing is compiled when a run starts: AdamW is torch's, also where its state is offloaded, and the one extension that
  DeepSpeed builds on CPUs serves inference only. So there is no compiler to miss and no stale build lock to wait for.

ZeRO: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from torch import Tensor, nn

from himap_train.training.zero.precision import ZeroPrecision
from himap_train.training.zero.whole_checkpoints import WholeCheckpoints

_TORCH_LINEAR = torch.nn.functional.linear
"""Under ZeRO-3 DeepSpeed puts a function of its own in its place, which keeps no gathered weight for the backward."""


class ZeroStrategy(WholeCheckpoints):
    """ZeRO stage 1, 2 or 3.

    Args:
        stage: 1 spreads the optimizer over the processes, 2 gradients too, 3 also the frozen and trained parameters.
        offload: Stage 3 only: parameters and optimizer wait in CPU memory.
        persistence_threshold: Stage 3 only: parameters with fewer elements stay whole in every process; null for
            DeepSpeed's choice.
        bucket_size: Elements that are communicated at once.
        **kwargs: Those of Lightning's `DeepSpeedStrategy`.
    """

    def __init__(
        self,
        stage: int = 2,
        offload: bool = False,
        persistence_threshold: int | None = None,
        bucket_size: int = 50_000_000,
        **kwargs: Any,
    ) -> None:
        if find_spec("deepspeed") is None:
            raise ValueError("this strategy needs DeepSpeed; install it with `pip install -e .[deepspeed]`")
        if stage not in (1, 2, 3) or (offload and stage != 3):
            raise ValueError(f"stage={stage}, offload={offload}: expected stage 1, 2 or 3, and offload with 3 only")
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when deepspeed is imported
        options = {"offload_optimizer": offload, "offload_parameters": offload, "logging_batch_size_per_gpu": 1}
        buckets = {"reduce_bucket_size": bucket_size, "allgather_bucket_size": bucket_size}
        super().__init__(stage=stage, **{**options, **buckets, **kwargs})
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW, the same numbers with and without offload
        if persistence_threshold is not None:
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = persistence_threshold
        self._groups: list[list[nn.Parameter]] = []
        self._sharded_loading: Any = None

    # ---- processes ----

    @property
    def _on_cpu(self) -> bool:
        return bool(self.root_device.type == "cpu")

    def setup_environment(self) -> None:
        """As Lightning does, and also on the CPU."""
        super(DeepSpeedStrategy, self).setup_environment() if self._on_cpu else super().setup_environment()

    def setup_distributed(self) -> None:
        """Join the processes."""
        if not self._on_cpu:
            super().setup_distributed()
            return
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see above: for inference only
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    # ---- precision and accumulation: Lightning's, not the engine's ----

    @property
    def precision_plugin(self) -> Precision:
        """A `ZeroPrecision`, whatever DeepSpeed precision Lightning chose."""
        return self._precision_plugin if self._precision_plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, DeepSpeedPrecision) and not isinstance(plugin, ZeroPrecision):
            device = "cpu" if isinstance(self.accelerator, CPUAccelerator) else "cuda"
            plugin = ZeroPrecision(plugin.precision, device)
        self._precision_plugin = plugin

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        if self.precision_plugin.precision == "bf16-mixed":  # no module counts as safe: gradients are reduced in fp32
            autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            self.config["torch_autocast"] = autocast
        self._format_batch_size_and_grad_accum_config()

    @property
    def handles_gradient_accumulation(self) -> bool:
        """No: Lightning asks for a step where a window ends."""
        return False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the engine whether this micro-batch ends a window, which decides when gradients are reduced."""
        assert self.lightning_module is not None
        ends = not self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(ends)
        return super().training_step(*args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing to block: where no window ends the engine keeps gradients, as `training_step` has told it."""
        yield

    def gradient_norm(self) -> Tensor | float | None:
        """That of the last optimizer step, before clipping."""
        norm: Tensor | float | None = self.deepspeed_engine.get_global_grad_norm()
        return norm

    # ---- the model ----

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """In stage 3 `from_pretrained` shards each weight as it loads it; LoRA is sharded when the engine is made.

        LoRA must not be created sharded: its initial values would be written into empty tensors.
        """
        self._init_config_if_needed()
        if self.zero_stage_3:
            from transformers.integrations.deepspeed import HfDeepSpeedConfig

            mixed = self.precision_plugin.precision == "bf16-mixed"
            whole = getattr(self.lightning_module, "trains_in_place", False)  # what is trained is kept in fp32
            half = {"bf16": {"enabled": True}} if mixed and not whole else {}
            self._sharded_loading = HfDeepSpeedConfig({**self.config, **half})  # type: ignore[dict-item]
        yield

    def teardown(self) -> None:
        """Models that are loaded later are whole again, and their linear layers torch's."""
        self._sharded_loading = None
        torch.nn.functional.linear = _TORCH_LINEAR
        super().teardown()

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        self._groups = [list(group["params"]) for group in optimizer.param_groups]  # DeepSpeed flattens them
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return self._initialize(
            model, self.config, model_parameters=trained, optimizer=optimizer, lr_scheduler=lr_scheduler
        )

    def _initialize_deepspeed_inference(self, model: Any) -> None:
        """Only stage 3 needs an engine to evaluate. Its hooks replace those of an earlier one.

        transformers collects hidden states through hooks, which go with the others; it puts them back where the
        module no longer says that they are there.
        """
        if not self.zero_stage_3:
            self.model_to_device()
            return
        remove_module_hooks(model)
        for module in model.modules():
            if hasattr(module, "_output_capturing_hooks_installed"):
                module._output_capturing_hooks_installed = False
        assert isinstance(self.config, dict)
        config = {**self.config, "gradient_accumulation_steps": 1}
        self.model, _ = self._initialize(model, config, model_parameters=[])

    def _initialize(self, model: Any, config: Any, **kwargs: Any) -> tuple[Any, Any]:
        import deepspeed
        from deepspeed.runtime.zero.linear import zero3_linear_wrap

        args = None if self._on_cpu else argparse.Namespace(device_rank=self.root_device.index)
        engine, optimizer, _, _ = deepspeed.initialize(
            args=args, model=model, config=config, dist_init_required=False, **kwargs
        )
        if self.zero_stage_3:  # DeepSpeed sees to it only where it spreads weights: not for a model that already is
            torch.nn.functional.linear = zero3_linear_wrap
        return engine, optimizer
