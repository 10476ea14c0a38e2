"""`recipes/demo.py`: what it answers, what it refuses, and its page in a browser."""

from __future__ import annotations

import socket
import sys
from importlib.util import find_spec

import pytest
from browser import browser, needs_browser  # noqa: F401 - a fixture
from evaluation_toys import image
from recipes_cli import recipe_module, run_recipe
from tiny import tiny_llava, tiny_processor
from training_toys import save_tiny

from himap_train import PruningSchedule, PruningStage, install_pruning
from himap_train.analysis.answered import prompt_encoder
from himap_train.analysis.pictures import MARGIN, PANEL

SCHEDULE = PruningSchedule((PruningStage(2, "instruction", 0.5), PruningStage(4, "image", 0.125)))


@pytest.fixture(scope="module")
def asked():
    model = install_pruning(tiny_llava(), SCHEDULE)
    return recipe_module("demo").Asked(model, prompt_encoder(model, tiny_processor()), 4)


@pytest.fixture
def photo(tmp_path):
    image(0).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_both_answers_come_with_tokens_cost_and_pictures(asked, photo):
    dense, dense_cost, pruned, pruned_cost, picture = asked(photo, "What is it?", "as-saved", 0)
    assert dense and pruned and dense != pruned
    assert dense_cost.startswith("16 image tokens") and "flops_ratio 1.000" in dense_cost
    assert pruned_cost.startswith("16 → 8 → 2 image tokens") and picture.width > picture.height
    at_budget = asked(photo, "What is it?", "as-saved", 0.9)[3]
    assert "flops_ratio 0.9" in at_budget and at_budget != pruned_cost
    assert asked(photo, "What is it?", "himap", 0)[3].startswith("16 → 8 → 2")
    assert asked.choices[:2] == ["as-saved", "himap"] and "none" not in asked.choices


def test_what_cannot_be_answered_is_refused_with_a_reason(asked, photo, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    for given, message in (
        ((None, "What?", "himap", 0), "Give an image"),
        ((photo, " ", "himap", 0), "Give an image and a question"),
        ((str(tmp_path / "notes.png"), "What?", "himap", 0), "is not an image file"),
        ((photo, "What?", "himap", 0.01), "budget"),
        ((photo, "What? " * 500, "himap", 0), "the prompt takes"),
    ):
        with pytest.raises(ValueError, match=message):
            asked(*given)


def test_without_gradio_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run_recipe("demo") == 2
    assert 'pip install "himap-train[demo]"' in capsys.readouterr().err


def test_a_port_in_use_is_told_before_weights_are_read(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", object())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_recipe("demo", "--port", port, "--checkpoint", "nowhere") == 2
    assert f"port {port} of 127.0.0.1 cannot be had" in capsys.readouterr().err
    assert run_recipe("demo", "--port", 70000) == 2 and "port 70000" in capsys.readouterr().err


@needs_browser
@pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio: the extra `demo`")
def test_the_page_answers_where_one_clicks(browser, photo, tmp_path, monkeypatch):  # noqa: F811
    import gradio

    served = []
    launch = gradio.Blocks.launch
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **how: served.append((self, launch(
        self, prevent_thread_lock=True, quiet=True, **how))))  # fmt: skip
    (tmp_path / "tiny").mkdir()
    assert run_recipe("demo", "--checkpoint", save_tiny(tmp_path / "tiny"), "--max_new_tokens", 4) == 0
    [(blocks, (_, address, _))] = served
    try:
        page, asked = browser.new_page(), set()
        page.on("request", lambda request: asked.add(request.url.split("/")[2] if "//" in request.url else "data"))
        page.goto(address)
        page.get_by_role("button", name="Answer").click()
        page.wait_for_function("[...document.querySelectorAll('textarea')].some(area => area.value.includes('→'))")
        values = page.locator("textarea").evaluate_all("areas => areas.map(area => area.value)")
        assert any(value.startswith("16 → 8 → 2 image tokens") for value in values)
        assert any(value.startswith("16 image tokens") for value in values)
        shown = page.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)")
        assert 3 * (PANEL + MARGIN) + MARGIN in shown  # the image and two stages
        page.get_by_label("question").fill("  ")
        page.get_by_role("button", name="Answer").click()
        page.get_by_text("Give an image and a question.").wait_for()
        (tmp_path / "notes.png").write_text("no picture")
        page.get_by_label("question").fill("What is it?")
        page.get_by_label("Clear").first.click()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "notes.png")
        page.wait_for_timeout(1000)
        page.get_by_role("button", name="Answer").click()
        page.get_by_text("is not an image file").wait_for()
        assert asked <= {address.split("/")[2], "data"}
    finally:
        blocks.close()
