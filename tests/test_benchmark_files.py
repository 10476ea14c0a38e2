"""Benchmarks from their own files: what is asked, which answers count, how it is scored, what servers take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import benchmark_files as files
import pytest
from benchmark_files import lines, llava_questions, picture, png
from recipes_cli import run_recipe
from training_toys import save_tiny

from himap_train.data.records import RecordError
from himap_train.data.sources import open_source
from himap_train.evaluation.benchmarks.cells import options_in
from himap_train.evaluation.benchmarks.export import export
from himap_train.evaluation.benchmarks.opening import Task, open_task
from himap_train.evaluation.benchmarks.table import BENCHMARKS
from himap_train.evaluation.metrics import METRICS, make_metrics
from himap_train.evaluation.questions import Question, source_length
from himap_train.evaluation.result import Prediction

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def asked(task: Task) -> list[str]:
    """The prompts, the images' places included."""
    return [conversation.turns[0].text for conversation in task.source]


def answers(task: Task) -> list[list[str]]:
    return [Question(index, conversation).answers for index, conversation in enumerate(task.source)]


def types(task: Task) -> list[str]:
    return [conversation.meta.get("type", "") for conversation in task.source]


def figures(task: Task, *said: str) -> dict[str, float]:
    """All figures for these answers."""
    questions = [Question(index, conversation) for index, conversation in enumerate(task.source)]
    found = {}
    for metric in make_metrics(task.metrics):
        metric.update(
            said,
            [question.answers for question in questions],
            [question.conversation.meta for question in questions],
            [str(question.index) for question in questions],
            [question.cluster for question in questions],
        )
        found |= metric.figures(metric.rows())
    return found


@pytest.mark.parametrize(
    ("name", "write", "prompt", "accepted", "kind", "metric"),
    [
        ("pope", files.pope, f"Is there a cat in the image?{SHORT}", ["yes"], "adversarial", "pope"),
        ("textvqa", files.textvqa, f"what brand is this?{SHORT}", ["nokia"] * 9 + ["htc"], "", "textvqa"),
        (
            "textvqa-ocr",
            files.textvqa,
            f"what brand is this?\nReference OCR token: NOKIA, 3310{SHORT}",
            ["nokia"] * 9 + ["htc"],
            "",
            "textvqa",
        ),
        ("vqav2", files.vqav2, f"Where?{SHORT}", ["net"] * 10, "other", "vqa"),
        ("gqa", files.gqa, f"Is it overcast 0?{SHORT}", ["no"], "verify", "gqa"),
        ("mme", files.mme, f"Is there a red coat in the image?{SHORT}", ["Yes"], "color", "mme"),
        (
            "scienceqa",
            files.scienceqa,
            f"Context: N/A\nQuestion: How many?\nOptions: (A) 1 (B) 2 (C) 0{LETTER}",
            ["B"],
            "image",
            "choice-strict",
        ),
        ("chartqa", files.chartqa, "How many?\nAnswer the question with a single word.", ["14"], "machine", "relaxed"),
        (
            "chartqa",
            files.chartqa_lmms,
            "How many?\nAnswer the question with a single word.",
            ["14"],
            "human_test",
            "relaxed",
        ),
        ("ai2d", files.ai2d, f"Which?\nA. ant\nB. bee{LETTER}", ["B"], "", "choice"),
        ("seed", files.seed, f"How many?\nA. One\nB. Two\nC. Three\nD. Four{LETTER}", ["C"], "5", "choice"),
        ("docvqa", files.docvqa, f"What is the date?{SHORT}", ["1/8/93", "January 8"], "", "anls"),
        ("mmbench", files.mmbench, f"Look.\nWhich?\nA. ant\nB. bee\nC. cow{LETTER}", ["B"], "nature", "circular"),
    ],
)
def test_columns_become_question_answers_and_type(name, write, prompt, accepted, kind, metric, tmp_path):
    task = open_task(str(write(tmp_path)), name)
    assert asked(task)[0] == f"<image>\n{prompt}"
    assert answers(task)[0] == accepted and types(task)[0] == kind
    assert task.metrics[0] == metric and task.max_new_tokens == BENCHMARKS[name].max_new_tokens
    (image,) = task.source[0].images
    assert image == png(0 if name in ("pope", "gqa", "mme", "mmbench") else 1)
    for scorer in make_metrics(task.metrics):
        for question, accepted_here in zip(task.source, answers(task), strict=True):
            scorer.check(accepted_here, question)  # every reference can be scored


