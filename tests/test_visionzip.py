"""VisionZip: what it reads of the tower, and how that reaches the decoder; the choice itself is in `test_methods`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import make_case
from data_examples import talk
from naive_methods import dominant_and_contextual
from test_feature_cache import data, fit  # noqa: F401 - a fixture
from test_tiles_model import batch, noise
from tiny import IMAGE_TOKENS, tiny_llava
from tiny_tiles import EVERY, TILED
from torch import Tensor
from training_toys import collate, sample, tuner

from himap_train import PruningSchedule, PruningStage, install_pruning, load_llava, record_pruning, remove_pruning
from himap_train.data.encode import Encoder
from himap_train.models.families import family_of
from himap_train.models.families.tower_reading import read_crops
from himap_train.models.features import encode_and_read, hidden_states

ZIP = PruningSchedule((PruningStage(0, "visionzip", 0.5),))
ROWS = ["t3 i16 t4", "t9", "t2 i16 t3 i16 t5"]


def pictures(number: int, side: int = 32) -> Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(3))


def maps_of(model: Any, pixels: Tensor) -> Tensor:
    """(crops, T, 1 + W) by the stock tower's attention maps, of the layer whose output the projector takes."""
    given = getattr(model.config, "vision_feature_layer", None) or model.config.vision_feature_layers
    tower, depth = model.model.vision_tower, model.config.vision_config.num_hidden_layers
    deepest = max(layer % (depth + 1) for layer in torch.tensor(given).view(-1).tolist())
    keys: list[Tensor] = []
    handle = tower.encoder.layers[deepest - 1].self_attn.k_proj.register_forward_hook(lambda *a: keys.append(a[2]))
    tower.set_attn_implementation("eager")
    maps = tower(pixels, output_attentions=True).attentions[deepest - 1].mean(1)
    tower.set_attn_implementation("sdpa")
    handle.remove()
    has_class = model.config.vision_config.model_type == "clip_vision_model"
    score = maps[:, 0].clone() if has_class else maps.mean(1)
    if has_class:
        score[:, 0] = 1.0
    key = keys[0].unflatten(2, (2, -1)).mean(2)
    return torch.cat([score[..., None], key], dim=2)


@pytest.mark.parametrize("name", ["llava", "vipllava", "siglip-full", "siglip-default"])
@torch.no_grad()
def test_readings_are_those_of_the_stock_towers_attention_maps(name: str) -> None:
    model = tiny_llava() if name == "llava" else EVERY[name].model()
    pixels = pictures(3, model.config.vision_config.image_size)
    found = encode_and_read(model, {"pixel_values": pixels}).tower_readings
    expected = maps_of(model, pixels)[:, name != "siglip-full" :]
    torch.testing.assert_close(found, expected.flatten(0, 1))
    assert len(found) == sum(map(len, model.get_image_features(pixel_values=pixels).pooler_output))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@torch.no_grad()
def test_readings_are_packed_as_the_features_are(name: str, tmp_path: Path) -> None:
    """Every token finds the reading of the patch whose feature it is; newlines find zero."""
    model, processor = load_llava(TILED[name].folder(tmp_path))
    rows = [talk("<image>\nA?", "B.", images=(noise(size, 1),)) for size in ((20, 30), (16, 30))]
    images = batch(Encoder(processor), rows, "left", labels=False)
    given = {key: images[key] for key in ("pixel_values", "image_sizes", "batch_num_images") if key in images}
    loose: list[Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda *a: loose.append(a[2].flatten(0, 1)))
    encoded = encode_and_read(model, given)
    handle.remove()
    family: Any = family_of(model)
    first = [name == "llava_next"] * 2
    crops = read_crops(model.config, family.vision(model), encoded.hidden_states, *first).flatten(0, 1)
    features, readings = torch.cat(list(encoded.pooler_output)), encoded.tower_readings
    newline = (features == model.model.image_newline).all(1)
    assert len(features) == len(readings) and int(newline.sum()) and not readings[newline].any()
    same = (features[~newline].unsqueeze(1) == loose[0].unsqueeze(0)).all(2)
    assert same.any(1).all()
    assert torch.equal(readings[~newline], crops[same.long().argmax(1)])


