"""Families that cut pictures into tiles: encoding, held to the stock processors' own code and to the models."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_examples import talk
from PIL import Image
from tiny_tiles import EVERY, IMAGE_ID, PATCH, PLAIN, SIDE, TILED, Tiny, byte_tokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from himap_train.data.batches import collate
from himap_train.data.check import check_source
from himap_train.data.encode import Encoder, SampleTooLongError
from himap_train.data.lengths import estimate_lengths
from himap_train.data.records import Conversation
from himap_train.models.families.smolvlm import SmolVLM
from himap_train.models.features import hidden_states
from himap_train.models.loading import load_llava
from himap_train.pruning.layout import build_layout

pytestmark = pytest.mark.core

SIZES = ((16, 16), (7, 5), (40, 25), (25, 40), (64, 64), (200, 31), (31, 200), (65, 63), (9, 90), (1, 500), (500, 1))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Model and processor of every family, from their folders."""
    return {name: load_llava(tiny.folder(tmp_path_factory.mktemp(name), 2)) for name, tiny in EVERY.items()}


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture whose every pixel is another."""
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy(), "RGB")


def asked(*sizes: tuple[int, int], seed: int = 0) -> Conversation:
    """A question with images of these sizes, its answer, and another question without an image."""
    images = tuple(noise(size, seed + number) for number, size in enumerate(sizes))
    return talk("<image>\n" * len(sizes) + "What?", "Red.", "Sure?", "Yes.", images=images)


def stock_onevision(processor: Any, config: Any) -> Any:
    """The stock processor without its constructor, which wants torchvision for the videos."""
    stock: Any = object.__new__(LlavaOnevisionProcessor)
    stock.image_processor, stock.tokenizer = processor.image_processor, processor.tokenizer
    stock.num_image_tokens, stock.vision_aspect_ratio = SIDE**2, config.vision_aspect_ratio
    stock.vision_feature_select_strategy, stock.image_token = config.vision_feature_select_strategy, "<image>"
    return stock


def stock_internvl(processor: Any, config: Any) -> Any:
    stock: Any = object.__new__(InternVLProcessor)
    stock.image_seq_length = config.image_seq_length
    stock.start_image_token, stock.end_image_token, stock.image_token = "<img>", "</img>", "<IMG_CONTEXT>"
    return stock


def stock_smolvlm(name: str) -> Any:
    stock: Any = object.__new__(SmolVLMProcessor if name == "smolvlm" else Idefics3Processor)
    stock.image_seq_len, stock.image_token, stock.image_token_id = 4, "<image>", IMAGE_ID
    stock.fake_image_token, stock.global_image_token = "<fake_token_around_image>", "<global-img>"
    stock.global_image_tag = "<global-img>"
    return stock


def stock_text(name: str, model: Any, processor: Any, images: list[Image.Image]) -> list[str]:
    """What the stock processor's own code puts in the place of each image of one conversation."""
    parts = processor.image_processor
    if name == "internvl":
        stock, made = stock_internvl(processor, model.config), parts(images, crop_to_patches=True, return_tensors="pt")
    elif TILED[name].family == "smolvlm":
        stock, made = stock_smolvlm(name), parts([images], return_tensors="pt", return_row_col_info=True)
    elif name == "llava_onevision":
        stock, made = stock_onevision(processor, model.config), parts([images], return_tensors="pt")
    else:
        stock, made = processor, parts(images, return_tensors="pt")
    return [stock.replace_image_token(made, number) for number in range(len(images))]


@pytest.mark.parametrize("name", TILED)
def test_ids_are_what_the_stock_processor_makes_of_the_template(name: str, loaded: Any) -> None:
    model, processor = loaded[name]
    for sizes in [(size,) for size in SIZES] + [((40, 25), (25, 40)), ((7, 5), (64, 64), (16, 16))]:
        images = [noise(size) for size in sizes]
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}] * len(sizes) + [{"type": "text", "text": "What?"}]}],
            add_generation_prompt=True,
        )
        for replacement in stock_text(name, model, processor, images):
            text = _put(text, processor.image_token, replacement)
        expected = processor.tokenizer(text.replace("\1", processor.image_token))["input_ids"]
        conversation = talk("<image>\n" * len(sizes) + "What?", images=tuple(images))
        assert Encoder(processor).encode_prompt(conversation)["input_ids"].tolist() == expected


