"""The README.md that goes with an adapter or a merged model."""

from __future__ import annotations

import yaml

from himap_train import __version__
from himap_train.pruning.schedule import PruningSchedule


def adapter_card(base: str, schedule: PruningSchedule) -> str:
    """The card of an adapter folder; `base` is the model that it belongs to."""
    front = {"library_name": "peft", "base_model": base, "pipeline_tag": "image-text-to-text"}
    return _card(
        front,
        f"# LoRA adapter for {base}, fine-tuned while image tokens are pruned",
        "`PeftModel.from_pretrained` loads this folder too; the model then runs dense.",
        schedule,
    )


def merged_card(source: str, schedule: PruningSchedule) -> str:
    """The card of a merged model; `source` is the checkpoint that it was made from."""
    front = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    return _card(
        front,
        f"# LLaVA, fine-tuned while image tokens are pruned (merged from `{source}`)",
        "Stock transformers and vLLM load this folder as an ordinary LLaVA and run it **dense**: they have no place "
        "for pruning inside the decoder. The schedule is in `config.json` under `himap`.",
        schedule,
    )


def _card(front: dict[str, str], title: str, note: str, schedule: PruningSchedule) -> str:
    """Front matter, title, how to load it, the schedule."""
    stages = yaml.safe_dump(schedule.to_dict(), sort_keys=False).strip()
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            title,
            "",
            "Pruned as it was trained:",
            "```python",
            "from himap_train import load_checkpoint",
            'model, processor = load_checkpoint("this-folder")',
            "```",
            note,
            "",
            "The schedule (`keep_ratio` is the fraction kept of the original image tokens):",
            "```yaml",
            stages,
            "```",
            f"Made with himap-train {__version__}.",
            "",
        ]
    )
