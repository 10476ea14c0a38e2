"""A page to try a checkpoint on: an image and a question, answered dense and pruned side by side.

pip install "himap-train[demo]"
python recipes/demo.py                                        # the embedded model and a scene that it knows
python recipes/demo.py --checkpoint runs/mine --port 8000
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import sys
from pathlib import Path
from typing import Any

from himap_train.analysis.answered import Answered, answer_question, prompt_encoder
from himap_train.checkpoints.load import AS_SAVED, installed_schedule, load_with_schedule
from himap_train.command_line import require_free_port, run_command
from himap_train.data.encode import Encoder
from himap_train.data.records import Conversation, Turn
from himap_train.data.scene_questions import SceneQuestions
from himap_train.evaluation.result import measured_tokens
from himap_train.models.families.base import AspectRatio, Background
from himap_train.models.stock import base_model
from himap_train.pruning.presets import PRESETS
from himap_train.pruning.reading import ScheduleArgument, fitted_schedule
from himap_train.pruning.schedule import PruningSchedule


def main(
    schedule: ScheduleArgument = AS_SAVED,
    port: int | None = None,
    host: str = "127.0.0.1",
    image_aspect_ratio: AspectRatio | None = None,
    image_background: Background | None = None,
    max_new_tokens: int = 64,
    **loading: Any,
) -> None:
    """Serve the page until Ctrl-C; nothing leaves this machine.

    Args:
        schedule: What the page offers beside the presets: as-saved, a pruning.yaml, or the stages inline.
        port: Where the page is served; by default the first free port from 7860 on.
        host: Who may ask: 127.0.0.1 is this machine alone, 0.0.0.0 whoever can reach it.
        image_aspect_ratio: By default as the checkpoint was trained; "pad" makes images square first, as LLaVA-1.5 was.
        image_background: Colour under a transparent image, "white" or "black"; by default as it was trained.
        max_new_tokens: Where the answers are cut.
        **loading: Options of `load_with_schedule`.
    """
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f'the demo needs gradio ({error}): pip install "himap-train[demo]"') from error
    if port is not None:
        require_free_port(host, port)
    model, processor = load_with_schedule(schedule=schedule, **loading)
    images = {"image_aspect_ratio": image_aspect_ratio, "image_background": image_background}
    asked = Asked(model, prompt_encoder(model, processor, **images), max_new_tokens)
    page(gradio, asked).launch(server_name=host, server_port=port, ssr_mode=False, footer_links=[])


class Asked:
    """A model, as it was loaded with its schedule, that answers questions dense and pruned."""

    def __init__(self, model: Any, encoder: Encoder, max_new_tokens: int) -> None:
        self.model, self.encoder, self.max_new_tokens = model, encoder, max_new_tokens
        self.saved, self.config = installed_schedule(model), base_model(model).config
        self.choices = [*([AS_SAVED] if not self.saved.dense else []), *(name for name in PRESETS if name != "none")]

    def __call__(self, image: str | None, question: str, schedule: str, budget: float) -> list[Any]:
        """Text and cost of the dense and of the pruned answer; then a picture of what each stage kept.

        Args:
            image: A file.
            question: About it.
            schedule: One of `choices`.
            budget: Run the schedule's layers at this `flops_ratio`; 0 for the ratios that it has.

        Raises:
            ValueError: Something is missing, is no image or does not fit; says what.
        """
        if image is None or not question.strip():
            raise ValueError("Give an image and a question.")
        asked = Conversation("upload", (Path(image),), (Turn("user", f"<image>\n{question.strip()}"),))
        layers = self.config.text_config.num_hidden_layers
        wanted = self.saved if schedule == AS_SAVED else fitted_schedule(schedule, layers)
        shown: list[Any] = []
        for pruned in (False, True):
            runs = wanted if pruned else PruningSchedule()
            found = answer_question(self.model, self.encoder, asked, runs, self.max_new_tokens)
            shown += [found.text, self._cost(found, runs)]
            if budget and not pruned:
                wanted = wanted.at_budget(self.config, budget, found.tokens.image, found.tokens.text)
        return [*shown, found.pictures[0] if found.pictures else None]

    def _cost(self, found: Answered, schedule: PruningSchedule) -> str:
        ratio = measured_tokens([found.tokens], schedule, self.config).flops_ratio
        stays = " → ".join(map(str, (found.tokens.image, *found.tokens.kept)))
        cost = f", flops_ratio {ratio.mean:.3f}" if ratio else ""
        return f"{stays} image tokens, {found.tokens.text} others{cost}; {found.seconds:.2f} s"


def page(gradio: Any, asked: Asked) -> Any:
    """The page around it, with a scene and its question to start with."""
    scene = SceneQuestions("test", scenes=1)[0]
    answer_question(asked.model, asked.encoder, scene, PruningSchedule(), 1)  # the first time is never like the others

    def ask(image: str | None, question: str, schedule: str, budget: float) -> list[Any]:
        try:
            return asked(image, question, schedule, budget)
        except (ValueError, OSError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(title="HiMAP: dense and pruned", analytics_enabled=False) as blocks:
        gradio.Markdown("# Dense and pruned, side by side")
        with gradio.Row():
            image = gradio.Image(scene.images[0], type="filepath", label="image", sources=["upload"], height=336)
            image.preprocess = lambda payload: payload and payload.path  # what is no image is ours to refuse
            with gradio.Column():
                text = scene.turns[0].text.removeprefix("<image>").strip()
                question = gradio.Textbox(text, label="question", lines=2)
                schedule = gradio.Dropdown(asked.choices, value=asked.choices[0], label="schedule")
                budget = gradio.Slider(0, 1, 0, step=0.05, label="budget (flops_ratio); 0: the schedule's own ratios")
                button = gradio.Button("Answer", variant="primary")
        outputs = []
        with gradio.Row():
            for name in ("dense", "pruned"):
                with gradio.Column():
                    outputs += [gradio.Textbox(label=f"{name} answer"), gradio.Textbox(label=f"{name}: tokens, time")]
        outputs.append(
            gradio.Image(label="what each stage kept", format="png", interactive=False, buttons=["fullscreen"])
        )
        inputs = [image, question, schedule, budget]
        gradio.on([button.click, question.submit], ask, inputs, outputs)
    return blocks


if __name__ == "__main__":
    sys.exit(run_command(main))
