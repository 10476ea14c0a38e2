"""lmms-eval's model `himap`. What needs lmms-eval itself runs by `make test-lmms-eval`, the rest on a stand-in."""

from __future__ import annotations

import math
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from evaluation_toys import conversation, image
from tiny import tiny_llava, tiny_processor
from training_toys import save_tiny

from himap_train import PruningSchedule, PruningStage, install_pruning
from himap_train.checkpoints.load import load_with_schedule
from himap_train.data.batches import collate
from himap_train.data.encode import Encoder
from himap_train.data.records import Turn
from himap_train.data.scene_questions import SceneQuestions
from himap_train.data.skips import TooManySkippedError
from himap_train.evaluation.answering import answer_batch, answer_losses, evaluation_mode
from himap_train.evaluation.budgeted import prompt_tokens, run_at_budget
from himap_train.evaluation.evaluate import evaluate
from himap_train.evaluation.lmms_eval import manifest
from himap_train.evaluation.lmms_eval.requests import Answering, to_conversation, user_message
from himap_train.evaluation.result import SampleTokens, report

SCHEDULE = PruningSchedule((PruningStage(2, "instruction", 0.5), PruningStage(4, "image", 0.125)))
HARNESS = find_spec("lmms_eval") is not None
needs_harness = [pytest.mark.lmms_eval, pytest.mark.skipif(not HARNESS, reason="lmms-eval is not installed")]
GREEDY = {"do_sample": False}


# ---- what a task asks for ----


@pytest.mark.parametrize(
    ("options", "length", "search"),
    [
        ({}, 1024, GREEDY),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1}, 16, {**GREEDY, "num_beams": 1}),
        ({"temperature": 0.2, "top_p": 0.9, "do_sample": False}, 1024, GREEDY),
        ({"temperature": 0.0, "do_sample": True}, 1024, GREEDY),
        ({"temperature": 0.7, "top_p": None}, 1024, {"do_sample": True, "temperature": 0.7}),
        ({"do_sample": True, "top_k": 5, "image_aspect_ratio": "original"}, 1024, {"do_sample": True, "top_k": 5}),
    ],
)
def test_options_of_a_task(options, length, search):
    found = Answering.of(options)
    assert (found.max_new_tokens, found.search) == (length, search)


def test_answers_end_where_the_task_says_but_not_at_the_filler_of_the_harness():
    assert Answering.of({"until": ["\n\n"]}).cut("one\n\ntwo") == "one\n\ntwo"
    assert Answering.of({"until": ["Q:", "", "USER"]}).cut("yes USER no Q: x") == "yes"
    assert Answering.of({"until": "stop"}).cut("a stop") == "a"
    with pytest.raises(ValueError, match="'max_new_token'; did you mean 'max_new_tokens'"):
        Answering.of({"max_new_token": 5})
    for length in (0, -1):
        with pytest.raises(ValueError, match=f"max_new_tokens is {length}; expected 1 or more"):
            Answering.of({"max_new_tokens": length})


def test_messages_become_turns_with_images_at_their_places(tmp_path):
    first, second = image(1), image(2)
    found = to_conversation("x", user_message([first, str(tmp_path / "a.png")], "What?"))
    assert found.turns == (Turn("user", "<image><image>What?"),)
    assert found.images == (first, tmp_path / "a.png")
    inside = to_conversation("x", user_message([first, second], "Is <image> like <image>?"))
    assert inside.turns == (Turn("user", "Is <image> like <image>?"),) and inside.images == (first, second)
    system = to_conversation("x", [{"role": "system", "content": "Be brief."}, *user_message(None, "Hi")])
    assert system.turns == (Turn("system", "Be brief."), Turn("user", "Hi")) and not system.images
    for part in ({"type": "video", "url": "a.mp4"}, {"type": "image", "url": {"array": 1}}):
        with pytest.raises(ValueError, match=f"doc 3 shows a {part['type']}"):
            to_conversation("doc 3", [{"role": "user", "content": [part]}])