def test_every_entry_has_metrics_and_a_line_in_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "evaluate_benchmarks.md").read_text()
    lines_of_table = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    limits = {name: int(line[-1].strip(" |")) for line in lines_of_table for name in re.findall("`(.+?)`", line[0])}
    assert limits == {name: entry.max_new_tokens for name, entry in BENCHMARKS.items()}
    for name, entry in BENCHMARKS.items():
        assert set(entry.metrics) <= set(METRICS), name
        assert entry.metrics or entry.export in ("mmvet", "llava-bench"), name


def test_rows_without_an_image_or_that_do_not_count(tmp_path):
    task = open_task(str(files.scienceqa(tmp_path / "sqa")), "scienceqa")
    assert asked(task)[1].startswith("Context: See here.\nQuestion: Which?\nOptions: (A) a cat (B) a dog\n")
    assert types(task) == ["image", "text"] and answers(task) == [["B"], ["A"]]
    found = figures(task, "B", "The answer is B.")
    assert found["choice-strict"] == 0.5 and found["choice-strict/text"] == 0.0
    seed = open_task(str(files.seed(tmp_path / "seed")), "seed")
    assert [conversation.id for conversation in seed.source] == ["101669"]  # the video's question is left out


def test_gqa_joins_its_two_configs(tmp_path):
    task = open_task(str(files.gqa(tmp_path)), "gqa")
    assert [conversation.images[0] for conversation in task.source] == [png(0), png(0), png(1), png(1)]
    assert [Question(0, conversation).cluster for conversation in task.source] == ["n0", "n0", "n1", "n1"]
    alone = open_task(str(files.gqa(tmp_path / "less", images=1)), "gqa")
    assert alone.source[1].images == (png(0),)
    with pytest.raises(RecordError, match="row 2: image 'n1' is not in .*testdev_balanced_images"):
        alone.source[2]


def test_mme_pairs_questions_of_one_image(tmp_path):
    task = open_task(str(files.mme(tmp_path)), "mme")
    found = figures(task, "Yes", "No", "Yes", "Yes", "no", "no", "other", "No.")
    assert found["mme_acc/color"] == 75.0 and found["mme_acc_plus/color"] == 50.0
    assert found["mme_perception"] == 125.0
    assert found["mme_cognition"] == 50.0 + 0.0


def test_pope_scores_each_category(tmp_path):
    found = figures(open_task(str(files.pope(tmp_path)), "pope"), "Yes", "yes", "no", "No", "Yes, a dog.", "no")
    # said y y n n y n, true y n y n y n, in the categories a p r a p r
    assert found["pope_f1/adversarial"] == 1.0 and found["pope_f1/random"] == 0.0
    assert found["pope_f1/popular"] == pytest.approx(2 / 3)
    assert found["pope_f1_mean_of_splits"] == pytest.approx(5 / 9)


def test_mmbench_rotations_are_made_where_the_file_has_none(tmp_path):
    task = open_task(str(files.mmbench(tmp_path)), "mmbench")
    assert [conversation.id for conversation in task.source] == ["5", "1000005", "2000005", "9", "1000009"]
    assert asked(task)[1] == f"<image>\nLook.\nWhich?\nA. bee\nB. cow\nC. ant{LETTER}"
    assert asked(task)[4] == f"<image>\nWhere?\nA. out\nB. in{LETTER}"  # no hint
    assert answers(task) == [["B"], ["A"], ["C"], ["A"], ["B"]]
    found = figures(task, "B", "A", "C", "A", "A")
    assert found["circular"] == 0.5 and found["choice"] == pytest.approx(0.8)
    given = open_task(str(files.mmbench(tmp_path / "given", rotated=True)), "mmbench")
    assert [conversation.id for conversation in given.source] == ["5", "9", "1000009"]
    assert answers(given) == [["B"], ["A"], ["B"]]
    assert given.source[2].images == given.source[1].images == (png(1),)
    assert figures(given, "C", "A", "B")["circular"] == 0.5  # one of two questions


