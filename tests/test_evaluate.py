"""`evaluate` on a random tiny LLaVA: its counts, that pruning runs, that batching changes nothing; tables and files."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import yaml
from data_examples import encode_prompt
from evaluation_toys import QUIET, Source, conversation, image
from PIL import Image
from processes import in_processes
from recipes_cli import run_program, run_recipe
from tiny import IMAGE_TOKENS, tiny_llava, tiny_processor
from training_toys import save_tiny

from himap_train import PruningSchedule, PruningStage, bar, install_pruning, remove_pruning
from himap_train.checkpoints.load import load_with_schedule
from himap_train.command_line import run_command
from himap_train.data.batches import collate
from himap_train.data.encode import Encoder
from himap_train.data.records import Conversation, RecordError, Turn
from himap_train.data.scene_questions import SceneQuestions
from himap_train.data.skips import TooManySkippedError
from himap_train.embedded.scene_text import TYPES
from himap_train.evaluation.budgeted import prompt_tokens
from himap_train.evaluation.compare import Row, compare, evaluate_row
from himap_train.evaluation.evaluate import evaluate
from himap_train.evaluation.questions import Question, question_batches
from himap_train.evaluation.result import EvaluationResult, Measured, MeasuredTokens, SampleTokens, measured_tokens
from himap_train.evaluation.sample_metric import GroupScore
from himap_train.evaluation.tables import draw_chart, markdown_lines, markdown_table, print_table, save_table
from himap_train.models.install import pruning_of
from himap_train.models.stock import base_model
from himap_train.pruning.reading import fit_preset, is_preset

SCHEDULE = PruningSchedule((PruningStage(2, "instruction", 0.5), PruningStage(4, "image", 0.125)))


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def source():
    """Seven questions of different length: text alone, one image, two images."""
    records = [conversation(i, "what is it? " * (1 + i % 3), type="ab"[i % 2], scene=str(i // 2)) for i in range(5)]
    return Source(
        [*records, conversation(5, "and both?", images=2, type="c"), conversation(6, "hello", images=0, type="c")]
    )


def self_answered(model, processor, source, **settings):
    """The source with the model's own answers as references, in every second sample."""
    result = evaluate(model, processor, source, **QUIET, **settings)
    said = {prediction.index: prediction.prediction for prediction in result.predictions}
    turns = [
        (record.turns[0], Turn("assistant", said[i] if i % 2 == 0 else "other")) for i, record in enumerate(source)
    ]
    return Source([replace(record, turns=pair) for record, pair in zip(source, turns, strict=True)])


def test_scores_counts_and_order(model, processor, source):
    install_pruning(model, SCHEDULE)
    answered = self_answered(model, processor, source)
    result = evaluate(model, processor, answered, batch_size=3, **QUIET)
    assert [prediction.index for prediction in result.predictions] == list(range(7))
    assert result.predictions[5].prompt == "and both?"
    assert [prediction.score for prediction in result.predictions] == [1, 0, 1, 0, 1, 0, 1]
    assert result.overall.score == pytest.approx(4 / 7)
    assert {name: (group.score, group.count) for name, group in result.types.items()} == {
        "a": (1.0, 3),
        "b": (0.0, 2),
        "c": (0.5, 2),
    }
    # Scenes 0 (samples 0, 1), 1 (2, 3), 2 (4), and samples 5 and 6 alone: five clusters of residuals score - 4/7.
    residuals = [3 / 7 - 4 / 7, 3 / 7 - 4 / 7, 3 / 7, -4 / 7, 3 / 7]
    assert result.overall.standard_error == pytest.approx(math.sqrt(5 / 4 * sum(r * r for r in residuals)) / 7)
    assert result.image_tokens == pytest.approx(7 * IMAGE_TOKENS / 7)
    assert result.kept == pytest.approx((8.0, 2.0))
    lengths = [len(processor.tokenizer(record.turns[0].text)["input_ids"]) for record in source]
    assert result.text_tokens > sum(lengths) / 7  # the template's words come on top