# ---- answering and ranking ----


def test_losses_of_answers_are_those_of_the_model_on_each_alone():
    model, processor = install_pruning(tiny_llava().eval(), SCHEDULE), tiny_processor()
    asked = [
        conversation(1, "Is it so?", "yes"),
        conversation(2, "What?", "no idea at all"),
        conversation(3, "a", "b", 0),
    ]
    samples = [Encoder(processor).encode(one) for one in asked]
    with evaluation_mode(model):
        found, tokens = answer_losses(model, collate(samples, 0))
        for sample, (loss, greedy) in zip(samples, found, strict=True):
            batch = collate([sample], 0)
            out = model(input_ids=batch["input_ids"], labels=batch["labels"], **batch["images"])
            assert loss == pytest.approx(out.loss.item(), rel=1e-5)
            ends = batch["labels"][0, 1:] != -100
            assert greedy == torch.equal(out.logits[0, :-1][ends].argmax(-1), batch["labels"][0, 1:][ends])
    prompts = [len(sample["input_ids"]) - int((sample["labels"] != -100).sum()) for sample in samples]
    assert tokens == [SampleTokens(16, prompts[0] - 16, (8, 2)), SampleTokens(16, prompts[1] - 16, (8, 2)),
                      SampleTokens(0, prompts[2], (0, 0))]  # fmt: skip


def test_the_greedy_answer_is_found_and_beams_and_samples_are_other_searches():
    model, processor = install_pruning(tiny_llava().eval(), SCHEDULE), tiny_processor()
    encoder = Encoder(processor)
    batch = collate([encoder.encode_prompt(conversation(n, "What is it?")) for n in range(3)], 0, padding_side="left")
    with evaluation_mode(model):
        greedy, tokens = answer_batch(model, processor, batch, 4)
        beams, same = answer_batch(model, processor, batch, 4, {"num_beams": 3})
        torch.manual_seed(0)
        sampled, _ = answer_batch(model, processor, batch, 4, {"do_sample": True, "temperature": 50.0})
    assert tokens == same and [one.kept for one in tokens] == [(8, 2)] * 3
    assert greedy != beams and greedy != sampled


def test_the_report_keeps_prompts_without_images_apart():
    config = tiny_llava().config
    text = report([SampleTokens(16, 10, (8, 2)), SampleTokens(0, 5, (0, 0))], SCHEDULE, config)
    assert text.startswith("2 prompts, 1 without an image; schedule {'stages'")
    assert "image tokens 16.0 -> 8.0 -> 2.0, 8.7 averaged over layers; others 10.0; flops_ratio 0." in text
    assert report([SampleTokens(0, 5)], PruningSchedule(), config).startswith("1 prompts, 1 without")


# ---- the model, on a stand-in for the harness where it is not installed ----


def test_the_entry_point_is_a_function_that_says_how_to_install(monkeypatch):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lmms_eval.models"]["himap"].split(":")
    assert getattr(import_module(module), name) is manifest
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", None)
    with pytest.raises(ImportError, match=r"lmms-eval.* pip install -c own.txt -e '.\[lmms-eval\]'"):
        manifest()


@pytest.fixture
def himap(monkeypatch):
    """The module of the model."""
    name = "himap_train.evaluation.lmms_eval.model"
    if not HARNESS:
        stand_in: Any = ModuleType("lmms_eval.api.model")
        stand_in.lmms = type(
            "lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {}), "clean": lambda _: 0}
        )
        monkeypatch.setitem(sys.modules, "lmms_eval", ModuleType("lmms_eval"))
        stand_in.GenerationResult = lambda text: SimpleNamespace(text=text)
        monkeypatch.setitem(sys.modules, "lmms_eval.api.model", stand_in)
        monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", stand_in)
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield import_module(name)
    if not HARNESS:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def asked(model, task, documents, options=None, arguments=None):
    """Requests about documents, as the harness makes them."""
    model.task_dict[task] = {"test": documents}
    made = []
    for number, document in enumerate(documents):
        context = document["question"]
        args = arguments(document) if arguments else (lambda doc: user_message(doc["images"], doc["question"]), options)
        request = {"task_name": task, "metadata": {}, "args": (context, *args, number, task, "test")}
        made.append(SimpleNamespace(**request))
    return made


