"""Pictures of the kept patches, checked pixel by pixel, and `recipes/generate.py` that draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_cli import run_recipe
from tiny import IMAGE_SIZE, IMAGE_TOKENS, tiny_processor
from training_toys import save_tiny

from himap_train import PruningSchedule, PruningStage
from himap_train.analysis.pictures import (
    CAPTION,
    MARGIN,
    PANEL,
    captions,
    draw_kept,
    kept_tokens,
)
from himap_train.models.families.blocks import TokenBlock
from himap_train.models.families.pixels import model_view, patch_grid

IMAGE_ID = 4


def panels(picture: Image.Image, count: int) -> list[np.ndarray]:
    """The square panels of a picture without margins and captions."""
    pixels = np.asarray(picture)
    assert pixels.shape == (PANEL + 2 * MARGIN + CAPTION, count * (PANEL + MARGIN) + MARGIN, 3)
    starts = [MARGIN + i * (PANEL + MARGIN) for i in range(count)]
    return [pixels[MARGIN : MARGIN + PANEL, start : start + PANEL].astype(int) for start in starts]


def test_kept_patches_stay_clear_and_dropped_ones_go_grey():
    image = Image.new("RGB", (28, 28), (200, 40, 40))
    picture = draw_kept(image, [[0, 6], [6]], [TokenBlock(2, 4)], ["stage 1", "stage 2"])
    whole, first, second = panels(picture, 3)
    assert (whole == (200, 40, 40)).all()
    height, width = PANEL // 2, PANEL // 4
    for panel, kept in ((first, {0, 6}), (second, {6})):
        for patch in range(8):
            top, left = patch // 4 * height, patch % 4 * width
            block = panel[top : top + height, left : left + width]
            if patch in kept:
                assert (block == (200, 40, 40)).all()
            else:
                assert (block == block[0, 0, 0]).all()  # grey
                assert block.max() < 60  # and dark


def test_tokens_may_be_of_any_brightness():
    image = Image.new("RGB", (28, 28), (200, 40, 40))
    _, half = panels(draw_kept(image, [{0: 1.0, 1: 0.5}], [TokenBlock(2, 2)], ["saliency"]), 2)
    middle = PANEL // 4
    clear, between, dark = half[middle, middle], half[middle, 3 * middle], half[3 * middle, middle]
    assert clear.tolist() == [200, 40, 40] and dark.max() < 60
    assert np.abs(between - (clear + dark) / 2).max() <= 1


def test_blocks_of_a_view_lie_beside_each_other_and_views_below_each_other():
    """Two tiles with a newline a row, and an overview behind a class token: each token clears its own part."""
    image = Image.new("RGB", (40, 20), (200, 40, 40))
    tiles = [TokenBlock(2, 2, box=(x, 0.0, x + 0.5, 1.0), row_end=1, view="tiles") for x in (0.0, 0.5)]
    blocks = [TokenBlock(1, 2, before=1, view="overview"), *tiles]
    assert [block.tokens for block in blocks] == [3, 6, 6]
    # The class token; the right half; upper left of the first tile; a newline; lower right of the second tile.
    pixels = np.asarray(draw_kept(image, [[0, 2, 3, 5, 13]], blocks, ["stage 1"])).astype(int)
    height, width = PANEL // 2 + MARGIN + CAPTION, PANEL + MARGIN
    assert pixels.shape == (MARGIN + 2 * height, MARGIN + 2 * width, 3)
    rows = [pixels[MARGIN + row * height :][: PANEL // 2, MARGIN + width :][:, :PANEL] for row in (0, 1)]
    clear = [(row == (200, 40, 40)).all(-1) for row in rows]
    expected = np.zeros((2, PANEL // 2, PANEL), dtype=bool)
    expected[0, :, PANEL // 2 :] = True
    expected[1, : PANEL // 4, : PANEL // 4] = expected[1, PANEL // 4 :, 3 * PANEL // 4 :] = True
    assert (clear == expected).all()


def test_a_grid_over_padding_is_cut_at_the_picture():
    """A picture twice as wide as high in the middle of a square: of four rows the outer ones show only padding."""
    square = TokenBlock(4, 4, box=(0.0, -0.5, 1.0, 1.5))
    picture = draw_kept(Image.new("RGB", (64, 32), (200, 40, 40)), [[0, 1, 2, 3, 4, 11]], [square], ["one"])
    panel = np.asarray(picture)[MARGIN : MARGIN + PANEL // 2, PANEL + 2 * MARGIN :][:, :PANEL]
    clear = (panel == (200, 40, 40)).all(-1)
    expected = np.zeros((PANEL // 2, PANEL), dtype=bool)
    expected[: PANEL // 4, : PANEL // 4] = expected[PANEL // 4 :, 3 * PANEL // 4 :] = True
    assert (clear == expected).all()


def test_a_caption_is_written_below_each_panel():
    picture = draw_kept(Image.new("RGB", (8, 8)), [[0]], [TokenBlock(1, 1)], ["stage 1: layer 2, 1 of 1"])
    below = np.asarray(picture)[PANEL + MARGIN + 1 :]
    for left in (MARGIN, 2 * MARGIN + PANEL):
        assert (below[:, left : left + 60] < 128).any()


def test_wrong_arguments_are_refused():
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="token 4 lies outside the 4 tokens"):
        draw_kept(image, [[4]], [TokenBlock(2, 2)], ["one"])
    with pytest.raises(ValueError, match="2 stages but 1 captions"):
        draw_kept(image, [[0], [0]], [TokenBlock(2, 2)], ["one"])


def test_patch_grid():
    assert patch_grid(576, (336, 336)) == (24, 24)
    assert patch_grid(8, (64, 32)) == (2, 4)
    with pytest.raises(ValueError, match="577 image tokens do not form a grid"):
        patch_grid(577, (336, 336))


def test_columns_become_tokens_of_each_image():
    # text, four patches, text, four patches, text; columns 1-4 and 6-9 are image tokens
    input_ids = torch.tensor([7, 4, 4, 4, 4, 7, 4, 4, 4, 4, 7])
    kept = [torch.tensor([0, 1, 3, 5, 6, 9, 10]), torch.tensor([0, 3, 5, 10])]
    assert kept_tokens(kept, input_ids, IMAGE_ID, [4, 4]) == [[[0, 2], [2]], [[0, 3], []]]
    with pytest.raises(ValueError, match="8 image tokens, expected .4."):
        kept_tokens(kept, input_ids, IMAGE_ID, [4])


def test_captions_name_layer_and_counts():
    schedule = PruningSchedule((PruningStage(2, "instruction", 0.5), PruningStage(8, "image", 0.125)))
    found = captions(schedule, [range(288), range(72)], 576)
    assert found == ["stage 1: layer 2, 288 of 576", "stage 2: layer 8, 72 of 576"]


def test_the_models_view_is_the_image_after_resizing_and_cropping():
    # Twice as wide as high: resized to 64x32, the middle 32x32 is cut out: half of each colour.
    image = Image.new("RGB", (128, 64), (250, 10, 10))
    image.paste((10, 10, 250), (64, 0, 128, 64))
    processor = tiny_processor().image_processor
    pixel_values = processor(image, return_tensors="pt")["pixel_values"][0]
    view = np.asarray(model_view(pixel_values, processor)).astype(int)
    assert view.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.abs(view[:, :12] - (250, 10, 10)).max() <= 2
    assert np.abs(view[:, 20:] - (10, 10, 250)).max() <= 2


# ---- recipes/generate.py ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 60, (32, 32, 3))
    Image.fromarray((noise + (0, 180, 0)).astype(np.uint8)).save(path)  # green all over
    return path


def test_generate_streams_an_answer_and_draws_what_was_kept(checkpoint, photo, tmp_path, capsys):
    options = ["--checkpoint", checkpoint, "--image", photo, "--question", "What is it?", "--max-new-tokens", 5]
    assert run_recipe("generate", *options, "--schedule", "himap", "--show-kept", tmp_path / "new/kept.png") == 0
    said = capsys.readouterr().out
    assert said.startswith("USER: What is it?\nASSISTANT: ")
    assert len(said) > len("USER: What is it?\nASSISTANT: \n")
    whole, first, second = panels(Image.open(tmp_path / "new/kept.png"), 3)
    side = PANEL // 4  # 4x4 patches, green where they are clear
    counts = [sum(bool(p[y, x, 1] > 120) for y in range(side // 2, PANEL, side) for x in range(side // 2, PANEL, side))
              for p in (whole, first, second)]  # fmt: skip
    assert counts == [IMAGE_TOKENS, IMAGE_TOKENS // 2, IMAGE_TOKENS // 8]
    assert run_recipe("generate", *options, "--schedule", "none") == 0
    assert capsys.readouterr().out != said


def test_generate_without_an_image_takes_an_embedded_scene(checkpoint, capsys):
    assert run_recipe("generate", "--checkpoint", checkpoint, "--max_new_tokens=2", "--question", "And now?") == 0
    assert "USER: And now?" in capsys.readouterr().out


def test_an_answer_ends_with_the_context(checkpoint, capsys):
    assert run_recipe("generate", "--checkpoint", checkpoint, "--max-new-tokens", "100000") == 0
    assert len(capsys.readouterr().out) > 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "missing.png", "--question", "?"], "image file missing.png does not exist"),
        (["--image", "{photo}"], "Pass --question"),
        (["--image", "{text}", "--question", "?"], "is not an image file"),
        (["--checkpoint", "nowhere/at/all"], "nowhere/at/all"),
        (["--schedule", "himpa"], "did you mean 'himap'"),
        (["--schedule", "own.yaml"], "own.yaml"),
        (["--show-kept", "kept.png"], "the schedule is dense"),
        (["--show-kept", "kept", "--schedule", "himap"], "--show-kept kept is no name of a picture"),
        (["--show-kept", "kept.fits", "--schedule", "himap"], "--show-kept kept.fits is no name of a picture"),
        (["--question", "What? " * 100], "the prompt takes"),
        (["--schedule", '{"stages": [{"layer": 9, "criterion": "uniform", "keep_ratio": 0.5}]}'], "layers 0 to 5"),
    ],
)
def test_generate_explains_mistakes_without_a_traceback(options, message, checkpoint, photo, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no picture")
    filled = [option.format(photo=photo, text=tmp_path / "notes.txt") if option[:2] in ("{p", "{t") else option
              for option in options]  # fmt: skip
    given = filled if "--checkpoint" in filled else ["--checkpoint", checkpoint, *filled]
    assert run_recipe("generate", *given) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") or "\nerror: " in shown.err
    assert message in shown.err
    assert "Traceback" not in shown.err
