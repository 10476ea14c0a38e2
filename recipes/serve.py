"""Serve a checkpoint, pruning as it was saved, to any client of OpenAI's chat API.

pip install "himap-train[serve]"
python recipes/serve.py                                     # the embedded model at http://127.0.0.1:8000/v1
python recipes/serve.py --checkpoint runs/mine --schedule himap --batch-size 16
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import sys
from pathlib import Path
from typing import Any

from himap_train.analysis.answered import prompt_encoder
from himap_train.checkpoints.load import AS_SAVED, installed_schedule, load_with_schedule
from himap_train.command_line import require_free_port, run_command
from himap_train.models.families.base import AspectRatio, Background
from himap_train.pruning.reading import ScheduleArgument
from himap_train.serving.app import build_app
from himap_train.serving.batches import Batches
from himap_train.serving.requests import Reader


def main(
    checkpoint: str = "embedded",
    schedule: ScheduleArgument = AS_SAVED,
    name: str | None = None,
    port: int = 8000,
    host: str = "127.0.0.1",
    batch_size: int = 8,
    max_new_tokens: int = 256,
    image_folder: Path | None = None,
    private_addresses: bool = False,
    image_aspect_ratio: AspectRatio | None = None,
    image_background: Background | None = None,
    **loading: Any,
) -> None:
    """Answer /v1/chat/completions until Ctrl-C.

    Args:
        checkpoint: "embedded", a run or adapter folder, a merged folder, or any stock LLaVA (folder or hub name).
        schedule: as-saved, none, a preset (himap, fastv, ...), a pruning.yaml, or the stages inline.
        name: What clients call the model; by default as the checkpoint is given.
        port: Where it listens.
        host: Who may ask: 127.0.0.1 is this machine alone, 0.0.0.0 whoever can reach it.
        batch_size: Most requests that are answered together.
        max_new_tokens: Where an answer is cut whose request names no `max_tokens`.
        image_folder: `file://` images are read from this folder; by default from nowhere.
        private_addresses: Fetch images from addresses of this machine and its network too.
        image_aspect_ratio: By default as the checkpoint was trained; "pad" makes images square first, as LLaVA-1.5 was.
        image_background: Colour under a transparent image, "white" or "black"; by default as it was trained.
        **loading: Options of `load_with_schedule`.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f'serving needs more ({error}): pip install "himap-train[serve]"') from error
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"--batch-size {batch_size} and --max-new-tokens {max_new_tokens} must be 1 or more")
    if image_folder is not None and not image_folder.is_dir():
        raise ValueError(f"--image-folder {image_folder} is no folder")
    require_free_port(host, port)
    model, processor = load_with_schedule(checkpoint, schedule, **loading)
    images = {"image_aspect_ratio": image_aspect_ratio, "image_background": image_background}
    encoder = prompt_encoder(model, processor, **images)
    reader = Reader(name or checkpoint, encoder, max_new_tokens, image_folder, private_addresses)
    app = build_app(reader, Batches(model, processor, batch_size), {"pruning": installed_schedule(model).to_dict()})
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=5)


if __name__ == "__main__":
    sys.exit(run_command(main))