def documents(*questions, broken=0):
    return [
        {"question": text, "images": [b"no image" if number < broken else image(number)] if text else []}
        for number, text in enumerate(questions)
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrained": ""}, "names no checkpoint: pretrained="),
        ({"budgett": 0.4}, "unknown key 'budgett'; did you mean 'budget'"),
        ({"max_batch_size": 8}, "unknown key 'max_batch_size'"),
        ({"batch_size": "auto"}, "--batch_size is 'auto'; expected a number"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"schedule": "himapp"}, "did you mean 'himap'"),
        ({"schedule": '{"stages": [{"layer": 40, "criterion": "image", "keep_ratio": 0.5}]}'}, "layer 40"),
        ({"schedule": "none", "budget": 0.4}, "--budget 0.4 with --schedule none"),
        ({"budget": 0.4}, "saved without a schedule"),
        ({"budget": "low"}, "budget is 'low'; expected a number"),
        ({"budget": 40}, "--budget is 40"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio is 'square'"),
    ],
)
def test_arguments_that_cannot_be_are_named(himap, tiny, given, message):
    with pytest.raises(ValueError, match=message):
        himap.Himap(**{"pretrained": tiny, "device": "cpu", **given})


def test_a_budget_needs_chat_tasks(himap, tiny):
    with pytest.raises(ValueError, match="--force_simple with budget"):
        himap.SimpleHimap(tiny, "himap", 0.5)


def test_answers_come_in_order_whatever_the_batches_and_tasks(himap, tiny, capsys):
    model = himap.Himap(
        tiny, schedule='{"stages": [{"layer": 2, "criterion": "image", "keep_ratio": 0.5}]}', device="cpu"
    )
    questions = documents("a", "what is that over there?", "", "is it?", "why is it so?")
    requests = asked(model, "first", questions, {"max_new_tokens": 3})
    requests += asked(model, "second", questions[:2], {"max_new_tokens": 6})
    alone = model.generate_until(requests)
    model._batch_size = 4
    assert model.generate_until(requests[::-1]) == alone[::-1]
    assert len(set(alone)) > 3 and alone[5].startswith(alone[0]) and alone[5] != alone[0]
    model.clean()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("; ")[0] for line in lines] == ["himap: first: 10 prompts, 2 without an image",
                                                       "himap: second: 4 prompts, 0 without an image"]  # fmt: skip
    assert "image tokens 16.0 -> 8.0, 10.7 averaged over layers" in lines[0]


def test_each_task_runs_at_the_budget_of_its_own_prompts(himap, tiny):
    model = himap.Himap(tiny, "himap", 0.9, device="cpu")
    short, long = documents("a", "b"), documents("what is that?", "why is it so?")
    requests = asked(model, "short", short, {"max_new_tokens": 1}) + asked(model, "long", long, {"max_new_tokens": 1})
    model.generate_until(requests)
    ratios = [ran[0].stages[0].keep_ratio for ran in model._ran.values()]
    assert ratios[0] > ratios[1]  # text is not pruned: more of it leaves less for the images
    alone = himap.Himap(tiny, "himap", 0.9, device="cpu")
    alone.generate_until(asked(alone, "long", long, {"max_new_tokens": 1}))
    assert alone._ran["long"][0] == model._ran["long"][0]
    padding = asked(model, "short", short[:1], {"max_new_tokens": 1})
    padding[0].metadata["__padding_only__"] = True
    model.generate_until(padding)
    assert len(model._ran["short"][1]) == 2