def _put(text: str, token: str, replacement: str) -> str:
    """The first image token replaced; those that come in are written as \\1 until all are in."""
    return text.replace(token, replacement.replace(token, "\1"), 1)


def test_the_stock_processor_of_llava_next_encodes_the_same(loaded: Any) -> None:
    _, processor = loaded["llava_next"]
    for size in SIZES:
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        )
        stock = processor(images=[noise(size)], text=[text], return_tensors="pt")
        ours = Encoder(processor).encode_prompt(talk("<image>\nWhat?", images=(noise(size),)))
        assert torch.equal(ours["input_ids"], stock["input_ids"][0])
        for key, value in ours["images"][0].items():
            assert torch.equal(value, stock[key])


@pytest.mark.parametrize("name", EVERY)
def test_tokens_of_a_size_are_those_of_the_encoded_image_and_of_the_model(name: str, loaded: Any) -> None:
    model, processor = loaded[name]
    encoder, counts = Encoder(processor), set()
    for size in SIZES:
        sample = encoder.encode(asked(size))
        found = int((sample["input_ids"] == IMAGE_ID).sum())
        assert encoder.image_tokens(size) == [found]
        with torch.no_grad():
            features = encoder.family.encode_images(model, sample["images"][0]).pooler_output
        assert sum(part.numel() for part in features) == found * model.config.text_config.hidden_size
        counts.add(found)
    assert len(counts) == 1 if name in PLAIN else len(counts) > 2


@pytest.mark.parametrize("name", EVERY)
def test_a_prompt_is_what_stands_before_the_last_answer(name: str, loaded: Any) -> None:
    _, processor = loaded[name]
    encoder, conversation = Encoder(processor), asked((40, 25), (16, 16))
    whole, prompt = encoder.encode(conversation), encoder.encode_prompt(conversation)
    end = len(prompt["input_ids"])
    assert torch.equal(whole["input_ids"][:end], prompt["input_ids"])
    supervised = processor.tokenizer.decode(whole["input_ids"][end:])
    assert supervised.strip().startswith("Yes.") and bool((whole["labels"][end:] != -100).all())
    text = Encoder(processor).encode(talk("What?", "Red."))
    assert text["images"] == [] and not (text["input_ids"] == IMAGE_ID).any()


@pytest.mark.parametrize("name", EVERY)
def test_a_ragged_batch_equals_its_rows(name: str, loaded: Any) -> None:
    model, processor = loaded[name]
    encoder = Encoder(processor)
    rows = [asked((40, 25)), talk("What?", "Red."), asked((16, 16), (7, 50), seed=3), asked((30, 31), seed=7)]
    samples = [encoder.encode(row) for row in rows]
    for side in ("left", "right"):
        batch = collate(samples, 0, side)  # type: ignore[arg-type]
        with torch.no_grad():
            states = hidden_states(model, **{key: batch[key] for key in ("input_ids", "attention_mask", "images")})
            stock = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}, **batch["images"])
            torch.testing.assert_close(model.lm_head(states), stock.logits, atol=1e-4, rtol=1e-4)
            for row, sample in enumerate(samples):
                alone = collate([sample], 0)
                expected = hidden_states(model, input_ids=alone["input_ids"], images=alone["images"])[0]
                columns = batch["attention_mask"][row].bool()
                torch.testing.assert_close(states[row, columns], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "llava_onevision"])
