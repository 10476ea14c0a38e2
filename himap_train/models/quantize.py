"""4-bit weights for the frozen decoder, as QLoRA trains over them.

NF4 with double quantisation (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), computed in the run's precision.
The vision tower and the projector stay as they are: they are small, the projector is trained, and all that the model
sees passes through them. So does `lm_head`, whose logits the loss is made of. What remains in 16 bits is *not* upcast
to fp32, as PEFT's `prepare_model_for_kbit_training` would: embeddings and `lm_head` would take as much memory again.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from himap_train.models.families.base import Family

Quantize = Literal["4bit"]


def quantization_config(family: Family, dtype: str | torch.dtype) -> BitsAndBytesConfig:
    """How transformers quantises while it loads.

    Args:
        family: Family of the model.
        dtype: What the layers compute in; "auto" is bfloat16.

    Raises:
        ValueError: There is no bitsandbytes, or no GPU.
    """
    without = "or train over full weights: --model.quantize null"
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"quantize=4bit needs bitsandbytes: pip install 'himap-train[qlora]', {without}")
    if not torch.cuda.is_available():
        raise ValueError(
            f"quantize=4bit needs a CUDA device, which is not here (bitsandbytes is, {version('bitsandbytes')}): "
            f"run it where there is one, {without}"
        )
    return nf4_config(family, dtype)


def nf4_config(family: Family, dtype: str | torch.dtype) -> BitsAndBytesConfig:
    """The settings alone, wherever they are used."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
        # matched from the start of a module's name
        llm_int8_skip_modules=[family.vision_name, *family.projector_names, "lm_head"],
    )
