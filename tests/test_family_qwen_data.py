"""Qwen-VL's data: its own image processor's sizes, what stands around an image, batches of images of any size."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from data_examples import encode_prompt, picture, talk
from tiny_qwen import IMAGE_ID, KINDS, PATCH, save_qwen
from transformers import AutoProcessor

from himap_train import load_llava
from himap_train.data.batches import collate, pad_token_id_of
from himap_train.data.encode import Encoder, SampleTooLongError
from himap_train.data.records import RecordError
from himap_train.models.families import family_of, family_of_processor
from himap_train.models.features import hidden_states
from himap_train.models.loading import load_config, load_processor

pytestmark = pytest.mark.core

TWO = talk("<image>\nWhat?", "A cat.", "And <image>?", "A dog.", images=(picture(40, 30), picture(19, 50)))
TEXT = talk("Hi", "Hello")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_qwen(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def processor(checkpoint: str) -> Any:
    return load_processor(checkpoint, load_config(checkpoint))


def shown(tokens: int) -> str:
    return f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>"


def test_text_is_the_templates_with_as_many_tokens_as_the_stock_processor_writes(processor: Any) -> None:
    """Qwen2VLProcessor.replace_image_token: image_grid_thw.prod() // merge_size**2 in the place of one."""
    sample = Encoder(processor).encode(TWO)
    counts = [int(image["image_grid_thw"][0].prod()) // 4 for image in sample["images"]]
    assert counts == [20, 12]  # 40x30 -> 40x32, 19x50 -> 16x48 pixels, 8x8 pixels a token
    first = SYSTEM if processor.family == "qwen2_vl" else ""
    expected = (
        f"{first}<|im_start|>user\n{shown(20)}What?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        f"<|im_start|>user\nAnd {shown(12)}?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>"
    )
    assert processor.tokenizer.decode(sample["input_ids"]) == expected
    assert processor.tokenizer.decode(sample["labels"][sample["labels"] >= 0]) == "A cat.<|im_end|>A dog.<|im_end|>"
    prompt = encode_prompt(TWO, processor)
    length = len(prompt["input_ids"])
    assert torch.equal(prompt["input_ids"], sample["input_ids"][:length])
    assert processor.tokenizer.decode(sample["input_ids"][length:]) == "A dog.<|im_end|>"


def test_sizes_give_the_tokens_that_encoding_gives(processor: Any) -> None:
    encoder = Encoder(processor)
    sizes = [(w, h) for w in (1, 5, 8, 13, 40, 77, 300) for h in (2, 11, 16, 31, 99)] + [(640, 480), (481, 641)]
    found = set()
    for size in sizes:
        image = encoder.family.encode_image(processor, picture(*size), "as_processor")
        tokens = encoder.family.image_tokens(processor, image)
        assert encoder.family.tokens_of_size(processor, size, "as_processor") == tokens, size
        assert len(image["pixel_values"]) == 4 * tokens
        found.add(tokens)
    assert min(found) >= 4 and max(found) <= 25 and len(found) > 8


def test_tokens_lie_row_by_row_over_the_picture(processor: Any) -> None:
    image = picture(40, 32, (0, 0, 0))
    image.paste((255, 255, 255), (24, 8, 32, 16))  # row 1, column 3 of 4x5
    encoded = Encoder(processor).family.encode_image(processor, image, "as_processor")
    brightness = encoded["pixel_values"].reshape(20, -1).mean(1)
    assert brightness.gt(0).nonzero().flatten().tolist() == [1 * 5 + 3]


def test_an_image_that_the_processor_refuses_is_an_error_of_its_record(processor: Any) -> None:
    encoder, thin = Encoder(processor), picture(410, 2)
    with pytest.raises(RecordError, match="sample 'sample': absolute aspect ratio must be smaller than 200"):
        encoder.encode(talk("<image>\nWhat?", "A line.", images=(thin,)))
    with pytest.raises(RecordError, match="410 x 2 pixels: absolute aspect ratio"):
        encoder.image_tokens((410, 2))


def test_truncation_drops_whole_exchanges_with_their_images(processor: Any) -> None:
    whole = Encoder(processor).encode(TWO)
    length = len(whole["input_ids"])
    cut = Encoder(processor, max_length=length - 1).encode(TWO)
    assert cut["dropped_exchanges"] == 1 and len(cut["images"]) == 1
    assert int((cut["input_ids"] == IMAGE_ID).sum()) == 20
    assert torch.equal(cut["input_ids"], whole["input_ids"][: len(cut["input_ids"])])
    with pytest.raises(SampleTooLongError, match="first question and answer"):
        Encoder(processor, max_length=len(cut["input_ids"]) - 1).encode(TWO)


def test_a_batch_of_images_of_many_sizes_equals_its_samples_alone(checkpoint: str) -> None:
    model, processor = load_llava(checkpoint)
    encoder = Encoder(processor)
    talks = (TWO, TEXT, talk("<image>\nNow?", "No.", images=(picture(90, 20),)))
    samples = [encoder.encode(one) for one in talks]
    with torch.no_grad():
        for side in ("left", "right"):
            batch = collate(samples, pad_token_id_of(processor.tokenizer), padding_side=side)
            assert batch["images"]["image_grid_thw"].tolist() == [[1, 8, 10], [1, 12, 4], [1, 4, 22]]
            states = hidden_states(model, **{k: batch[k] for k in ("input_ids", "attention_mask", "images")})
            for row, sample in enumerate(samples):
                alone = collate([sample], 0)
                expected = hidden_states(model, **{k: alone[k] for k in ("input_ids", "images")})
                found = states[row][batch["attention_mask"][row].bool()]
                torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4)


