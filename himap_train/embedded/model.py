"""The small trained LLaVA that ships with the package: no network, no GPU.

A CLIP vision tower (5 layers), a projector and a Llama decoder (8 layers), 128 wide, 144 image tokens from a 96x96
image, trained from nothing on the embedded scenes by `recipes/train_embedded.py`. Its folder has the stock Hugging Face
layout.
"""

from __future__ import annotations

from pathlib import Path


def embedded_model_path() -> Path:
    """Folder that `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained` load.

    Raises:
        FileNotFoundError: if the package was installed without its data files.
    """
    folder = Path(__file__).parents[1] / "assets/embedded_llava"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the embedded LLaVA is missing: no model.safetensors in {folder}; reinstall himap-train "
            "with its package data, or make it with recipes/train_embedded.py"
        )
    return folder