# ---- LLaVA's own files ----


def pope_answers(folder: Path, text: str = "Is there a cat?") -> Path:
    lines(folder / "coco_pope_random.json", [{"question_id": 1, "image": "0.png", "text": text, "label": "no"}])
    return folder


def test_llavas_pope_with_its_answer_files(tmp_path):
    questions = llava_questions(tmp_path / "q" / "pope.jsonl", "Is there a cat?", suffix=SHORT, category="random")
    for given in (pope_answers(tmp_path / "coco"), tmp_path / "coco" / "coco_pope_random.json"):
        task = open_task(str(questions), "pope", given)
        assert asked(task) == [f"<image>\nIs there a cat?{SHORT}"]  # as it stands: no second request
        assert answers(task) == [["no"]] and types(task) == ["random"]
        assert task.source[0].images == (tmp_path / "q" / "0.png",)
    with pytest.raises(ValueError, match=r"no answer to 1 of the 1 questions .*'is there a cat\?'.*'is there a dog\?'"):
        open_task(str(questions), "pope", pope_answers(tmp_path / "other", "Is there a dog?"))
    with pytest.raises(ValueError, match="--answers FILE"):
        open_task(str(questions), "pope")
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        open_task(str(questions), "pope", tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("name", "file", "content", "accepted", "kind"),
    [
        (
            "textvqa",
            "TextVQA_0.5.1_val.json",
            {"data": [{"image_id": "0", "question": "What Brand?", "question_id": 34602, "answers": ["a"] * 10}]},
            ["a"] * 10,
            "",
        ),
        (
            "gqa",
            "testdev_balanced_questions.json",
            {"0": {"question": "What brand?", "answer": "no", "types": {"structural": "query"}}},
            ["no"],
            "query",
        ),
        (
            "vqav2",
            "annotations.json",
            {
                "info": {},
                "annotations": [{"question_id": 0, "answer_type": "other", "answers": [{"answer": "b"}] * 10}],
            },
            ["b"] * 10,
            "other",
        ),
        (
            "vizwiz",
            "val.json",
            [{"image": "0.png", "question": "What brand?", "answers": [{"answer": "c"}] * 10}],
            ["c"] * 10,
            "default",
        ),
        (
            "seed",
            "SEED-Bench.json",
            {"questions": [{"question_id": "0", "answer": "C", "data_type": "image", "question_type_id": 3}]},
            ["C"],
            "3",
        ),
    ],
)
def test_answer_files_in_their_own_forms(name, file, content, accepted, kind, tmp_path):
    questions = llava_questions(tmp_path / "questions.jsonl", "What brand?", suffix=SHORT)
    (tmp_path / file).write_text(json.dumps(content))
    task = open_task(str(questions), name, tmp_path / file)
    assert answers(task) == [accepted] and types(task) == [kind]
    assert asked(task) == [f"<image>\nWhat brand?{SHORT}"]


def test_mmes_folder_of_texts(tmp_path):
    more = {"category": "artwork", "question_id": "artwork/10002.jpg"}
    questions = llava_questions(tmp_path / "llava_mme.jsonl", "Is it a cat?", suffix=SHORT, **more)
    folder = tmp_path / "MME" / "artwork" / "questions_answers_YN"
    folder.mkdir(parents=True)
    (folder / "10002.txt").write_text(
        "Is it a dog? Please answer yes or no.\tNo\nIs it a cat? Please answer yes or no.\tYes\n"
    )
    task = open_task(str(questions), "mme", tmp_path / "MME")
    assert answers(task) == [["Yes"]] and types(task) == ["artwork"]


