"""What may choose the image tokens is the prompt alone, whoever calls the model and however it decodes."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from cases import make_case
from tiny import tiny_llava
from torch import Tensor, nn

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning, remove_pruning
from himap_train.models.install import pruning_of

pytestmark = pytest.mark.core

SCHEDULE = PruningSchedule((PruningStage(2, "instruction", 0.5), PruningStage(4, "image", 0.125)))
LOOKS_AT_NOTHING = PruningSchedule((PruningStage(2, "stride", 0.5),))
SEEDS = range(6)
ANSWERED = "t1 i16 t9 a3"


def pruned(seed: int = 0, schedule: PruningSchedule = SCHEDULE) -> Any:
    return install_pruning(tiny_llava(seed=seed), schedule)


def inputs(model: Any, *rows: str, labels: bool = False) -> dict[str, Any]:
    return make_case(model, rows, "left").inputs(labels)


def kept_with(model: Any, **call: Any) -> list[list[int]]:
    """Image tokens that each stage keeps of the first row."""
    with record_pruning(model) as trace:
        model(**call)
    image = call["input_ids"][0] == 4
    return [[column for column in stage[0].tolist() if image[column]] for stage in trace.kept]


def prompt_alone(model: Any, call: dict[str, Any], answer: int = 3) -> list[list[int]]:
    """What a prefill of the prompt keeps."""
    short = call | {name: call[name][:, :-answer] for name in ("input_ids", "attention_mask")}
    short.pop("labels", None)
    with torch.no_grad():
        return kept_with(model, **short)


# ---- training forwards ----


def test_forward_with_a_gradient_and_nothing_that_says_what_the_answers_are_is_refused() -> None:
    model = pruned()
    call = inputs(model, ANSWERED)
    with pytest.raises(ValueError, match="records a gradient but has neither labels nor supervised_mask"):
        model(**call)
    with pytest.raises(ValueError, match="neither labels nor supervised_mask"):
        model.model(**call)
    model(**inputs(model, "t5"))  # nothing is chosen of text
    model.requires_grad_(False)
    model(**call)


@pytest.mark.parametrize("said", ["labels", "shift_labels", "supervised_mask", "all labels and supervised_mask"])
def test_answers_never_choose(said: str) -> None:
    for seed in SEEDS:
        model = pruned(seed)
        call = inputs(model, ANSWERED, labels=True)
        labels = call.pop("labels")
        given: dict[str, Any] = {
            "labels": {"labels": labels},
            "shift_labels": {"shift_labels": nn.functional.pad(labels[:, 1:], (0, 1), value=-100)},
            "supervised_mask": {"supervised_mask": labels != -100},
            "all labels and supervised_mask": {"labels": call["input_ids"], "supervised_mask": labels != -100},
        }[said]
        assert kept_with(model, **call, **given) == prompt_alone(model, call)


@pytest.mark.parametrize("images_too", [True, False])
def test_labels_that_cover_the_question_prune_all_the_same_and_say_so(images_too: bool) -> None:
    model = pruned()
    call = inputs(model, ANSWERED)
    labels = call["input_ids"].clone()
    if not images_too:
        labels[labels == 4] = -100
    with pytest.warns(UserWarning) as said:
        kept = kept_with(model, **call, labels=labels)
    assert [len(stage) for stage in kept] == [8, 2]
    texts = "\n".join(str(warning.message) for warning in said)
    assert "no prompt text stands between the images and what is supervised" in texts
    assert ("labels supervise image tokens: ignored" in texts) == images_too


def test_image_tokens_are_never_predicted() -> None:
    """Many write `labels = input_ids.clone()`; the loss is then that of the text, as the warning says."""
    model = pruned()
    call = inputs(model, ANSWERED, "t4 i9 t3 a5")
    every = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    text = every.masked_fill(every == 4, -100)
    losses = [model(**call, labels=labels).loss for labels in (every, text)]
    losses += [model(**call, shift_labels=nn.functional.pad(every[:, 1:], (0, 1), value=-100), labels=every).loss]
    assert losses[0] == losses[1] == losses[2]
    embeds = {
        "inputs_embeds": model.get_input_embeddings()(call["input_ids"]),
        "image_token_mask": call["input_ids"] == 4,
    }
    merged = {**embeds, "attention_mask": call["attention_mask"]}
    assert model(**merged, labels=every).loss == model(**merged, labels=text).loss
    with pytest.raises(ValueError, match="pass one entry per token"):
        model(**call, labels=every[:, 1:])
    dense = install_pruning(model, None)  # bit for bit as stock
    assert dense(**call, labels=every).loss != dense(**call, labels=text).loss


@pytest.mark.parametrize("search", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_prompts_whose_images_are_merged_already_are_pruned(search: dict[str, int]) -> None:
    model = tiny_llava()
    call = inputs(model, "t3 i16 t4", "t5 i16 t2")
    ids, pixels = call["input_ids"], torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(pixels).pooler_output))
        merged = model.get_input_embeddings()(ids).masked_scatter((ids == 4).unsqueeze(2), features)
    install_pruning(model, SCHEDULE)
    options = {"attention_mask": call["attention_mask"], "max_new_tokens": 3, "pad_token_id": 0, **search}
    expected = model.generate(input_ids=ids, pixel_values=pixels, **options)[:, -3:]
    for said in ({"image_token_mask": ids == 4}, {"image_token_mask": (ids == 4).long()}, {"input_ids": ids}):
        with record_pruning(model) as trace:
            found = model.generate(inputs_embeds=merged, **said, **options)
        assert torch.equal(found[:, -3:], expected) and len(trace.kept[1][0]) == 7 + 2
    with pytest.raises(ValueError, match="image_token_mask has shape .1, .*, the prompts .2, .*: one entry per token"):
        model.generate(inputs_embeds=merged, image_token_mask=ids[:1] == 4, **options)
    with pytest.raises(ValueError, match="pass image_token_mask .B, S. with inputs_embeds, to the model or to"):
        model.generate(inputs_embeds=merged, **options)


def test_masks_of_numbers_are_masks() -> None:
    model = pruned()
    call = inputs(model, ANSWERED, labels=True)
    answers = call.pop("labels") != -100
    assert kept_with(model, **call, supervised_mask=answers.long()) == kept_with(model, **call, supervised_mask=answers)


def test_supervised_mask_of_another_shape_is_refused() -> None:
    model = pruned()
    with pytest.raises(ValueError, match="shape .1, 4., the batch .1, 29."):
        model(**inputs(model, ANSWERED), supervised_mask=torch.ones(1, 4, dtype=torch.bool))


def test_more_tokens_than_scheduled_are_an_error_for_whoever_calls_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned()
    call = inputs(model, ANSWERED, labels=True)
    monkeypatch.setattr("himap_train.pruning.removal._bounded", lambda kept, counts: counts.current)
    with pytest.raises(RuntimeError, match=r"layer 2 left \[16\] image tokens of \[16\], at most \[9\] are scheduled"):
        model(**call)


def test_decoder_forward_that_was_replaced_is_noticed() -> None:
    model = pruned()
    decoder = model.model.language_model
    decoder.forward = types.MethodType(type(decoder).forward, decoder)
    call = inputs(model, ANSWERED)
    call.pop("attention_mask")
    with torch.no_grad(), pytest.raises((RuntimeError, TypeError, ValueError), match="forward was replaced"):
        model(**call)


# ---- generation ----


def same_in_all(schedule: PruningSchedule, **options: Any) -> None:
    for seed in SEEDS:
        model = pruned(seed, schedule)
        call = inputs(model, "t1 i16 t9")
        call["input_ids"][0, -9:] = torch.tensor([7, 8, 9, 10, 11, 12, 7, 8, 9])  # for prompt lookup to find
        given = {name: make(seed, schedule) if callable(make) else make for name, make in options.items()}
        greedy = model.generate(**call, max_new_tokens=12, do_sample=False)
        assert torch.equal(model.generate(**call, max_new_tokens=12, do_sample=False, **given), greedy)


@pytest.mark.parametrize("schedule", [SCHEDULE, LOOKS_AT_NOTHING], ids=["himap", "stride"])
def test_drafted_tokens_choose_nothing(schedule: PruningSchedule) -> None:
    same_in_all(schedule, assistant_model=pruned)
    same_in_all(schedule, assistant_model=lambda seed, _: tiny_llava(seed=seed + 1))
    same_in_all(schedule, prompt_lookup_num_tokens=4)


def test_decoding_without_a_cache_chooses_as_with_one() -> None:
    same_in_all(SCHEDULE, use_cache=False)
    ragged = ("t3 i16 t4", "t9", "t2 i9 t3 i16 t5", "t2 i16")
    for seed in SEEDS:
        model = pruned(seed)
        call = inputs(model, *ragged) | {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(**call, use_cache=False), model.generate(**call))


def test_prompt_in_pieces_is_refused() -> None:
    model = pruned()
    with pytest.raises(ValueError, match="prompt of 26 tokens arrives in pieces, here 20.*prefill_chunk_size"):
        model.generate(**inputs(model, "t1 i16 t9"), prefill_chunk_size=20, max_new_tokens=2)


def test_image_behind_a_cached_prefix_is_refused() -> None:
    model = pruned()
    call = inputs(model, "t1 i16 t9")
    with torch.no_grad():
        cache = model(input_ids=call["input_ids"][:, :1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="image tokens behind a filled KV cache"):
        model.generate(**call, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("question", [9, 1])
def test_question_behind_cached_images_is_refused(question: int) -> None:
    model = pruned()
    call = inputs(model, f"t1 i16 t{question}")
    with torch.no_grad():
        prefix = {name: values[:, :17] for name, values in call.items() if name != "mm_encoder_outputs"}
        cache = model(**call | prefix, use_cache=True).past_key_values
    texts = {name: call[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="chosen before any text was there"):
        model.generate(**texts, past_key_values=cache, max_new_tokens=2)
    with torch.no_grad(), pytest.warns(UserWarning, match="chosen before any text was there"):
        model(input_ids=torch.tensor([[7, 8, 9]]), past_key_values=cache)


def test_conversation_behind_a_cache_is_the_same_token_by_token() -> None:
    for seed in SEEDS:
        model = pruned(seed)
        call = inputs(model, "t1 i16 t9")
        first = model.generate(**call, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
        with torch.no_grad():
            cache = model(**call, use_cache=True).past_key_values
            for column in range(26, more.shape[1]):
                logits = model(input_ids=more[:, column : column + 1], past_key_values=cache).logits
        expected = logits[:, -1].argmax(-1)
        going_on = model.generate(
            more, past_key_values=first.past_key_values, max_new_tokens=1, do_sample=False, attention_mask=more * 0 + 1
        )
        assert torch.equal(going_on[:, -1], expected)


# ---- others who replace the forward ----


def wrap_like_a_trainer(model: Any) -> None:
    """As TRL's `add_fused_lm_head`: its forward keeps the labels and calls the inner model."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def fused(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, labels=labels, **kwargs)
        return self.base_model(*args, **kwargs, use_cache=False).last_hidden_state

    model.forward = types.MethodType(fused, model)