def test_what_does_not_fit_goes_in_whole_exchanges(name: str, loaded: Any) -> None:
    _, processor = loaded[name]
    images = (noise((40, 25)), noise((16, 16), 1))
    conversation = talk("<image>\nWhat?", "Red.", "<image>\nAnd here?", "Blue.", images=images)
    whole = Encoder(processor).encode(conversation)
    first = Encoder(processor).encode(talk("<image>\nWhat?", "Red.", images=images[:1]))
    cut = Encoder(processor, len(whole["input_ids"]) - 1).encode(conversation)
    assert cut["dropped_exchanges"] == 1 and len(cut["images"]) == 1
    assert torch.equal(cut["input_ids"], first["input_ids"]) and torch.equal(cut["labels"], first["labels"])
    for key, value in cut["images"][0].items():
        assert torch.equal(value, first["images"][0][key])
    with pytest.raises(SampleTooLongError, match="the first question and answer take"):
        Encoder(processor, 12).encode(conversation)


def test_onevision_counts_the_images_of_what_is_left(loaded: Any) -> None:
    """Two images are seen once each; what is cut to one image has it as tiles, as a conversation of one image has."""
    model, processor = loaded["llava_onevision"]
    images = tuple(noise((20, 18), seed) for seed in range(3))
    talks = "<image>\nWhat?", "Red.", "<image>\nAnd?", "Blue.", "<image>\n" + "Long? " * 40, "Green."
    conversation = talk(*talks, images=images)
    encoder = Encoder(processor)
    assert [int(image["batch_num_images"]) for image in encoder.encode(conversation)["images"]] == [3, 0, 0]
    assert encoder.image_tokens((20, 18), (20, 18), (20, 18)) == [SIDE**2 + 1] * 3
    two = encoder.encode(talk(*talks[:4], images=images[:2]))
    one = encoder.encode(talk(*talks[:2], images=images[:1]))
    cut = Encoder(processor, len(two["input_ids"])).encode(conversation)
    assert [int(image["batch_num_images"]) for image in cut["images"]] == [2, 0]
    assert torch.equal(cut["input_ids"], two["input_ids"]) and cut["dropped_exchanges"] == 1
    assert (one["input_ids"] == IMAGE_ID).sum() == encoder.image_tokens((20, 18))[0] > 2 * (SIDE**2 + 1)
    batch = collate([cut, one, encoder.encode(talk("Hm?", "No."))], 0)
    assert batch["images"]["batch_num_images"].tolist() == [2, 0, 1]
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **batch["images"])


@pytest.mark.parametrize("name", TILED)
def test_padding_is_refused_by_the_familys_name(name: str, loaded: Any) -> None:
    with pytest.raises(ValueError, match=f"'pad' does not go with family {TILED[name].family}"):
        Encoder(loaded[name][1], image_aspect_ratio="pad")


@pytest.mark.parametrize("name", TILED)
def test_check_and_lengths_know_the_tokens_without_decoding(name: str, loaded: Any, tmp_path: Path) -> None:
    _, processor = loaded[name]
    paths = []
    for number, size in enumerate(((40, 25), (16, 16))):
        paths.append(tmp_path / f"{number}.png")
        noise(size).save(paths[-1])
    source = [talk("<image>\nWhat?", "Red.", images=(path,)) for path in paths]
    both = talk("<image>\n<image>\nWhat?", "Red.", images=tuple(paths))
    encoder = Encoder(processor)
    report = check_source([*source, both], processor)  # type: ignore[arg-type]
    expected = [len(encoder.encode(sample)["input_ids"]) for sample in (*source, both)]
    assert [length for _, length in report.lengths] == expected
    _, image_tokens = estimate_lengths(source, encoder)  # type: ignore[arg-type]
    assert image_tokens.tolist() == [max(encoder.image_tokens((40, 25)) + encoder.image_tokens((16, 16)))] * 2


@pytest.mark.parametrize("name", TILED)
def test_a_saved_processor_encodes_the_same(name: str, loaded: Any, tmp_path: Path) -> None:
    model, processor = loaded[name]
    encoder = Encoder(processor)
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = Encoder(encoder.family.load_processor(str(tmp_path), model.config))
    first, second = encoder.encode(asked((40, 25))), again.encode(asked((40, 25)))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert all(torch.equal(value, second["images"][0][key]) for key, value in first["images"][0].items())