def test_llavas_scienceqa_conversations_are_asked_for_letters(tmp_path):
    question = "Which?\nContext: N/A\nOptions: (A) a cat (B) a dog"
    turns = [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": "The answer is B."}]
    without = [{"from": "human", "value": question}, turns[1]]
    records = [{"id": "4", "image": "0.png", "conversations": turns}, {"id": "5", "conversations": without}]
    (tmp_path / "llava_test_CQM-A.json").write_text(json.dumps(records))
    (tmp_path / "0.png").write_bytes(png(0))
    task = open_task(str(tmp_path / "llava_test_CQM-A.json"), "scienceqa")
    assert asked(task) == [f"<image>\n{question}{LETTER}", question + LETTER]
    assert answers(task) == [["B"], ["B"]] and types(task) == ["image", "text"]
    assert task.source[0].meta["A"] == "a cat"
    assert figures(task, "B", "C")["choice-strict/image"] == 1.0


# ---- files of any columns ----


def test_free_form(tmp_path):
    chart = str(files.chartqa(tmp_path / "chart"))
    own = {"prompt": r"{query}\nIn one word, {{please}}.", "answer": "label", "type": "human_or_machine"}
    task = open_task(chart, **own)
    assert asked(task) == ["<image>\nHow many?\nIn one word, {please}."]
    assert (answers(task), types(task), task.metrics) == ([["14"]], ["machine"], ("exact",))
    (tmp_path / "0.png").write_bytes(png(0))
    row = {"q": "Which <image>?", "right": "bee", "of": ["ant", "bee"], "image": "0.png", "nested": {"kind": 4}}
    path = lines(tmp_path / "own.jsonl", [row])
    task = open_task(str(path), prompt="{q}\n{options}", answer="right", options="of", type="nested.kind")
    assert asked(task) == ["Which <image>?\nA. ant\nB. bee"]  # where it says
    assert task.metrics == ("choice",) and figures(task, "(b)") == {"choice": 1.0, "choice/4": 1.0}
    photo = files.save(tmp_path / "photo", [{"photo": picture(2), "question": "?", "answer": "a"}], photo=files.IMAGE)
    assert open_task(str(photo), answer="answer").source[0].images == (png(2),)  # whatever the column is called
    (tmp_path / "own.csv").write_text("question,answer\nWhat?,a cat\n")
    assert asked(open_task(str(tmp_path / "own.csv"), answer="answer")) == ["What?"]


def test_rows_of_question_and_answer_need_no_more_than_a_csv(tmp_path):
    """Elsewhere the message says what reads them."""
    (tmp_path / "a.csv").write_text("image,question,answer\n0.png,What?,cat\n")
    task = open_task(str(tmp_path / "a.csv"))
    record = task.source[0]
    assert record.images == (tmp_path / "0.png",) and record.turns[0].text.endswith("What?")
    assert (json.loads(record.meta["answers"]), task.metrics) == (["cat"], ("exact",))
    with pytest.raises(ValueError, match=r"files \*.csv are not read"):  # to train on
        open_source(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text("image,q,a\n0.png,What?,cat\n")
    with pytest.raises(ValueError, match="expected also 'question', 'answer'"):
        open_task(str(tmp_path / "b.csv"))
    (tmp_path / "c.jsonl").write_text(json.dumps({"image": "0.png", "question": "What?", "answer": "cat"}))
    with pytest.raises(ValueError, match=r"no key `conversations`.*read by --prompt '{question}'"):
        open_task(str(tmp_path / "c.jsonl"))


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["ant", "bee"], ["ant", "bee"]),
        (["ant", "bee", None, ""], ["ant", "bee"]),
        ({"A": "ant", "B": "bee"}, ["ant", "bee"]),
        ({"text": ["ant", "bee"], "label": ["A", "B"]}, ["ant", "bee"]),
        ("['ant', 'bee']", ["ant", "bee"]),
        ('["ant", "bee"]', ["ant", "bee"]),
        (None, []),
        ({"B": "bee", "A": "ant"}, ["ant", "bee"]),
        ('["ant", "bee", null]', ["ant", "bee"]),
        ("['ant' 'bee']", "expected a list of options, or a mapping"),
        ({"A": "ant", "C": "bee"}, "letters or numbers that follow each other"),
        (["ant", None, "bee"], "letters or numbers that follow each other"),
        ("ant or bee", "expected a list of options, or a mapping"),
        (3, "expected a list of options, or a mapping"),
    ],
)
def test_options_in_any_form_are_asked_or_named(options, texts, tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"question": "Which?", "answer": "B", "of": options}])
    source = open_task(str(path), prompt="{question}\n{options}", options="of").source
    if isinstance(texts, str):
        with pytest.raises(RecordError, match=texts):
            source[0]
    else:
        listed = "".join(f"\n{letter}. {text}" for letter, text in zip("AB", texts, strict=False))
        assert source[0].turns[0].text == f"Which?{listed}"


