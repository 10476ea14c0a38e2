"""Families that cut pictures into tiles, in the layer loop: held to their stock models and to a masked decoder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from data_examples import talk
from naive import naive_row
from PIL import Image
from tiny_tiles import EVERY, IMAGE_ID, TILED
from torch import Tensor

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning, remove_pruning
from himap_train.data.batches import collate
from himap_train.data.encode import Encoder
from himap_train.data.records import Conversation
from himap_train.models.features import hidden_states
from himap_train.models.loading import load_llava

pytestmark = pytest.mark.core

STATES = {"atol": 2e-4, "rtol": 2e-4}  # fp32
LOGITS = {"atol": 2e-3, "rtol": 1e-3}
EXACT = {"atol": 1e-9, "rtol": 1e-7}  # fp64
KINDS = [(name, text) for name, tiny in TILED.items() for text in tiny.texts]
STEPS = 4


def schedule(*stages: tuple[int, str, float], enter: int = 0) -> PruningSchedule:
    made = tuple(PruningStage(layer=at, criterion=how, keep_ratio=ratio) for at, how, ratio in stages)
    return PruningSchedule(stages=made, enter=enter)


HIMAP = schedule((2, "instruction", 0.5), (4, "image", 0.125))
PLANS = {
    "himap": HIMAP,
    "before": schedule((0, "stride", 0.4), (3, "instruction", 0.2)),
    "first": schedule((0, "first-k", 0.3)),
    "pyramid": schedule((1, "last_token", 0.7), (2, "instruction", 0.4), (3, "image", 0.1)),
    "late": schedule((4, "instruction", 0.5), enter=2),
    "pooled": schedule((0, "stride", 0.5), (2, "average-pool", 0.2)),
    "none": schedule((2, "stride", 0.0)),
}
WHOLE = [schedule((at, "stride", 1.0)) for at in (0, 1)] + [schedule((2, "instruction", 1.0), (4, "image", 1.0))]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    """Of each family, from its folder."""
    made = {}
    for name, tiny in TILED.items():
        _, processor = load_llava(tiny.folder(tmp_path_factory.mktemp(name), 1))
        made[name] = Encoder(processor)
    return made


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy(), "RGB")


# One image; none; two of them in one question; two, each in a turn of its own.
ROWS = [
    talk("<image>\nWhat?", "Red.", images=(noise((40, 25), 1),)),
    talk("Hello there", "Yes, and so on."),
    talk("<image>\n<image>\nAny?", "No.", images=(noise((18, 60), 2), noise((16, 16), 3))),
    talk("<image>\nA?", "B.", "<image>\nC?", "Dd.", images=(noise((33, 33), 4), noise((9, 20), 5))),
]
ONE_IMAGE = [ROWS[0], ROWS[1], talk("<image>\nHow many of them?", "2", images=(noise((16, 50), 6),))]


def batch(encoder: Encoder, rows: list[Conversation], side: str, labels: bool) -> dict[str, Tensor]:
    """Keyword arguments of the stock model."""
    samples = [(encoder.encode if labels else encoder.encode_prompt)(row) for row in rows]
    made: Any = collate(samples, 0, side)  # type: ignore[arg-type]
    texts = {name: made[name] for name in ("input_ids", "attention_mask", *(["labels"] if labels else []))}
    return texts | made["images"]


def embedded(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Embeddings with the image features in their places, by the stock model's own parts."""
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "labels")}
    if images:
        features = model.get_image_features(**images, return_dict=True).pooler_output
        flat = torch.cat([part.reshape(-1, embeds.shape[-1]) for part in features]).to(embeds.dtype)
        embeds = embeds.masked_scatter((inputs["input_ids"] == IMAGE_ID).unsqueeze(-1), flat)
    return embeds


def oracle(
    model: Any, plan: PruningSchedule, inputs: dict[str, Tensor], prompt: int | None = None
) -> tuple[Tensor, list[list[list[int]]]]:
    """States (B, S, D), zero where nothing is left, and for each stage the columns of each row that are.

    Columns from `prompt` on were decoded and rank nothing.
    """
    embeds, labels = embedded(model, inputs), inputs.get("labels")
    image, states = inputs["input_ids"] == IMAGE_ID, torch.zeros_like(embeds)
    kept: list[list[list[int]]] = [[] for _ in plan.stages]
    for row, real in enumerate(inputs["attention_mask"].bool()):
        columns = real.nonzero()[:, 0]
        end = len(columns) if prompt is None else int((columns < prompt).sum())
        row_labels = None if labels is None else labels[row, columns]
        hidden, history = naive_row(model, plan, embeds[row, columns], image[row, columns], row_labels, end, None)
        left = history[-1] if history else torch.ones_like(columns, dtype=torch.bool)
        states[row, columns[left]] = hidden[left]
        for stage, alive in zip(kept, history, strict=True):
            stage.append(columns[:end][alive[:end]].tolist())
    return states, kept