def test_batches_of_any_size_give_the_same_answers(model, processor, source):
    install_pruning(model, SCHEDULE)
    alone = [
        prediction.prediction for prediction in evaluate(model, processor, source, batch_size=1, **QUIET).predictions
    ]
    assert len(set(alone)) > 1  # random weights, but not one answer for all
    for size in (4, 7, 2):
        result = evaluate(model, processor, source, batch_size=size, **QUIET)
        assert [prediction.prediction for prediction in result.predictions] == alone
    limited = evaluate(model, processor, source, limit=3, **QUIET)
    assert [prediction.prediction for prediction in limited.predictions] == alone[:3]


def test_the_installed_schedule_is_what_runs(model, processor, source):
    remove_pruning(model)
    dense = evaluate(model, processor, source, **QUIET)
    assert dense.kept == ()
    rows = compare(model, processor, source, {"dense": None, "none": PruningSchedule(), "pruned": SCHEDULE}, **QUIET)
    assert pruning_of(model) is None
    said = [[prediction.prediction for prediction in row.result.predictions] for row in rows]
    assert said[0] == said[1] == [prediction.prediction for prediction in dense.predictions]
    assert said[2] != said[0]
    assert [row.result.kept for row in rows] == [(), (), pytest.approx((8.0, 2.0))]
    assert rows[0].cost.flops_ratio == 1.0
    expected = SCHEDULE.cost(model.config, image_tokens=16, text_tokens=round(dense.text_tokens))
    assert rows[2].cost.flops_ratio == expected.flops_ratio < 0.9


def test_compare_gives_the_schedule_back_also_after_an_error(model, processor, source):
    before = pruning_of(install_pruning(model, SCHEDULE, cpu_blocks=False))
    with pytest.raises(ValueError, match="layer 6"):
        late = PruningSchedule((PruningStage(6, "stride", 0.5),))
        compare(model, processor, source, {"dense": None, "bad": late}, limit=1, **QUIET)
    assert pruning_of(model).schedule == SCHEDULE
    assert pruning_of(model) is before  # with all that watches and learns there


def test_a_pruner_that_does_not_act_is_an_error(model, processor, source, monkeypatch):
    install_pruning(model, SCHEDULE)
    decoder = base_model(model).model.language_model
    # As if something had put the stock forward back (a wrapper, a reload): the schedule is installed, nothing prunes.
    stock = type(decoder).forward

    def forward(*args, image_token_mask=None, supervised_mask=None, **kwargs):
        return stock(decoder, *args, **kwargs)

    monkeypatch.setattr(decoder, "forward", forward)
    with pytest.raises(RuntimeError, match="nothing was pruned"):
        evaluate(model, processor, source, **QUIET)
    # Text alone has nothing to prune and is answered.
    assert evaluate(model, processor, Source(source[6:]), **QUIET).kept == (0.0, 0.0)


def test_modes_of_modules_are_given_back(model, processor, source):
    model.train()
    model.model.vision_tower.eval()
    before = [module.training for module in model.modules()]
    evaluate(model, processor, source, limit=1, **QUIET)
    assert [module.training for module in model.modules()] == before
    model.eval()


def test_answers_end_at_the_eos_token(model, processor, source):
    remove_pruning(model)
    batch = collate([encode_prompt(source[0], processor)], 0, padding_side="left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | batch["images"]
    with torch.no_grad():
        new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, batch["input_ids"].shape[1] :]
    model.generation_config.eos_token_id = int(new[2])
    try:
        stopped = evaluate(model, processor, source, limit=1, progress=False, max_new_tokens=6)
    finally:
        model.generation_config.eos_token_id = None
    first = new.tolist().index(int(new[2]))
    assert stopped.predictions[0].prediction == processor.tokenizer.decode(new[: first + 1]).strip()


