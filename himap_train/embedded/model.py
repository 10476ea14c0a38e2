"""The small trained LLaVAs that ship with the package: no network, no GPU.

A CLIP vision tower (5 layers), a projector and a Llama decoder (8 layers), all 128 wide, in the stock Hugging Face
layout; `recipes/train_embedded.py` trained both. "embedded" takes images of 96x96 as 144 image tokens and knows the
coarse scenes. "embedded-fine", trained from the first, takes 256x256 as 256 tokens, knows coarse and fine scenes, and
can say words beyond them.
"""

from __future__ import annotations

from pathlib import Path

EMBEDDED_MODELS = {"embedded": "embedded_llava", "embedded-fine": "embedded_fine"}
"""Names that stand for a model's path, and their folders."""


def embedded_folder(name: str) -> Path:
    """Where one of `EMBEDDED_MODELS` lies, whether or not it was installed."""
    return Path(__file__).parents[1] / "assets" / EMBEDDED_MODELS[name]


def embedded_model_path(name: str = "embedded") -> Path:
    """Folder that `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained` load.

    Args:
        name: One of `EMBEDDED_MODELS`.

    Raises:
        FileNotFoundError: if the package was installed without its data files.
    """
    folder = embedded_folder(name)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the model {name!r} is missing: no model.safetensors in {folder}; reinstall himap-train "
            f"with its package data, or make it with recipes/train_embedded.py --model {name}"
        )
    return folder