def grown(model: Any, inputs: dict[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Greedy continuation by the oracle, (B, steps), and its logits (B, steps, V)."""
    plan, inputs = HIMAP, dict(inputs)
    prompt, found = inputs["input_ids"].shape[1], []
    for _ in range(steps):
        states, _ = oracle(model, plan, inputs, prompt)
        found.append(model.lm_head(states[:, -1]))
        new = found[-1].argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    return inputs["input_ids"][:, prompt:], torch.stack(found, 1)


def everything(model: Any, training: dict[str, Tensor], prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, loss, gradients, and what is generated greedily, with beams and by chance."""
    model.zero_grad()
    out = model(**training)
    out.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    # Of the real tokens: states of padding are zero wherever there is a stage, whatever it keeps.
    found |= {"logits": out.logits.detach()[training["attention_mask"].bool()], "loss": out.loss.detach()}
    for name, options in {"greedy": {}, "beams": {"num_beams": 2}, "sampled": {"do_sample": True}}.items():
        torch.manual_seed(3)
        made = model.generate(
            **prompt, **{"do_sample": False, **options}, max_new_tokens=STEPS, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        found |= {f"{name} ids": made.sequences, f"{name} scores": torch.stack(made.scores)}
    return {name: value.clone() for name, value in found.items()}


@pytest.mark.parametrize(("name", "text"), KINDS)
def test_without_removal_it_is_the_stock_model_to_the_last_bit(name: str, text: str, encoders: Any) -> None:
    model = TILED[name].model(text, layers=5)
    training, prompt = batch(encoders[name], ROWS, "right", True), batch(encoders[name], ONE_IMAGE, "left", False)
    expected = everything(model, training, prompt)
    assert len(expected) > 60 and any(f".{TILED[name].tower}." in key for key in expected)
    assert ("model.image_newline" in expected) == name.startswith("llava")
    for plan in [PruningSchedule(), *WHOLE]:
        found = everything(install_pruning(model, plan), training, prompt)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), (key, plan)
    install_pruning(model, HIMAP)
    assert not torch.equal(everything(model, training, prompt)["logits"], expected["logits"])
    found = everything(remove_pruning(model), training, prompt)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("name", "text"), KINDS)
@torch.no_grad()
def test_pruned_states_and_kept_tokens_equal_the_oracle(name: str, text: str, plan: str, encoders: Any) -> None:
    model = TILED[name].model(text)
    for side, labels in (("left", False), ("right", True)):
        inputs = batch(encoders[name], ROWS, side, labels)
        remove_pruning(model)
        expected, kept = oracle(model, PLANS[plan], inputs)
        install_pruning(model, PLANS[plan])
        with record_pruning(model) as trace:
            found = states_of(model, inputs)
        assert [[row.tolist() for row in stage] for stage in trace.kept] == kept
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[real], expected[real], **STATES)
        assert not found[~real].any()


def states_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "labels")}
    return hidden_states(
        model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], images=images,
        labels=inputs.get("labels"),
    )  # fmt: skip


@pytest.mark.parametrize("plan", ["himap", "before", "late"])
@pytest.mark.parametrize("name", TILED)
def test_gradients_equal_those_of_the_oracle(name: str, plan: str, encoders: Any) -> None:
    model = TILED[name].model().double()
    inputs = batch(encoders[name], ROWS, "right", True)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    states, _ = oracle(model, PLANS[plan], inputs)
    loss(model.lm_head(states), inputs["labels"]).backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    twin = install_pruning(copy.deepcopy(model), PLANS[plan])
    twin.zero_grad()
    loss(twin(**inputs).logits, inputs["labels"]).backward()  # the stock loss rounds to fp32
    found = {key: p.grad for key, p in twin.named_parameters() if p.grad is not None}
    assert expected.keys() <= found.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected.get(key, torch.zeros_like(gradient)), **EXACT)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    predicted, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(predicted, wanted, ignore_index=-100)


@pytest.mark.parametrize("name", TILED)
def test_a_checkpointed_step_equals_the_plain_one(name: str, encoders: Any) -> None:
    inputs, found = batch(encoders[name], ROWS, "right", True), []
    for checkpointing in (False, True):
        model = install_pruning(TILED[name].model(), HIMAP).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(**inputs)
        out.loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None} | {"loss": out.loss})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