def test_unusable_documents_are_answered_with_nothing_up_to_a_limit(himap, tiny):
    model = himap.Himap(tiny, device="cpu", batch_size="2", max_skipped=1)
    answers = model.generate_until(asked(model, "t", documents("a", "b", "c", broken=1), {"max_new_tokens": 2}))
    assert answers[0] == "" and all(answers[1:])
    with pytest.raises(TooManySkippedError, match="t 1"):
        model.generate_until(asked(model, "t", documents("a", "b", "c", broken=2), {}))


def test_ranking_takes_texts_or_functions_and_rounds_are_refused(himap, tiny):
    model = himap.SimpleHimap(tiny, "himap", device="cpu", batch_size=2)
    given = documents("which one?")
    wanted = [" yes", "yes", lambda doc: " yes ", "no"]
    requests = [
        request
        for text in wanted
        for request in asked(model, "t", given, arguments=lambda doc, text=text: (text, lambda doc: doc["images"]))
    ]
    found = model.loglikelihood(requests)
    losses = [one.text[0] for one in found]
    assert losses[:3] == pytest.approx([losses[0]] * 3) and losses[0] != losses[3] and min(losses) > 0
    assert model.loglikelihood([]) == []
    broken = asked(model, "t", documents("x", broken=1), arguments=lambda doc: ("yes", lambda doc: doc["images"]))
    model._max_skipped = 1
    assert model.loglikelihood(broken)[0].text == (math.inf, False)
    with pytest.raises(NotImplementedError, match="acc_mutual_info"):
        model.loglikelihood([SimpleNamespace(args=("", "yes"))])
    with pytest.raises(NotImplementedError, match="task t asks in several rounds"):
        model.generate_until_multi_round(requests)


# ---- the harness itself ----