@pytest.mark.parametrize("name", ["siglip-full", "siglip-default"])
def test_a_tower_without_a_class_token_keeps_its_zero(name: str, loaded: Any) -> None:
    model, processor = loaded[name]
    tiny: Tiny = PLAIN[name]
    assert processor.num_additional_image_tokens == 0
    found = Encoder(processor).image_tokens((40, 25))
    assert found == [Encoder(processor).family.tokens_of_config(model.config)]
    assert found == [SIDE**2 - ("default" in name)] and tiny.family == "llava"


@pytest.mark.parametrize("kind", [SmolVLMImageProcessorPil, Idefics3ImageProcessorPil])
@pytest.mark.parametrize(("longest", "tile"), [(48, 16), (56, 14), (40, 16), (16, 16), (4200, 2100)])
def test_smolvlm_cuts_a_picture_as_its_image_processor_does(kind: Any, longest: int, tile: int) -> None:
    """Of all shapes, of sizes just at and beside whole tiles, and of edges longer than it takes at all."""
    processor = SimpleNamespace(
        image_processor=kind(size={"longest_edge": longest}, max_image_size={"longest_edge": tile})
    )
    draw = random.Random(longest)
    shapes = [(draw.randint(1, 150), draw.randint(1, 150)) for _ in range(60)]
    shapes += [(a, b) for a in (1, 16, 17, 47, 48, 49) for b in (1, 15, 16, 17, 32, 33, 48)]
    for size in shapes if longest < 4096 else [(100, 51), (49, 100)]:
        made = processor.image_processor([Image.new("RGB", size)], return_tensors="pt", return_row_col_info=True)
        expected = made["rows"][0][0] or 1, made["cols"][0][0] or 1
        assert SmolVLM().tiles(processor, size) == expected, size


def test_a_smolvlm_picture_that_is_not_cut_is_one_tile(loaded: Any) -> None:
    _, processor = loaded["smolvlm"]
    whole = copy.copy(processor)
    whole.image_processor = copy.copy(processor.image_processor)
    whole.image_processor.do_image_splitting = False
    sample = Encoder(whole).encode(asked((40, 25)))
    assert sample["images"][0]["pixel_values"].shape[0] == 1 and (sample["input_ids"] == IMAGE_ID).sum() == 4
    text = processor.tokenizer.decode(sample["input_ids"])
    assert "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>" in text


def test_marks_between_tiles_rank_nothing(loaded: Any) -> None:
    """They outnumber a short question, and see only the tiles before them."""
    _, processor = loaded["smolvlm"]
    images = (noise((40, 25)), noise((16, 50)))
    sample = Encoder(processor).encode(
        talk("One: <image> two: <image>\nWhich?", "This.", "And?", "That.", images=images)
    )
    ids, image = sample["input_ids"], sample["input_ids"] == IMAGE_ID
    layout, counts = build_layout(image[None], None, (sample["labels"] != -100)[None], marks_tiles=True)
    text = processor.tokenizer.decode(ids[layout.ranking[0]])
    assert text.replace("\n", "").startswith("<fake_token_around_image>Which?") and "This" not in text
    assert "row_" not in text and "two" not in text and counts.unread == 0
    assert int(layout.ranking[0].nonzero()[0]) == int(image.nonzero()[-1]) + 1
    assert SmolVLM().marks_tiles and not Encoder(loaded["internvl"][1]).family.marks_tiles
    whole, _ = build_layout(image[None], None, (sample["labels"] != -100)[None])
    assert "row_1_col_2" in processor.tokenizer.decode(ids[whole.ranking[0]])


@pytest.mark.parametrize("tokens", ["resize", "edge"])
def test_smolvlm_image_processors_of_another_kind_are_refused(tokens: str, loaded: Any, tmp_path: Path) -> None:
    model, processor = loaded["smolvlm"]
    images = copy.copy(processor.image_processor)
    if tokens == "resize":
        images.do_resize = False
        with pytest.raises(ValueError, match="do_resize false"):
            SmolVLM().limit_tiles(images, 4)
    else:
        processor.tokenizer.save_pretrained(tmp_path)
        type(images)(size={"height": 16, "width": 16}, max_image_size={"longest_edge": 16}).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no longest_edge"):
            SmolVLM().load_processor(str(tmp_path), model.config)


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("smolvlm", "<image>", "no <fake_token_around_image>, which stands around a tile"),
        ("internvl", "<IMG_CONTEXT>", "no <img>, which stands around"),
    ],
)
def test_a_tokenizer_without_its_marks_is_refused(
    name: str, image: str, message: str, loaded: Any, tmp_path: Path
) -> None:
    model, processor = loaded[name]
    byte_tokenizer(image, "</s>").save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Encoder(processor).family.load_processor(str(tmp_path), model.config)