@pytest.mark.parametrize(("name", "text"), KINDS)
def test_generate_equals_the_oracle(name: str, text: str, encoders: Any) -> None:
    model = TILED[name].model(text)
    inputs = batch(encoders[name], ROWS, "left", False)
    with torch.no_grad():
        ids, logits = grown(model, inputs, STEPS)
    made = install_pruning(model, HIMAP).generate(
        **inputs, do_sample=False, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(made.sequences[:, inputs["input_ids"].shape[1] :], ids)
    torch.testing.assert_close(torch.stack(made.logits, 1), logits, **LOGITS)
    lengths = [layer.keys.shape[-2] for layer in made.past_key_values.layers]
    assert lengths[0] == lengths[1] > lengths[2] == lengths[3] > lengths[4] == lengths[5]


@pytest.mark.parametrize("name", TILED)
@torch.no_grad()
def test_decoding_step_by_step_equals_the_oracle(name: str, encoders: Any) -> None:
    model = TILED[name].model()
    inputs = batch(encoders[name], ROWS, "left", False)
    ids, logits = grown(model, inputs, STEPS)
    install_pruning(model, HIMAP)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, position_ids=positions, use_cache=True)
    torch.testing.assert_close(out.logits[:, -1], logits[:, 0], **LOGITS)
    for step in range(STEPS - 1):
        new = ids[:, step : step + 1]
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        out = model(
            input_ids=new, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=out.past_key_values, use_cache=True,
        )  # fmt: skip
        torch.testing.assert_close(out.logits[:, -1], logits[:, step + 1], **LOGITS)


@pytest.mark.parametrize("name", TILED)
@torch.no_grad()
def test_the_inner_model_and_the_decoder_prune_as_the_whole_does(name: str, encoders: Any) -> None:
    model = TILED[name].model()
    inputs = batch(encoders[name], ROWS, "left", False)
    embeds, image = embedded(model, inputs), inputs["input_ids"] == IMAGE_ID
    install_pruning(model, HIMAP)
    expected = model(**inputs).logits
    inner = model.model(**inputs).last_hidden_state
    decoder = model.get_decoder()(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], image_token_mask=image
    ).last_hidden_state
    assert torch.equal(model.lm_head(inner), expected)
    assert torch.equal(decoder, inner)


@pytest.mark.parametrize("name", TILED)
def test_a_batch_of_text_runs_the_tower_and_the_projector(name: str, encoders: Any) -> None:
    """Every rank calls the same modules, and every parameter that is trained has a gradient."""
    model = install_pruning(TILED[name].model(), HIMAP)
    called = []
    model.model.get_submodule(TILED[name].tower).register_forward_hook(lambda *_: called.append(True))
    states_of(model, batch(encoders[name], [ROWS[1]], "right", True)).sum().backward()
    assert called == [True]
    assert all(p.grad is not None for p in model.model.get_submodule(TILED[name].projector).parameters())
    assert not name.startswith("llava") or model.model.image_newline.grad is not None


@pytest.mark.parametrize("name", ["vipllava", "siglip-full", "siglip-default"])
def test_llavas_other_towers_prune_as_the_oracle(name: str, tmp_path: Path) -> None:
    model, processor = load_llava(EVERY[name].folder(tmp_path))
    encoder = Encoder(processor)
    for side, labels in (("left", False), ("right", True)):
        inputs = batch(encoder, ROWS, side, labels)
        remove_pruning(model)
        expected, kept = oracle(model, HIMAP, inputs)
        install_pruning(model, HIMAP)
        with record_pruning(model) as trace, torch.no_grad():
            found = states_of(model, inputs)
        assert [[row.tolist() for row in stage] for stage in trace.kept] == kept
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[real], expected[real], **STATES)
    with torch.no_grad():
        install_pruning(model, PruningSchedule())
        found, stock = model(**inputs).logits, remove_pruning(model)(**inputs).logits
    assert torch.equal(found, stock)


@pytest.mark.parametrize("name", TILED)
@torch.no_grad()
def test_videos_and_unknown_keywords_are_refused_by_the_familys_name(name: str, encoders: Any) -> None:
    model = install_pruning(TILED[name].model(layers=5), HIMAP)
    inputs = batch(encoders[name], ROWS, "left", False)
    for extra in ({"pixel_values_videos": torch.zeros(1, 2, 3, 16, 16)}, {"wonder": 1}, {"input_features": inputs}):
        with pytest.raises(ValueError, match=next(iter(extra))) as error:
            model(**inputs, **extra)
        assert f"family {TILED[name].family}" in str(error.value)
    assert torch.equal(model(**inputs, logits_to_keep=1).logits, model(**inputs).logits[:, -1:])