@pytest.mark.parametrize(
    ("metric", "right", "odd", "found"),
    [
        ("choice", "b", "the cow", "'the cow' names no option"),
        ("choice-strict", "1", "9", "'9' names no option"),
        ("pope", "yes", "cat", "'cat' is neither yes nor no"),
        ("vqa", '["cat", "cat", "cat", "cat"]', '["cat"]', "found 1, with which"),
        ("textvqa", '["cat", "cat", "cat", "cat"]', '["cat"]', "found 1, with which"),
        ("circular", "A", "A", "circular evaluation needs"),
        ("exact", "cat", "[]", "has no answer to compare with"),
    ],
)
def test_a_reference_that_cannot_be_scored_is_a_skipped_record(model, processor, metric, right, odd, found):
    remove_pruning(model)
    names = {"A": "cat", "B": "dog"} if "choice" in metric or metric == "circular" else {}
    records = Source(
        conversation(number, "?", answers=right if index else odd, **names, index=index)
        for number, index in enumerate(["0", "1", "", "3"])
    )
    result = evaluate(model, processor, records, metrics=["exact", metric], max_skipped=1, **QUIET)
    assert result.overall.count == 3 and [prediction.index for prediction in result.predictions] == [0, 1, 3]
    (reason,) = result.skipped
    assert "sample '2'" in reason and found in reason
    with pytest.raises(TooManySkippedError, match=re.escape(found)):
        evaluate(model, processor, records, metrics=[metric], max_skipped=0, **QUIET)


class Broken(Source):
    """Record 1 cannot be read."""

    def __getitem__(self, index):
        if index == 1:
            raise RecordError("record 1: image file missing.png does not exist")
        return super().__getitem__(index)


def test_broken_records_are_reported_and_limited(model, processor, source):
    result = evaluate(model, processor, Broken(source), **QUIET)  # one of seven: 1 % of the records, rounded up
    assert result.skipped == ["record 1: image file missing.png does not exist"]
    assert result.overall.count == 6
    empty = replace(source[0], turns=(source[0].turns[0],))
    with pytest.raises(RuntimeError, match="has no answer to compare with"):
        evaluate(model, processor, Broken([*source, empty]), **QUIET)
    with pytest.raises(RuntimeError, match="missing.png"):
        evaluate(model, processor, Broken(source), max_skipped=0, **QUIET)
    with pytest.raises(ValueError, match="no sample was scored"):
        evaluate(model, processor, Source(), **QUIET)


def test_workers_change_nothing(model, processor, source):
    install_pruning(model, SCHEDULE)
    alone, shared = (
        evaluate(model, processor, source, batch_size=2, num_workers=workers, **QUIET) for workers in (0, 2)
    )
    assert shared.predictions == alone.predictions and len(alone.predictions) == 7
    assert shared.kept == alone.kept == (8.0, 2.0)
    # 16 tokens in two layers, 8 in two, 2 in two; of an image less and an image more that is the mean
    assert shared.image_tokens_per_layer == alone.image_tokens_per_layer
    assert alone.image_tokens_per_layer.mean == pytest.approx((16 + 8 + 2) / 3)
    remove_pruning(model)  # shared with the tests after this one