def test_answers_by_the_labels_of_the_file(tmp_path):
    """ARC numbers some of its options from 1."""
    options = {"text": ["ant", "bee", "cow"], "label": ["1", "2", "3"]}
    path = lines(tmp_path / "a.jsonl", [{"question": "Which?", "answer": "1", "of": options}])
    task = open_task(str(path), prompt="{question}\n{options}", options="of")
    assert answers(task) == [["A"]] and asked(task) == ["Which?\nA. ant\nB. bee\nC. cow"]


def test_pictures_in_other_columns_are_shown_or_named(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    path = str(lines(tmp_path / "a.jsonl", [{"question": "?", "answer": "a", "image_path": "0.png"}]))
    with pytest.raises(ValueError, match="pictures in image_path, which would not be shown: give --image-column"):
        open_task(path, prompt="{question}")
    assert open_task(path, prompt="{question}", image="image_path").source[0].images == (tmp_path / "0.png",)
    rows = [{"question": "?", "answer": "a", "left": picture(1), "right": picture(2)}]
    (tmp_path / "named.jsonl").write_text(json.dumps({"question": "?", "answer": "a", "image": "0.png"}))
    with pytest.raises(ValueError, match="expected also 'pictures'"):
        open_task(str(tmp_path / "named.jsonl"), prompt="{question}", image="pictures")
    alone = [{"question": "?", "answer": "a", "image_1": picture(1)}]
    numbered = str(files.save(tmp_path / "one", alone, image_1=files.IMAGE))
    assert open_task(numbered, prompt="{question}").source[0].images == (png(1),)
    assert open_task(numbered, prompt="{question}", image="image_1").source[0].images == (png(1),)
    named = str(
        files.save(tmp_path / "named", [{"question": "?", "answer": "a", "picture": picture(1)}], picture=files.IMAGE)
    )
    assert open_task(named, prompt="{question}", image="picture").source[0].images == (png(1),)
    both = str(files.save(tmp_path / "two", rows, left=files.IMAGE, right=files.IMAGE))
    with pytest.raises(ValueError, match="give --image-column left,right"):
        open_task(both, prompt="{question}")
    asked_about = open_task(both, prompt="{question}", image="left,right").source[0]
    assert asked_about.images == (png(1), png(2)) and asked_about.turns[0].text == "<image>\n<image>\n?"


def test_cells_of_a_table(tmp_path):
    cells = ['"[""red"", ""crimson""]"', "\"['red', 'pink']\",", "[unclear]"]
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"?,{cell}\n" for cell in cells) + "   \n")
    task = open_task(str(tmp_path / "a.csv"), prompt="{question}")
    assert answers(task) == [["red", "crimson"], ["red", "pink"], ["[unclear]"]]
    for row in ("Red, or blue?,red", "Red?"):
        (tmp_path / "b.csv").write_text(f"question,answer\nWhat?,red\n{row}\n")
        with pytest.raises(ValueError, match=r"b.csv, line 3: \d fields in 2 columns; put texts with the separator"):
            open_task(str(tmp_path / "b.csv"), prompt="{question}")