@torch.no_grad()
def test_pixels_through_forward_states_and_generate_choose_alike() -> None:
    """And as brute force does on the stock tower's maps; several images a row, none, and beams."""
    model = tiny_llava()
    case, pixels = make_case(model, ROWS, "left"), pictures(3)
    readings = maps_of(model, pixels)[:, 1:]
    install_pruning(model, ZIP)
    given = {"input_ids": case.input_ids, "attention_mask": case.attention_mask}
    with record_pruning(model) as trace:
        logits = model(**given, pixel_values=pixels).logits
    kept = [row.tolist() for row in trace.kept[0]]
    images = 0
    for row, spec in enumerate(ROWS):
        columns = (case.input_ids[row] == 4).nonzero()[:, 0].tolist()
        number = spec.count("i")
        own = readings[images : images + number].flatten(0, 1)
        images += number
        method, count = ZIP.stages[0].method, len(columns) // 2
        order, _ = dominant_and_contextual(method, own, list(range(len(columns))), [], count)
        assert [c for c in kept[row] if c in columns] == sorted(columns[place] for place in order[:count])
    with record_pruning(model) as trace:
        states = hidden_states(model, **given, images={"pixel_values": pixels})
    assert [row.tolist() for row in trace.kept[0]] == kept
    mask = case.attention_mask.bool()
    assert torch.equal(model.lm_head(states)[mask], logits[mask])
    call = {**given, "max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    made = model.generate(**call, pixel_values=pixels)
    torch.testing.assert_close(made.logits[0], logits[:, -1])
    with record_pruning(model) as trace:
        model.generate(**call, pixel_values=pixels, num_beams=2)
    assert [row.tolist() for row in trace.kept[0]] == [row for row in kept for _ in range(2)]


@torch.no_grad()
def test_what_a_search_encodes_beforehand_serves_every_schedule() -> None:
    model = tiny_llava()
    case, pixels = make_case(model, ROWS, "left"), pictures(3)
    given = {"input_ids": case.input_ids, "attention_mask": case.attention_mask}
    encoded = encode_and_read(model, {"pixel_values": pixels})
    install_pruning(model, ZIP)
    expected = model(**given, pixel_values=pixels).logits
    assert torch.equal(model(**given, mm_encoder_outputs={"image": encoded}).logits, expected)
    remove_pruning(model)
    dense = model(**given, pixel_values=pixels).logits
    assert torch.equal(model(**given, mm_encoder_outputs={"image": encoded}).logits, dense)


def test_what_does_not_tell_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="family internvl with the tower internvl_vision does not tell; choose"):
        install_pruning(TILED["internvl"].model(layers=2), ZIP)
    model = install_pruning(tiny_llava(), ZIP)
    inputs = make_case(model, ROWS).inputs()
    inputs["mm_encoder_outputs"]["image"].tower_readings = None
    with torch.no_grad(), pytest.raises(ValueError, match="came without it: pass pixel_values, encode"):
        model(**inputs)
    inputs = make_case(model, ROWS).inputs()
    inputs["mm_encoder_outputs"]["image"].tower_readings = torch.zeros(5, 3)
    with torch.no_grad(), pytest.raises(ValueError, match="readings are of 5 image tokens, the batch has 48"):
        model(**inputs)


def test_cached_features_carry_the_readings_to_the_bit(tiny_path: str, data: str, tmp_path: Path) -> None:  # noqa: F811
    model = {"projector": "freeze", "schedule": ZIP.to_dict()}
    kwargs: dict[str, Any] = {"precision": "bf16-mixed", "model": model}
    plain, cached = (fit(tiny_path, data, tmp_path, cache, **kwargs) for cache in (None, True))
    assert cached.losses == plain.losses and (plain.calls, cached.calls) == (10, 0)


def test_batches_of_text_alone_run_the_same_modules(tiny_path: str) -> None:
    model = tuner(tiny_path, schedule=ZIP.to_dict())
    model.configure_model()
    for read in ({"images": {}}, {"images": {}, "image_features": torch.randn(0, IMAGE_TOKENS, 32 + 17)}):
        model.zero_grad()
        model.batch_loss({**collate([sample(0, image=False)]), **read})[0].backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
