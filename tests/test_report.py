"""`report.html` of a run: what is taken, what stands in it, and that it is one file that asks for nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from browser import browser, needs_browser  # noqa: F401 - a fixture
from evaluation_toys import QUIET, Source, conversation
from PIL import Image
from tiny import tiny_llava, tiny_processor

from himap_train import PruningSchedule, PruningStage
from himap_train.analysis.report import draw_curves, main, read_curves, write_report
from himap_train.analysis.samples import save_samples, take_samples
from himap_train.checkpoints.card import model_card
from himap_train.checkpoints.run_facts import RunFacts
from himap_train.command_line import run_command
from himap_train.data.records import RecordError, Turn
from himap_train.evaluation.compare import compare
from himap_train.evaluation.tables import save_table
from himap_train.models.install import pruning_of

SCHEDULE = PruningSchedule((PruningStage(2, "instruction", 0.5), PruningStage(4, "image", 0.125)))
QUESTION = "<script>document.title = 'ours'</script> & what? ![x](http://localhost/x.png)"


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def source(model):
    """Twelve questions: the pruned answers are the references of every third, the dense ones of the others; two images
    in the last, none in the first.
    """
    records = [conversation(i, f"{i}? {QUESTION}", type="ab"[i % 2], images=(i > 0) + (i == 11)) for i in range(12)]
    dense, pruned = (
        row.result.predictions
        for row in compare(model, tiny_processor(), Source(records), {"dense": None, "pruned": SCHEDULE}, **QUIET)
    )
    answers = [(pruned if i % 3 == 0 else dense)[i].prediction + "!" * (i % 3 == 1) for i in range(12)]
    return Source(
        replace(record, turns=(record.turns[0], Turn("assistant", answer)))
        for record, answer in zip(records, answers, strict=True)
    )


@pytest.fixture(scope="module")
def rows(model, source):
    return compare(model, tiny_processor(), source, {"dense": None, "adapted pruned": SCHEDULE}, **QUIET)


@pytest.fixture(scope="module")
def run(model, source, rows, tmp_path_factory):
    """The folder of a finished run, as far as a report reads it."""
    folder = tmp_path_factory.mktemp("run")
    save_table(rows, folder)
    save_samples(take_samples(model, tiny_processor(), source, SCHEDULE, rows, 4), folder)
    (folder / "config.yaml").write_text("model:\n  path: <tiny>\n")
    (folder / "adapter").mkdir()
    card = model_card("tiny", SCHEDULE, model.config, RunFacts({"model": {"lora_r": 4}}))
    (folder / "adapter/README.md").write_text(card)
    for piece, lines in enumerate((("step,train/loss,val/loss", "0,3.0,", "1,2.0,2.5"), ("step,train/loss", "1,1.5"))):
        (folder / f"logs/version_{piece}").mkdir(parents=True)
        (folder / f"logs/version_{piece}/metrics.csv").write_text("\n".join(lines) + "\n")
    write_report(folder)
    return folder


def test_samples_are_right_and_wrong_ones_with_every_rows_answer(model, source, rows):
    taken = take_samples(model, tiny_processor(), source, SCHEDULE, rows, 4)
    assert pruning_of(model) is None  # as before
    scores = {prediction.id: prediction.score for prediction in rows[1].result.predictions}
    assert {sample["right"] for sample in taken} == {True, False}
    for sample in taken:
        assert [answer["name"] for answer in sample["answers"]] == ["dense", "adapted pruned"]
        assert sample["right"] == sample["answers"][1]["right"] == (scores[sample["id"]] == 1)
        assert len(sample["pictures"]) == len(source[int(sample["id"])].images)
    wrong = [sample for sample in taken if not sample["right"]]
    assert len(wrong) == 4 and all(sample["pictures"] for sample in wrong)
    assert {int(sample["id"]) % 2 for sample in wrong} == {0, 1}  # both types


def test_without_a_row_the_first_records_are_answered(model, source, monkeypatch):
    class Broken(Source):
        def __iter__(self):
            raise AssertionError("a map-style source is read by number")

        def __getitem__(self, index):
            if index == 1:
                raise RecordError("broken")
            return source[index]

    taken = take_samples(model, tiny_processor(), Broken(source), SCHEDULE, [], 4)
    assert [sample["id"] for sample in taken] == ["2", "3", "4", "5", "6", "7", "8", "9"]  # those with images first
    assert {sample["right"] for sample in taken} == {None}
    pruned = compare(model, tiny_processor(), source, {"": SCHEDULE}, batch_size=1, **QUIET)[0].result.predictions
    assert taken[0]["answers"] == [{"name": "this run", "text": pruned[2].prediction, "right": None}]


def test_pictures_stay_small_together(tmp_path):
    noise = Image.effect_noise((1056, 380), 100).convert("RGB")
    sample = {"id": "1", "question": "?", "expected": [], "right": None, "answers": [], "pictures": [noise]}
    save_samples([sample] * 8, tmp_path)
    sizes = [file.stat().st_size for file in (tmp_path / "samples").glob("*.png")]
    assert len(sizes) == 8 and sum(sizes) < 1_500_000


def test_a_report_is_one_small_file_that_asks_for_nothing_and_can_be_made_again(run, capsys):
    text = (run / "report.html").read_text()
    assert len(text) < 3_000_000
    assert not re.search(r"<(script|link|iframe|object|base|a)\b", text)
    assert set(re.findall(r'(?:src|href)="(.{10})', text)) == {"data:image"}
    assert text.count("data:image/png") == 2 + len(list((run / "samples").glob("*.png")))
    assert f"load_checkpoint(&quot;{run / 'adapter'}&quot;)" in text
    assert "keep_ratio: 0.125" in text and "decoder FLOPs of the prefill" in text and "path: &lt;tiny&gt;" in text
    assert "library_name" not in text  # that is for the hub
    (run / "report.html").unlink()
    assert run_command(main, ["--run", str(run)]) == 0
    assert (run / "report.html").read_text() == text


def test_what_a_run_does_not_have_is_left_out(run, tmp_path, capsys):
    assert run_command(main, ["--run", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/README.md").write_bytes((run / "adapter/README.md").read_bytes())
    (tmp_path / "config.yaml").write_text("{}\n")
    text = write_report(tmp_path).read_text()
    assert "Scores" not in text and "Samples" not in text and "Curves" not in text and "Loading" in text
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/samples.json").write_text(json.dumps([{"id": 3}]))
    with pytest.raises(ValueError, match="samples.json: `\\[0\\].id` is int 3"):
        write_report(tmp_path)


def test_curves_of_a_run_in_pieces_go_on_with_the_later_piece(run, tmp_path):
    curves = read_curves(run)
    assert curves["train/loss"] == {0: 3.0, 1: 1.5} and curves["val/loss"] == {1: 2.5}
    assert [axes.get_title() for axes in draw_curves(curves).axes] == ["loss"]
    assert draw_curves(read_curves(tmp_path)) is None
    (run / "logs/version_0/metrics.csv").write_text("step,train/loss\n1,none\n")
    with pytest.raises(ValueError, match="metrics.csv is no log of a run"):
        read_curves(run)


@needs_browser
def test_the_report_opens_in_a_browser_and_filters_its_samples(run, browser):  # noqa: F811
    page, asked, said = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url[:5]))
    page.on("console", lambda message: said.append(message.text))
    page.goto((run / "report.html").as_uri())
    assert page.title().startswith("Adapter for tiny")  # the question's script did not run
    right, wrong = page.locator(".right-sample"), page.locator(".wrong-sample")
    assert right.count() and wrong.count()
    for label, shown in (("answered wrong", (0, wrong.count())), ("answered right under", (right.count(), 0))):
        page.get_by_text(label).click()
        assert tuple(sum(one.is_visible() for one in kind.all()) for kind in (right, wrong)) == shown
    page.get_by_text("The whole config").click()
    assert page.get_by_text("path: <tiny>").is_visible()
    assert all(page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 100)"))
    assert set(asked) <= {"file:", "data:"} and said == []