def test_workers_report_broken_images(model, processor, source, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    records = Source([replace(source[0], images=(tmp_path / "broken.png",)), *source[1:5]])
    settings = {"batch_size": 2, "num_workers": 1, **QUIET}
    result = evaluate(model, processor, records, max_skipped=1, **settings)
    assert [prediction.index for prediction in result.predictions] == [1, 2, 3, 4]
    assert len(result.skipped) == 1 and "broken.png" in result.skipped[0]
    with pytest.raises(TooManySkippedError, match="broken.png"):
        evaluate(model, processor, records, max_skipped=0, **settings)


def test_prompts_are_counted_without_decoding_images(processor, source, monkeypatch):
    encoded = [encode_prompt(conversation, processor)["input_ids"] for conversation in source]
    images = [int((ids == processor.image_token_id).sum()) for ids in encoded]
    monkeypatch.setattr("himap_train.data.encode.open_image", pytest.fail)
    counts = [Encoder(processor).prompt_tokens(conversation) for conversation in source]
    assert counts == [(image, len(ids) - image) for image, ids in zip(images, encoded, strict=True)]
    assert {image for image, _ in counts} == {0, 16, 32}


def test_a_budget_is_of_prompts_with_images_wherever_they_stand(processor, source):
    """Text alone has nothing to save: with it in the mean a mixed benchmark would be pruned more than was asked."""
    shown = [one for one in source if one.images]
    alone = [conversation(number, "What is this, then?") for number in range(300)]
    alone = [replace(one, images=(), turns=(Turn("user", "What?"), one.turns[-1])) for one in alone]
    counts = [Encoder(processor).prompt_tokens(one) for one in shown]
    expected = tuple(round(sum(part) / len(counts)) for part in zip(*counts, strict=True))
    for mixed in (shown, [*shown, *alone[:5]], [*alone[:5], *shown]):
        assert prompt_tokens(Source(mixed), processor) == expected
    late = prompt_tokens(Source([*alone, *shown * 40]), processor)  # beyond the first 256
    assert late[0] > 0
    with pytest.raises(ValueError, match="none of the usable records that were looked at has an image"):
        prompt_tokens(Source(alone), processor)


def test_a_prompt_longer_than_the_context_is_not_cut(model, processor, source):
    long = conversation(1, "x" * 600)
    result = evaluate(model, processor, Source([source[0], long]), **QUIET)
    assert len(result.skipped) == 1
    assert "508" in result.skipped[0]  # 512 positions less 4 new tokens


def test_answers_that_would_be_cut_are_told(model, processor, caplog):
    long = conversation(0, "?")
    said = replace(long, turns=(*long.turns[:-1], replace(long.turns[-1], text="a long answer, word by word")))
    evaluate(model, processor, Source([long, said]), max_new_tokens=4, progress=False)
    assert "1 of 2 expected answers are longer than max_new_tokens (4)" in caplog.text


def test_ratios_are_of_samples_with_images():
    both = [SampleTokens(16, 5, (8, 2)), SampleTokens(0, 5, (0, 0))]
    config = tiny_llava().config
    alone, mixed = (measured_tokens(samples, SCHEDULE, config) for samples in (both[:1], both))
    assert mixed.flops_ratio.mean == alone.flops_ratio.mean < 1.0
    assert mixed.image_tokens == 8.0 and mixed.image_tokens_per_layer.mean == alone.image_tokens_per_layer.mean / 2


def test_several_accepted_answers_come_from_the_record():
    annotated = replace(conversation(0, "?"), meta={"answers": json.dumps(["cat", "a cat", 2])})
    assert Question(0, annotated).answers == ["cat", "a cat", "2"]
    with pytest.raises(RecordError, match="`answers`"):
        assert Question(0, replace(annotated, meta={"answers": '["cat"'})).answers


def test_questions_about_the_same_image_belong_together(tmp_path):
    picture, other = image(1), image(2)
    picture.save(tmp_path / "1.png")
    data = (tmp_path / "1.png").read_bytes()

    def cluster(index, *images, **meta):
        return Question(index, Conversation("", images, (Turn("user", "?"),), meta)).cluster

    assert cluster(0, picture) == cluster(1, image(1)) != cluster(2, other)
    assert cluster(0, data) == cluster(1, data) != cluster(2, data[:-1])
    assert cluster(0, tmp_path / "1.png") == cluster(1, tmp_path / "1.png") != cluster(2, tmp_path / "2.png")
    assert cluster(0, picture, scene="7") == cluster(1, other, scene="7")
    assert cluster(0) != cluster(1)


def test_batches_are_sorted_by_length_within_a_window():
    records = Source([conversation(i, "x" * (i * 7 % 40), images=0) for i in range(40)])
    batches = list(question_batches(records, 2, None, pytest.fail))
    assert [len(batch) for batch in batches] == [2] * 20
    lengths = [[len(question.text) for question in batch] for batch in batches]
    assert lengths[:16] == sorted(lengths[:16], reverse=True)  # a window is 16 batches
    assert sorted(question.index for batch in batches for question in batch) == list(range(40))


def test_each_process_gets_its_share(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        batches = list(
            question_batches(Source([conversation(i, "?", images=0) for i in range(7)]), 2, None, pytest.fail)
        )
        shares.append([question.index for batch in batches for question in batch])
    assert [len(share) for share in shares] == [3, 3, 3]  # as many for each: ranks must stay in step
    assert set(sum(shares, [])) == set(range(7))


def test_types_do_not_end_cells():
    assert markdown_lines(["", "a|b\nc"], [["dense", "1"]]) == "|  | a\\|b c |\n| :-- | --: |\n| dense | 1 |\n"


def test_table_files_and_numbers(model, processor, source, tmp_path):
    schedules = {"dense": None, "training-free pruned": SCHEDULE}
    answered = self_answered(model, processor, source)
    rows = compare(model, processor, answered, schedules, **QUIET)
    text = save_table(rows, tmp_path / "new", {"checkpoint": "tiny"})
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["accuracy.png", "metrics.json", "table.md"]
    assert (tmp_path / "new/table.md").read_text() == text == markdown_table(rows)
    header, _, dense, pruned = text.splitlines()[:4]
    assert header.split(" | ")[1:5] == ["overall", "a", "b", "c"]
    cells = dense.strip("| ").split(" | ")
    assert cells[0] == "dense"
    assert cells[1].startswith(f"{100 * rows[0].result.overall.score:.1f} ± ")
    assert cells[2:6] == ["100.0", "0.0", "50.0", "16"]
    assert cells[6:] == ["1.000", "1.000"]
    assert pruned.split(" | ")[5] == "16 -> 8 -> 2"
    found = json.loads((tmp_path / "new/metrics.json").read_text())
    assert found["checkpoint"] == "tiny"
    assert found["rows"][1]["schedule"] == SCHEDULE.to_dict()
    assert found["rows"][1]["types"]["c"]["count"] == 2
    assert found["rows"][1]["cost"]["flops_ratio"] == rows[1].cost.flops_ratio
    with Image.open(tmp_path / "new/accuracy.png") as picture:
        assert picture.width > 600


def test_a_wide_table_is_printed_in_parts(model, processor, source, monkeypatch, capsys):
    """A log has 80 columns; numbers were cut there."""
    monkeypatch.setenv("COLUMNS", "80")
    schedules = {"dense": None} | {f"adapted pruned at 0.{number}": SCHEDULE for number in range(1, 9)}
    rows = compare(model, processor, source, schedules, **QUIET)
    print_table(rows)
    shown = capsys.readouterr().out
    assert "…" not in shown and shown.count("overall") == 3
    ratio = markdown_table(rows).splitlines()[3].strip("| ").split(" | ")[-1]
    assert shown.count(ratio) == 8


def test_the_table_of_a_run_fits_80_columns_with_no_heading_cut(model, processor, source, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["dense", "training-free pruned", "adapted pruned", "adapted, evaluated dense"]
    rows = compare(model, processor, source, dict.fromkeys(names, SCHEDULE), **QUIET)
    print_table(rows)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and shown.count("overall") == 1
    assert set(" ".join(names).split()) <= set(shown.split())
    print_table([replace(rows[0], name="/a/folder/with/a/name/longer/than/the/terminal/is/wide/" * 2)])
    assert rows[0].result.overall.score == 0.0 and "0.0 ± 0.0" in capsys.readouterr().out  # the figures stay beside it


def test_table_of_text_alone_has_no_cost_and_json_has_no_nan(model, processor, source, tmp_path):
    row = evaluate_row("text", model, processor, Source(source[6:]), **QUIET)
    assert row.cost is None
    save_table([row], tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"][0]["overall"]["standard_error"] is None


def test_presets_fit_any_depth_and_own_schedules_are_taken_as_they_are():
    himap = PruningSchedule.from_preset("himap")
    assert fit_preset(himap, 32) == fit_preset(himap, 40) == himap
    assert [stage.layer for stage in fit_preset(himap, 8).stages] == [1, 2]
    assert is_preset("himap")
    assert is_preset({"preset": "fastv"})
    assert not is_preset({"stages": []})
    assert not is_preset("own.yaml")


# ---- recipes/evaluate.py ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six yes/no questions about two images in LLaVA's format."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(2):
        image(number).save(folder / f"{number}.png")
    records = []
    for i in range(6):
        turns = [
            {"from": "human", "value": f"<image>\nIs it {i}?"},
            {"from": "gpt", "value": ("yes", "no")[i // 2 % 2]},
        ]
        records.append(
            {"id": str(i), "image": f"{i % 2}.png", "type": ("random", "popular")[i % 2], "conversations": turns}
        )
    (folder / "test.json").write_text(json.dumps(records))
    return folder / "test.json"


def test_the_program_writes_table_and_predictions(checkpoint, data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results"
    options = ["--checkpoint", checkpoint, "--data", data, "--output", output, "--schedule", "himap"]
    options += ["--metrics", "[pope, exact]", "--max-new-tokens", 3, "--batch-size=4"]
    assert run_program("evaluate", *options, patch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "16 -> 8 -> 2" in printed and "pope_f1_mean_of_splits" in printed
    found = json.loads((output / "metrics.json").read_text())
    (row,) = found["rows"]
    # himap is written for 32 layers, this decoder has 6
    assert [stage["layer"] for stage in row["schedule"]["stages"]] == [1, 2]
    assert found["data"] == str(data)
    assert row["types"].keys() == {"random", "popular"}
    assert row["figures"]["pope_accuracy"] == pytest.approx(row["overall"]["score"])
    answers = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [str(i) for i in range(6)]
    assert answers[0]["prompt"] == "Is it 0?"
    assert sum(answer["score"] for answer in answers) / 6 == pytest.approx(row["overall"]["score"])


def test_results_are_not_overwritten_unless_asked(checkpoint, data, tmp_path, capsys):
    options = ["--checkpoint", checkpoint, "--data", data, "--limit", 2, "--max-new-tokens", 2, "--output", tmp_path]
    assert run_recipe("evaluate", *options) == 0
    before = (tmp_path / "metrics.json").read_bytes()
    assert run_recipe("evaluate", *options, "--limit", 4) == 2
    assert "already holds results" in capsys.readouterr().err
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert run_recipe("evaluate", *options, "--limit", 4, "--overwrite", "true") == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"][0]["overall"]["count"] == 4


def test_a_schedule_from_a_file_is_the_same_as_inline(checkpoint, data, tmp_path):
    (tmp_path / "pruning.yaml").write_text(yaml.safe_dump(SCHEDULE.to_dict()))
    options = ["--checkpoint", checkpoint, "--data", data, "--max-new-tokens", 2]
    assert run_recipe("evaluate", *options, "--schedule", tmp_path / "pruning.yaml", "--output", tmp_path / "file") == 0
    inline = json.dumps(SCHEDULE.to_dict())
    assert run_recipe("evaluate", *options, "--schedule", inline, "--output", tmp_path / "inline") == 0
    first, second = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("file", "inline"))
    assert first == second
    rows = [json.loads((tmp_path / name / "metrics.json").read_text())["rows"][0] for name in ("file", "inline")]
    assert rows[0]["schedule"] == rows[1]["schedule"] == SCHEDULE.to_dict()
    assert rows[0]["kept"] == rows[1]["kept"] == [8.0, 2.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "[exakt]"], "unknown metric"),
        (["--metrics", "[mme]", "--data", "embedded:test", "--limit", "3"], "is neither yes nor no"),
        (["--schedule", "fastvv"], "did you mean 'fastv'"),
        (["--schedule", '{"stages": [{"layer": 2, "criterion": "image", "keep_rate": 0.5}]}'], "'keep_rate'"),
        (["--data", "no/such.json"], "no/such.json does not exist"),
        (["--data", "embedded:tset"], "tset"),
        (["--image-folder", "no/such/folder"], "no/such/folder"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--limit", "-3"], "limit is -3; expected"),
        (["--batch-size", "0"], "batch_size is 0; expected"),
    ],
)
def test_evaluate_explains_mistakes_without_a_traceback(options, message, checkpoint, data, capsys):
    given = options if "--data" in options else ["--data", data, *options]
    assert run_recipe("evaluate", "--checkpoint", checkpoint, "--max-new-tokens", 2, *given) == 2
    shown = capsys.readouterr().err
    assert "error: " in shown
    assert message in shown
    assert "Traceback" not in shown


def test_an_unknown_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        run_recipe("evaluate", "--shcedule", "himap")
    assert ended.value.code == 2
    assert "did you mean --schedule?" in capsys.readouterr().err


def test_ctrl_c_ends_without_a_traceback(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    assert run_command(main, []) == 130
    assert "interrupted" in capsys.readouterr().err


def test_processes_share_the_questions_and_agree(model, processor, source):
    install_pruning(model, SCHEDULE)
    alone = evaluate(model, processor, source, batch_size=2, **QUIET)
    found = in_processes(2, lambda: evaluate(model, processor, source, batch_size=2, **QUIET))
    for result in found:
        assert result.predictions == alone.predictions
        assert result.overall == alone.overall
        assert result.types == alone.types
        # The eighth place is filled with sample 0 again, whose tokens are counted twice.
        assert result.image_tokens == pytest.approx((7 * 16 + 16) / 8)
        assert result.kept == pytest.approx((8.0, 2.0))


def test_the_embedded_model_prunes_as_its_schedule_says():
    embedded, its_processor = load_with_schedule("embedded", "himap")
    result = evaluate(embedded, its_processor, SceneQuestions("test", scenes=len(TYPES)), progress=False)
    assert result.image_tokens == 144
    assert result.kept == (72.0, 18.0)
    assert {name: group.count for name, group in result.types.items()} == dict.fromkeys(TYPES, 1)
    assert all(len(prediction.prediction.split()) <= 3 for prediction in result.predictions)  # words, then the end


def test_chart_has_a_value_at_each_bar_and_axes_from_0() -> None:
    group = GroupScore(0.714, 0.02, 50)
    ratio = Measured(0.4, 0.0)
    tokens = MeasuredTokens(16.0, 9.0, (), (), ratio, ratio, None)
    scores = {"metric": "exact", "overall": group, "types": {"count": group}, "figures": {}}
    result = EvaluationResult(**vars(tokens), **scores, seconds=1.0, predictions=[])
    cost = PruningSchedule().cost(tiny_llava().config, image_tokens=16, text_tokens=9)
    bars, points = draw_chart([Row("a", result, cost), Row("b", result, cost)]).axes
    assert [text.get_text() for text in bars.texts] == ["71"] * 4
    assert points.get_ylim()[0] == points.get_xlim()[0] == bars.get_ylim()[0] == 0


def test_progress_in_a_log_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bar, "EVERY", 0.0)
    for shown in (True, False):
        with bar.progress_bar("evaluating", 8, shown) as advance:
            advance(2)
            advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and re.fullmatch(r"evaluating: 4 of 8, [\d.]+ min left, [\d.e+]+/s", lines[1])
