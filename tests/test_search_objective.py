"""What a search measures, against stock Hugging Face: the loss of a schedule, and the attention of every layer."""

from __future__ import annotations

import pytest
import torch
from data_examples import encode
from tiny import tiny_llava, tiny_processor

from himap_train import PruningSchedule, PruningStage, install_pruning, remove_pruning
from himap_train.data.records import Conversation, RecordError, Turn
from himap_train.data.scene_questions import SceneQuestions
from himap_train.data.skips import TooManySkippedError
from himap_train.search.flow import information_flow
from himap_train.search.objective import Objective
from himap_train.search.samples import read_samples

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


def test_the_flow_is_the_attention_that_eager_stock_layers_return() -> None:
    model, processor = tiny_llava(attn="eager"), tiny_processor()
    found = information_flow(model, read_samples(model, processor, SCENES, batch_size=4))
    remove_pruning(model)
    rows = {"instruction": torch.zeros(6), "image": torch.zeros(6)}
    for index in range(len(SCENES)):
        sample = encode(SCENES[index], processor)
        with torch.no_grad():
            out = model(input_ids=sample["input_ids"][None], **sample["images"][0], output_attentions=True)
        image = sample["input_ids"] == processor.image_token_id
        first_answer = int((sample["labels"] != -100).nonzero()[0])
        prompt = torch.arange(len(image)) < first_answer
        instruction = prompt & ~image & (torch.arange(len(image)) > int(image.nonzero()[-1]))
        for layer, attention in enumerate(out.attentions):
            mean = attention[0].mean(0)
            rows["instruction"][layer] += mean[instruction][:, image].sum(1).mean()
            rows["image"][layer] += mean.fill_diagonal_(0)[image][:, image].sum(1).mean()
    torch.testing.assert_close(torch.tensor(found.instruction), rows["instruction"] / 10, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(found.image), rows["image"] / 10, atol=1e-5, rtol=1e-4)


def test_samples_are_drawn_by_the_seed_and_text_alone_is_left_out() -> None:
    model, processor = tiny_llava(), tiny_processor()
    mixed = Listed(*(SCENES[i] for i in range(8)), text_only("a"), text_only("b"))
    everything = read_samples(model, processor, mixed)
    assert (everything.count, everything.without_image, everything.image_tokens) == (8, 2, 16)
    ids = [
        {tuple(row) for batch in read_samples(model, processor, SCENES, count=4, seed=seed).batches
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
        read_samples(model, processor, SCENES, count=0)