@pytest.mark.parametrize(
    ("write", "name", "spec", "options", "message"),
    [
        (files.chartqa, "pope", "", {}, "['image', 'query', 'label', 'human_or_machine']; expected also 'question', "
         "'category', 'answer'"),
        (files.chartqa, None, "", {"prompt": "{question}"}, "expected also 'question', 'answer'"),
        (files.chartqa, None, "", {"prompt": "{query}{options}", "answer": "label"}, "expected also 'options'"),
        (files.chartqa, None, "", {"prompt": "{query} {}"}, "braces without a column"),
        (files.chartqa, None, "", {"prompt": "{query"}, "write a brace that is no column's twice"),
        (files.chartqa, "chartqa", ":validation", {}, "has no split 'validation'; it has test. Name one: "),
        (files.gqa, "gqa", ":val_all:testdev", {}, "has no config 'val_all'; it has 'testdev_balanced_images', "),
        (files.docvqa, "docvqa", "", {"answers": Path("a.json")}, "goes with LLaVA's question files"),
        (files.chartqa, "chartqq", "", {}, "did you mean 'chartqa'?"),
        (files.chartqa, None, "", {"answers": Path("a.json")}, "goes with a --benchmark"),
        (lambda folder: files.mmbench(folder, answers=False), "ai2d", "", {}, "expected also 'options', 'answer'"),
    ],
)  # fmt: skip
def test_files_that_are_not_the_benchmarks(write, name, spec, options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_task(f"{write(tmp_path)}{spec}", name, **options)


def test_broken_files_are_named(tmp_path):
    bad = lines(tmp_path / "bad.jsonl", [{"a": 1}, {"a": 2}])
    bad.write_text(bad.read_text() + "{oh\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 3: not JSON"):
        open_task(str(bad), "pope")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="deep.json is not JSON"):
        open_task(str(tmp_path / "deep.json"), "pope")
    (tmp_path / "latin.csv").write_bytes("question,answer\nWie groß?,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.csv cannot be read as a table"):
        open_task(str(tmp_path / "latin.csv"), answer="answer")
    blind = lines(tmp_path / "blind.jsonl", [{"question": "?", "answer": "yes", "category": "a"}])
    with pytest.raises(ValueError, match=r"expected also 'image\|images'"):
        open_task(str(blind), "pope")
    half = lines(tmp_path / "half.jsonl", [{"question": "\ud83d?", "answer": "a"}])
    with pytest.raises(RecordError, match="row 0: the text has half a character"):
        open_task(str(half), answer="answer").source[0]
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="list.json holds list .*expected a list of objects"):
        open_task(str(tmp_path / "list.json"), "pope")
    (tmp_path / "m.tsv").write_text("index\timage\n1\t" + "?" * 300 + "\n")
    with pytest.raises(ValueError, match="`index` 1: `image` is not base64"):
        open_task(str(tmp_path / "m.tsv"), "mmbench")
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        open_task("no/such/folder", "pope")
    bad = files.save(tmp_path / "ai2d", [{"question": "?", "options": ["a", "b"], "answer": "4", "image": picture(2)}])
    with pytest.raises(RecordError, match=r"row 0: the answer is '4'; expected one of the options \['a', 'b'\]"):
        open_task(str(bad), "ai2d").source[0]
    empty = files.save(tmp_path / "empty", [{"question": "?", "image": None, "answer": None, "type": "a"}])
    with pytest.raises(ValueError, match="'answer|label' is empty, so there is nothing to score"):
        open_task(str(empty), "chartqa")


# ---- submissions ----


def submission(task: Task, folder: Path, *said: str) -> str:
    predictions = [
        Prediction(index, conversation.id, "", conversation.turns[0].text, text, [], 0.0)
        for index, (conversation, text) in enumerate(zip(task.source, said, strict=True))
    ]
    return export(task.export, task.own(predictions), task.facts, folder).read_text()


def test_submissions(tmp_path):
    vqa = open_task(str(files.textvqa(tmp_path / "vqa", answers=False)), "textvqa")
    assert vqa.metrics == ("none",)
    assert json.loads(submission(vqa, tmp_path, "Two dogs, a man")) == [{"question_id": 7, "answer": "2 dogs man"}]
    document = open_task(f"{files.docvqa(tmp_path / 'doc', 'test')}:test", "docvqa")
    assert document.metrics == ("none",)
    assert json.loads(submission(document, tmp_path, "A, b")) == [{"questionId": 337, "answer": "A, b"}]
    bench = open_task(str(llava_questions(tmp_path / "bench.jsonl", "Why?", category="conv")), "llava-bench")
    line = json.loads(submission(bench, tmp_path, "Because."))
    assert {"question_id": 0, "prompt": "<image>\nWhy?", "text": "Because.", "metadata": {}}.items() <= line.items()
    vet = open_task(str(tmp_path / "bench.jsonl"), "mmvet")
    assert asked(vet) == ["<image>\nWhy?"] and vet.max_new_tokens == 1024
    assert json.loads(submission(vet, tmp_path, "So.")) == {"v1_0": "So."}
    blind = open_task(str(tmp_path / "bench.jsonl"), "vizwiz")
    assert json.loads(submission(blind, tmp_path, "A cat")) == [{"image": "0.png", "answer": "cat"}]
    server = open_task(str(files.mmbench(tmp_path / "test", answers=False)), "mmbench")
    assert server.metrics == ("none",) and len(server.source) == 2
    pytest.importorskip("pandas")
    header, first, _ = submission(server, tmp_path, "B", "A").splitlines()
    assert first.split("\t")[0] == "5" and first.split("\t")[-1] == "B"
    assert header.split("\t")[-1] == "prediction" and "image" not in header
    rotated = open_task(str(files.mmbench(tmp_path / "dev")), "mmbench")
    assert len(submission(rotated, tmp_path, "B", "A", "C", "A", "B").splitlines()) == 3  # none of those made here


