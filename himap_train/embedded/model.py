"""The small trained LLaVAs that ship with the package: no network, no GPU.

A CLIP vision tower (5 layers), a projector and a Llama decoder (8 layers), all 128 wide, in the stock Hugging Face
layout. "embedded" takes images of 96x96 as 144 image tokens and knows the coarse scenes; `recipes/train_embedded.py`
trained it from nothing. "embedded-fine" takes 256x256 as 256 tokens, knows coarse and fine scenes, and can say words
beyond them; `recipes/train_fine.py` trained it from the first.
"""

from __future__ import annotations

from pathlib import Path

EMBEDDED_MODELS = {"embedded": "embedded_llava", "embedded-fine": "embedded_fine"}
"""Names that stand for a model's path, and their folders; each recipe writes such a folder."""


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
        recipe = "train_embedded.py" if name == "embedded" else "train_fine.py"
        raise FileNotFoundError(
            f"the model {name!r} is missing: no model.safetensors in {folder}; reinstall himap-train "
            f"with its package data, or make it with recipes/{recipe}"
        )
    return folder