def test_trainer_that_wraps_before_pruning_is_installed_trains_as_the_labels_say() -> None:
    model = tiny_llava()
    wrap_like_a_trainer(model)
    theirs = model.forward
    install_pruning(model, SCHEDULE)
    call = inputs(model, ANSWERED, labels=True)
    assert kept_with(model, **call, fused_lm_head=True) == prompt_alone(model, call)
    assert kept_with(model, **call) == prompt_alone(model, call)
    assert remove_pruning(model).forward == theirs


def test_trainer_that_wraps_after_it_is_told_to_install_again() -> None:
    model = pruned()
    wrap_like_a_trainer(model)
    theirs = model.forward
    call = inputs(model, ANSWERED, labels=True)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode, pytest.raises(ValueError, match="forward was replaced after install_pruning.*again"):
            model(**call, fused_lm_head=True)
    assert kept_with(model, **call) == prompt_alone(model, call)  # theirs hands this to ours
    install_pruning(model, SCHEDULE)
    assert kept_with(model, **call, fused_lm_head=True) == prompt_alone(model, call)
    remove_pruning(model)
    assert model.forward == theirs and pruning_of(model) is None
    expected = tiny_llava()(**call)
    assert torch.equal(model(**call).loss, expected.loss)  # what theirs holds of ours does nothing any more
    assert "generate" not in vars(model) and "forward" not in vars(model.model)