def test_captions_of_the_hubs_columns(tmp_path):
    row = {"image": png(1), "caption": ["a cat", "one cat"], "img_id": "0", "question": "ignored"}
    task = open_task(str(files.save(tmp_path, [row])), "flickr30k")
    assert asked(task) == ["<image>\nProvide a one-sentence caption for the provided image."]
    assert answers(task) == [["a cat", "one cat"]]


# ---- recipes/evaluate.py ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_the_command_line_scores_a_benchmark(checkpoint, tmp_path, capsys):
    options = ["--checkpoint", checkpoint, "--max-new-tokens", 2, "--batch-size", 3, "--schedule", "himap"]
    data = ["--benchmark", "pope", "--data", files.pope(tmp_path / "pope")]
    assert run_recipe("evaluate", *options, *data, "--output", tmp_path / "out", "--num-workers", 1) == 0
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"]
    assert row["metric"] == "pope" and row["types"].keys() == {"adversarial", "popular", "random"}
    assert "pope_f1_mean_of_splits" in row["figures"]
    # 16, 8 from layer 1 and 2 from layer 2 on, of 6 layers
    assert row["image_tokens_per_layer"]["mean"] == pytest.approx((16 + 8 + 4 * 2) / 6)
    assert "image tokens, average over layers: 5.3" in capsys.readouterr().out


def test_the_command_line_takes_a_prompt(checkpoint, tmp_path):
    chart = ["--data", files.chartqa(tmp_path / "chart"), "--prompt", "{query}\\nShort.", "--answer-column", "label"]
    chart += ["--type-column", "human_or_machine", "--output", tmp_path / "out", "--max-new-tokens", 2]
    assert run_recipe("evaluate", "--checkpoint", checkpoint, *chart) == 0
    (answer,) = map(json.loads, (tmp_path / "out" / "predictions.jsonl").read_text().splitlines())
    assert (answer["prompt"], answer["answers"], answer["type"]) == ("How many?\nShort.", ["14"], "machine")


def test_what_a_server_scores_is_written_down(checkpoint, tmp_path, capsys):
    options = ["--checkpoint", checkpoint, "--max-new-tokens", 2, "--benchmark", "textvqa", "--data"]
    options += [files.textvqa(tmp_path / "data", answers=False)]
    assert run_recipe("evaluate", *options) == 2
    assert "name a folder with --output" in capsys.readouterr().err
    assert run_recipe("evaluate", *options, "--output", tmp_path / "out") == 0
    assert [one["question_id"] for one in json.loads((tmp_path / "out" / "submission.json").read_text())] == [7]
    assert json.loads((tmp_path / "out" / "predictions.jsonl").read_text())["score"] is None
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"][0]["overall"]["score"] is None
    assert run_recipe("evaluate", *options, "--output", tmp_path / "out") == 2
    assert "already holds results" in capsys.readouterr().err


# ---- what would be scored wrongly without a word ----


