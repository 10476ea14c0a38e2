"""TRL's trainers on a pruned model: run by hand in an environment that has TRL, see docs/other_trainers.md."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from data_examples import picture
from tiny import tiny_llava, tiny_processor
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning, remove_pruning

pytestmark = [pytest.mark.trl, pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")]

SCHEDULE = PruningSchedule((PruningStage(2, "instruction", 0.5), PruningStage(4, "image", 0.125)))


def turn(role: str, text: str, image: bool = False) -> list[dict[str, Any]]:
    content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
    return [{"role": role, "content": content}]


def rows(preferences: bool) -> Any:
    from datasets import Dataset

    made = []
    for number in range(4):
        answers = {"chosen": turn("assistant", f"Answer {number}"), "rejected": turn("assistant", "No idea at all")}
        completion = {"completion": answers["chosen"]}
        made.append(
            {"images": [picture(40, 30 + number)], "prompt": turn("user", f"Question {number}?", image=True)}
            | (answers if preferences else completion)
        )
    return Dataset.from_list(made)


def saved_llava(folder: Path) -> Any:
    """From a folder: DPO's reference is loaded from where the model came from."""
    tiny_llava().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    return LlavaForConditionalGeneration.from_pretrained(folder / "model")


def trainer_of(kind: str, model: Any, folder: Path, **options: Any) -> Any:
    import trl

    shared = {"output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 2, "report_to": "none",
              "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": None,
              "save_strategy": "no"} | options  # fmt: skip
    trainer, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    return trainer(
        model=model, args=config(**shared), train_dataset=rows(kind == "DPO"), processing_class=tiny_processor()
    )


def kept(trace: Any, row: int, ids: torch.Tensor) -> list[list[int]]:
    return [[column for column in stage[row].tolist() if ids[column] == 4] for stage in trace.kept]


def assert_prompt_chooses(trainer: Any, model: Any) -> None:
    """In a batch as the trainer makes it each row keeps what a prefill of its prompt keeps."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    answers = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"].bool()
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    with record_pruning(model) as trace:
        trainer.compute_loss(model, batch)
    for row in range(len(ids)):
        prompt = batch["attention_mask"][row].bool() & ~answers[row]
        with torch.no_grad(), record_pruning(model) as alone:
            model(input_ids=ids[row][prompt][None], pixel_values=pixels[row : row + 1])
        columns = prompt.nonzero()[:, 0]
        expected = [[int(columns[at]) for at in stage] for stage in kept(alone, 0, ids[row][prompt])]
        assert kept(trace, row, ids[row]) == expected and [len(stage) for stage in expected] == [8, 2]


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_pruning_installed_behind_the_trainer_trains_as_the_prompt_says(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = saved_llava(tmp_path)
    trainer = trainer_of(kind, model, tmp_path, **options)
    install_pruning(model, SCHEDULE)
    assert_prompt_chooses(trainer, model)
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)
    assert_prompt_chooses(trainer, model)
    remove_pruning(model)
    assert model.forward.__func__.__name__ == "forward" and "fused" in model.forward.__code__.co_name
    trainer.train()


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_pruning_installed_before_the_trainer_is_told_to_come_behind_it(kind: str, tmp_path: Path) -> None:
    model = install_pruning(saved_llava(tmp_path), SCHEDULE)
    trainer = trainer_of(kind, model, tmp_path)
    with pytest.raises(ValueError, match="replaced after install_pruning.*call install_pruning"):
        trainer.train()
    install_pruning(model, SCHEDULE)
    assert_prompt_chooses(trainer, model)
    trainer.train()


def test_other_losses_are_told_the_labels_too(tmp_path: Path) -> None:
    model = saved_llava(tmp_path)
    trainer = trainer_of("SFT", model, tmp_path, loss_type="dft")
    install_pruning(model, SCHEDULE)
    assert_prompt_chooses(trainer, model)