def test_a_batch_of_text_runs_the_same_modules(checkpoint: str) -> None:
    """Every rank must call the same ones, and give every trained parameter a gradient."""
    model, processor = load_llava(checkpoint)
    batch = collate([Encoder(processor).encode(TEXT)], 0)
    states = hidden_states(model, **{k: batch[k] for k in ("input_ids", "images")})
    states.sum().backward()
    family = family_of(model)
    for name in family.projector_names:
        assert all(p.grad is not None and not p.grad.any() for p in model.get_submodule(name).parameters())


def test_processor_files_go_on_unchanged(checkpoint: str, processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    for name in ("preprocessor_config.json", "chat_template.json"):
        assert (tmp_path / name).read_text() == (Path(checkpoint) / name).read_text()
    again = load_processor(tmp_path, load_config(checkpoint))
    assert again.chat_template == processor.chat_template
    assert Encoder(again).encode(TWO)["input_ids"].tolist() == Encoder(processor).encode(TWO)["input_ids"].tolist()


def test_settings_may_lie_in_one_file_for_all_parts(checkpoint: str, processor: Any, tmp_path: Path) -> None:
    """As transformers 5 writes them."""
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    whole = {"processor_class": settings.pop("processor_class"), "image_processor": settings}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    images = load_processor(tmp_path, load_config(checkpoint)).image_processor
    assert (images.patch_size, dict(images.size)) == (PATCH, dict(processor.image_processor.size))


def test_padding_is_refused_with_the_familys_name(processor: Any) -> None:
    with pytest.raises(ValueError, match=f"'pad' .*{family_of_processor(processor).name}"):
        Encoder(processor, image_aspect_ratio="pad")


@pytest.mark.torchvision
@pytest.mark.skipif(find_spec("torchvision") is None, reason="stock processors of this family need torchvision")
def test_ids_equal_those_of_the_stock_processor(checkpoint: str, processor: Any) -> None:
    stock = AutoProcessor.from_pretrained(checkpoint)
    text = processor.tokenizer.decode(encode_prompt(TWO, processor)["input_ids"])
    for count in (20, 12):
        text = text.replace("<|image_pad|>" * count, "<|image_pad|>")
    given = stock(text=[text], images=list(TWO.images), return_tensors="pt")
    assert given["input_ids"][0].tolist() == encode_prompt(TWO, processor)["input_ids"].tolist()