def test_rows_with_nothing_to_see_or_to_ask_are_skipped_by_name(tmp_path):
    rows = [
        {"question": "Is it?", "answer": "yes", "image": picture(1), "question_id": 1, "category": "a"},
        {"question": "Is it?", "answer": "yes", "image": None, "question_id": 2, "category": "a"},
        {"question": None, "answer": "yes", "image": picture(1), "question_id": 3, "category": "a"},
    ]
    task = open_task(str(files.save(tmp_path / "pope", rows)), "pope")
    assert task.source[0].images
    with pytest.raises(RecordError, match=r"row 1: there is nothing in `image\|images`; expected an image"):
        task.source[1]
    mixed = lines(tmp_path / "own.jsonl", [{"q": "?", "a": "x", "photo": None}, {"q": "", "hint": "Look.", "a": "x"}])
    own = open_task(str(mixed), prompt="{hint}\n{q}", answer="a", image="photo")  # a user's own rows may be text alone
    assert asked(own) == ["?", "Look."]
    letters = open_task(str(llava_questions(tmp_path / "l.jsonl", "")), "llava-bench")
    with pytest.raises(RecordError, match="row 0: there is nothing in `text`; expected a question"):
        letters.source[0]
    with pytest.raises(RecordError, match="row 2: there is nothing in `question`; expected a question"):
        task.source[2]


def test_a_split_behind_a_file_that_has_none_is_refused(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"question": "?", "answer": "a"}])
    (tmp_path / "a.tsv").write_text("question\tanswer\n?\ta\n")
    table = files.save(tmp_path / "set", [{"question": "?", "answer": "a"}])
    for spec in (f"{path}:dev", f"{path}:config:dev", f"{tmp_path / 'a.tsv'}:dev"):
        with pytest.raises(ValueError, match="a file has no configs, and one of text no splits; give"):
            open_task(spec, prompt="{question}", answer="answer")
    parquet = next(table.rglob("*.parquet"), None)
    if parquet is not None:
        assert len(open_task(str(parquet), prompt="{question}", answer="answer").source) == 1
        for spec, why in ((f"{parquet}:nosuch", "one split itself"), (f"{parquet}:config:train", "no configs")):
            with pytest.raises(ValueError, match=why):
                open_task(spec, prompt="{question}", answer="answer")
        assert len(open_task(f"{parquet}:test", prompt="{question}", answer="answer").source) == 1  # by its name


@pytest.mark.parametrize(
    ("cell", "accepted"),
    [
        ("[0.1, 0.2, 0.3, 1]", ["[0.1, 0.2, 0.3, 1]"]),  # a box is one answer
        ([0.57], ["0.57"]),  # ChartQA's label
        ([2.0] * 10, ["2"] * 10),  # of ten annotators
        ('["a", "b"]', ["a", "b"]),
        (["1", "2"], ["1", "2"]),
        ([0.1, 0.2, 0.3, 0.4], ["[0.1, 0.2, 0.3, 0.4]"]),
        ([2, 2, 3, 2], ["2", "2", "3", "2"]),  # of four annotators
        ([1, 2], ["1", "2"]),
        ('[2, "two"]', ["2", "two"]),
        (2.0, ["2"]),  # a column with gaps
        (2.5, ["2.5"]),
    ],
)
def test_a_list_of_fractions_is_one_answer(cell, accepted, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"question": "?", "answer": cell}]))
    assert answers(open_task(str(tmp_path / "rows.json"), prompt="{question}", answer="answer")) == [accepted]


def test_a_limit_cuts_no_question_in_two(tmp_path):
    """Two questions of three and two options: the first alone is three rotations."""
    source = open_task(str(files.mmbench(tmp_path / "dev")), "mmbench").source
    assert [source_length(source, limit) for limit in (1, 2, 9, None)] == [3, 5, 5, 5]


def test_options_are_in_the_order_of_their_numbers_and_no_more_than_letters():
    numbered = {str(number): f"o{number}" for number in range(1, 12)}
    assert list(options_in(dict(sorted(numbered.items())), "x").values()) == [f"o{n}" for n in range(1, 12)]
    assert options_in(["A. a cat", "(B) a dog"], "x") == {"A": "a cat", "B": "a dog"}
    assert options_in(["A. a cat", "Be. it"], "x") == {"A": "A. a cat", "B": "Be. it"}
    with pytest.raises(RecordError, match="30 options; there are letters for 26"):
        options_in([str(number) for number in range(30)], "x")


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_recipe("evaluate", "--checkpoint", "embedded") == 2
    assert "runs in one process, and 2 were started; for several GPUs: accelerate" in capsys.readouterr().err