class _Seeing(torch.nn.Module):
    """A tower whose features are the mean colours of the patches, behind a class token where there is one."""

    def __init__(self, class_token: bool) -> None:
        super().__init__()
        self.class_token = class_token

    def forward(self, pixel_values: torch.Tensor, **options: Any) -> Any:
        features = torch.nn.functional.avg_pool2d(pixel_values, PATCH).flatten(2).transpose(1, 2).contiguous()
        if self.class_token:
            features = torch.nn.functional.pad(features, (0, 0, 1, 0))
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,) * 3)


class _Passing(torch.nn.Module):
    """A projector that hands colours on, the mean of those that it is given together."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(features.unflatten(-1, (-1, 3)).mean(-2), (0, 29))


@pytest.mark.parametrize("size", [(40, 25), (25, 40), (16, 16), (90, 31), (64, 63), (21, 100)])
@pytest.mark.parametrize("name", TILED)
def test_blocks_lie_where_their_tokens_look(name: str, size: tuple[int, int], loaded: Any) -> None:
    """A picture whose red tells how far right and whose green tells how far down it is."""
    model, processor = copy.deepcopy(loaded[name][0]), loaded[name][1]
    tower, projector = _Seeing(name not in ("llava_onevision", "smolvlm", "idefics3")), _Passing()
    setattr(model.model, TILED[name].tower, tower)
    if TILED[name].family == "smolvlm":
        model.model.connector.modality_projection = projector  # the connector joins patches itself
    else:
        model.model.multi_modal_projector = projector
    encoder, (width, height) = Encoder(processor), size
    red = torch.linspace(0, 255, width).expand(height, -1)
    green = torch.linspace(0, 255, height).unsqueeze(1).expand(-1, width)
    pixels = torch.stack([red, green, torch.full_like(red, 200)], -1).to(torch.uint8)
    picture = Image.fromarray(pixels.numpy(), "RGB")
    parts = processor.image_processor
    mean, deviation = torch.tensor(parts.image_mean), torch.tensor(parts.image_std)
    for beside in ((), (noise((20, 20)),)):
        image = encoder.encode(talk("<image>" * (1 + len(beside)) + "?", "R.", images=(picture, *beside)))["images"][0]
        given = image
        if beside and encoder.family.counts_images:  # the stock forward knows such images in twos and more
            given = {key: torch.cat([value, value]) for key, value in image.items()}
            given["batch_num_images"] = torch.tensor([2, 0])
        features = model.get_image_features(**given).pooler_output
        seen = torch.cat([part.reshape(-1, 32) for part in features])
        seen = seen[: encoder.family.image_tokens(processor, image), :3] * deviation + mean
        blocks = encoder.family.token_blocks(processor, image, picture)
        assert sum(block.tokens for block in blocks) == len(seen)
        start, shown = 0, 0
        for block in blocks:
            left, top, right, bottom = block.box
            for token in range(block.tokens):
                patch = block.patch(token)
                if patch is None:
                    continue
                wide, high = (right - left) / block.columns, (bottom - top) / block.rows
                x, y = left + (patch % block.columns + 0.5) * wide, top + (patch // block.columns + 0.5) * high
                margins = (x - wide / 2, y - high / 2, 1 - x - wide / 2, 1 - y - high / 2)
                if min(margins) > -1e-6:  # no padding in it
                    assert abs(float(seen[start + token, 0]) - x) < wide / 2 + 0.5 / width
                    assert abs(float(seen[start + token, 1]) - y) < high / 2 + 0.5 / height
                    shown += 1
            start += block.tokens
        assert beside or shown > 1
