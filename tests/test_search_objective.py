"""What a search measures: the loss of a schedule, against stock Hugging Face, and the flow."""

from __future__ import annotations

import pytest
import torch
from data_examples import encode
from tiny import tiny_llava, tiny_processor

from himap_train import PruningSchedule, PruningStage, install_pruning, remove_pruning
from himap_train.analysis.saliency import measure
from himap_train.data.records import Conversation, RecordError, Turn
from himap_train.data.scene_questions import SceneQuestions
from himap_train.data.skips import TooManySkippedError
from himap_train.evaluation.samples import read_samples
from himap_train.search.flow import mean_image_to_text
from himap_train.search.trials import Objective

HIMAP = PruningSchedule((PruningStage(2, "instruction", 0.5), PruningStage(4, "image", 0.125)))
SCENES = SceneQuestions("validation", scenes=10, seed=3, turns=2)


class Listed:
    """A source of given records; an exception among them is raised."""

    def __init__(self, *records: Conversation | Exception) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Conversation:
        if isinstance(record := self.records[index], Exception):
            raise record
        return record


def text_only(name: str = "text") -> Conversation:
    return Conversation(name, (), (Turn("user", "Is it?"), Turn("assistant", "yes")))


@pytest.mark.parametrize("schedule", [PruningSchedule(), HIMAP], ids=["dense", "himap"])
def test_the_objective_is_the_loss_that_stock_transformers_computes_row_by_row(schedule: PruningSchedule) -> None:
    model, processor = tiny_llava(), tiny_processor()
    samples = read_samples(model, processor, SCENES, batch_size=4)
    found = Objective(model, samples)(schedule)
    remove_pruning(model)
    if schedule.stages:
        install_pruning(model, schedule)
    total = count = 0
    for index in range(len(SCENES)):
        sample = encode(SCENES[index], processor)
        row = {name: sample[name][None] for name in ("input_ids", "labels")}
        predicted = int((row["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**row, **sample["images"][0]).loss) * predicted
        count += predicted
    assert samples.supervised == count
    assert found == pytest.approx(total / count, abs=2e-5)


def test_schedules_differ_and_the_criterion_random_draws_the_same_for_all() -> None:
    model = tiny_llava()
    objective = Objective(model, read_samples(model, tiny_processor(), SCENES))
    random = PruningSchedule((PruningStage(1, "random", 0.3),))
    assert objective(random) == objective(random) != objective(HIMAP)
    assert objective.forward_passes == 3
    assert Objective(model, objective.samples, seed=1)(random) != objective(random)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = tiny_llava()
    objective = Objective(model, read_samples(model, tiny_processor(), SCENES))
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="loss is nan.*--dtype"):
        objective(HIMAP)


def test_the_flow_is_what_image_tokens_give_to_text_on_average() -> None:
    model, samples = tiny_llava(), read_samples(tiny_llava(), tiny_processor(), SCENES, batch_size=4)
    flows = measure(model, samples)
    expected = sum(flow.saliency[:, 2:, 1].sum(1) for flow in flows) / 10
    assert len(flows) == 10 and float(expected.min()) > 0
    assert mean_image_to_text(flows) == pytest.approx(tuple(expected.tolist()), rel=1e-4)


def test_samples_are_drawn_by_the_seed_and_text_alone_is_left_out() -> None:
    model, processor = tiny_llava(), tiny_processor()
    mixed = Listed(*(SCENES[i] for i in range(8)), text_only("a"), text_only("b"))
    everything = read_samples(model, processor, mixed)
    assert (everything.count, everything.image_tokens) == (8, 16)
    ids = [
        {tuple(row) for batch in read_samples(model, processor, SCENES, samples=4, seed=seed).batches
         for row in batch.texts["input_ids"].tolist()}
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 4


def test_data_that_cannot_be_searched_on_is_refused() -> None:
    model, processor = tiny_llava(), tiny_processor()
    with pytest.raises(ValueError, match="2 without an image"):
        read_samples(model, processor, Listed(text_only("a"), text_only("b")))
    unanswered = Conversation("q1", SCENES[0].images, SCENES[0].turns[:1])
    with pytest.raises(TooManySkippedError, match="'q1' has a question but no answer"):
        read_samples(model, processor, Listed(unanswered, unanswered))
    one_broken = Listed(*(SCENES[i] for i in range(5)), RecordError("its image is broken"))
    assert read_samples(model, processor, one_broken, max_skipped=1).count == 5
    with pytest.raises(ValueError, match="must be at least 1"):
        read_samples(model, processor, SCENES, samples=0)