SCENES = 24
TASKS = {
    "himap_scenes": """
output_type: generate_until
generation_kwargs: {max_new_tokens: 16}
process_results: !function utils.score
metric_list: [{metric: accuracy, aggregation: mean, higher_is_better: true}]
""",
    "himap_ranked": """
output_type: multiple_choice
doc_to_choice: !function utils.choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "himap_rounds": """
output_type: generate_until_multi_round
process_results: !function utils.score
metric_list: [{metric: accuracy, aggregation: mean, higher_is_better: true}]
""",
}
FUNCTIONS = """
CHOICES = ["yes", "no", "red", "3"]

def visuals(doc):
    return [doc["image"].convert("RGB")]

def text(doc, **kwargs):
    return doc["question"]

def choices(doc):
    return [*CHOICES, *([doc["answer"]] if doc["answer"] not in CHOICES else [])]

def score(doc, results):
    from himap_train.evaluation.text import ExactMatch
    return {"accuracy": ExactMatch().measure(results[0], [doc["answer"]], {})[0]}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    from datasets import Dataset, DatasetDict

    folder = tmp_path_factory.mktemp("lmms")
    rows = [
        {"image": one.images[0], "question": one.turns[0].text.removeprefix("<image>\n"), "answer": one.answer}
        for one in SceneQuestions("test", scenes=SCENES)
    ]
    DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(folder / "scenes")
    (folder / "utils.py").write_text(FUNCTIONS)
    for name, text in TASKS.items():
        common = f"dataset_path: {folder / 'scenes'}\ndataset_kwargs: {{load_from_disk: true}}\ntest_split: test\n"
        common += "doc_to_visual: !function utils.visuals\ndoc_to_text: !function utils.text\ndoc_to_target: answer\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return folder


def run(tasks, task, batch_size=8, simple=False, gen_kwargs=None, **arguments):
    """Scores of a task, and its answers."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = simple_evaluate(
        "himap",
        model_args=",".join(f"{name}={value}" for name, value in {"pretrained": "embedded", **arguments}.items()),
        tasks=[task],
        batch_size=batch_size,
        device="cpu",
        force_simple=simple,
        gen_kwargs=gen_kwargs,
        bootstrap_iters=0,
        task_manager=TaskManager("WARNING", include_path=str(tasks), include_defaults=False, model_name="himap"),
    )
    return found["results"][task], [sample["filtered_resps"] for sample in found["samples"][task]]


class TestHarness:
    pytestmark = needs_harness

    def test_the_plug_in_is_listed(self):
        from lmms_eval.models import get_model_manifest, list_available_models

        assert "himap" in list_available_models()
        assert get_model_manifest("himap") == manifest()

    @pytest.mark.parametrize(
        "arguments", [{"schedule": "himap"}, {"schedule": "none"}, {"schedule": "himap", "budget": 0.5}]
    )
    def test_accuracy_equals_that_of_evaluate_to_the_digit(self, tasks, arguments, capsys):
        scores, answers = run(tasks, "himap_scenes", **arguments)
        model, processor = load_with_schedule("embedded", arguments.get("schedule", "none"), device="cpu")
        source = SceneQuestions("test", scenes=SCENES)
        if "budget" in arguments:
            run_at_budget(model, arguments["budget"], *prompt_tokens(source, processor))
        expected = evaluate(model, processor, source, progress=False)
        assert scores["accuracy,none"] == expected.overall.score > 0.3
        assert answers == [[one.prediction] for one in expected.predictions]
        shown = capsys.readouterr().out
        assert f"himap: himap_scenes: {SCENES} prompts, 0 without an image; schedule" in shown
        assert f"flops_ratio {expected.flops_ratio.mean:.3f}" in shown

    def test_simple_requests_give_the_same_and_sampling_other_answers(self, tasks):
        chat = run(tasks, "himap_scenes", schedule="himap", batch_size=5)[1]
        simple = run(tasks, "himap_scenes", schedule="himap", simple=True)[1]
        sampled = run(tasks, "himap_scenes", schedule="himap", gen_kwargs="temperature=5.0,do_sample=True")[1]
        assert chat == simple != sampled

    def test_ranking_chooses_the_answer_of_the_least_loss(self, tasks):
        scores, found = run(tasks, "himap_ranked", schedule="none", simple=True)
        model, processor = load_with_schedule("embedded", "none", device="cpu")
        encoder = Encoder(processor)
        right = 0
        for row, one in enumerate(SceneQuestions("test", scenes=SCENES)):
            words = ["yes", "no", "red", "3"]
            words += [one.answer] * (one.answer not in words)
            turns = [(one.turns[0], Turn("assistant", word)) for word in words]
            made = [encoder.encode(replace(one, turns=pair)) for pair in turns]
            with evaluation_mode(model):
                losses = [loss for loss, _ in answer_losses(model, collate(made, 0))[0]]
            assert [float(loss) for loss, _ in found[row]] == pytest.approx(losses, rel=1e-3, abs=1e-4)
            right += words[losses.index(min(losses))] == one.answer
        assert scores["acc,none"] == right / SCENES > 0.5

    def test_several_rounds_are_refused(self, tasks):
        with pytest.raises(NotImplementedError, match="himap_rounds asks in several rounds"):
            run(tasks, "himap_rounds", schedule="himap")

    @pytest.mark.parametrize("processes", [1, 2])
    def test_the_real_command_line_and_several_processes(self, tasks, processes):
        launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"] if processes == 2 else []
        command = [sys.executable, "-m", *launch, "lmms_eval", "--model", "himap", "--include_path", str(tasks)]
        command += [
            "--model_args",
            "pretrained=embedded,schedule=himap",
            "--tasks",
            "himap_scenes",
            "--batch_size",
            "5",
        ]
        done = subprocess.run([*command, "--limit", "23"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        expected = evaluate(*load_with_schedule("embedded", "himap", device="cpu"),
                            SceneQuestions("test", scenes=23), progress=False)  # fmt: skip
        assert f"|{round(expected.overall.score, 4)}|" in done.stdout.replace(" ", ""), done.stdout
        assert "himap: himap_scenes: 23 prompts, 0 without an image" in done.stdout
