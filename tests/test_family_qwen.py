"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: bit-equal to stock where nothing leaves, and to a naive decoder where it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from naive_qwen import naive_qwen, row_positions
from tiny_qwen import IMAGE_ID, KINDS, RAGGED, RAGGED_ANSWERS, VIDEO_ID, QwenCase, make_case, tiny_qwen
from torch import Tensor

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning, remove_pruning
from himap_train.models.features import hidden_states
from himap_train.models.install import running
from himap_train.models.loss import supervised_loss

pytestmark = pytest.mark.core

STATES = {"atol": 1e-4, "rtol": 1e-4}
LOGITS = {"atol": 1e-3, "rtol": 1e-3}


def schedule(*stages: tuple[int, str, float], enter: int = 0) -> PruningSchedule:
    return PruningSchedule(tuple(PruningStage(*stage) for stage in stages), enter=enter)


TWO = schedule((2, "instruction", 0.5), (4, "image", 0.125))
SCHEDULES = {
    "himap": TWO,
    "every-layer-of-deepstack": schedule((1, "instruction", 0.75), (2, "image", 0.5), (3, "last_token", 0.25)),
    "before-the-decoder": schedule((0, "stride", 0.5), (2, "instruction", 0.25)),
    "first-k": schedule((0, "first-k", 0.6), (1, "image", 0.3), (5, "instruction", 0.0)),
    "pooled": schedule((0, "average-pool", 0.75), (1, "average-pool", 0.25), (3, "instruction", 0.125)),
    "nothing-left": schedule((0, "stride", 0.0)),
    "enter-1": schedule((3, "instruction", 0.5), enter=1),
    "enter-2": schedule((2, "stride", 0.75), (4, "image_debiased", 0.25), enter=2),
    "enter-3": schedule(enter=3),
}


def run(model: Any, case: QwenCase, labels: bool = False) -> tuple[Tensor, list[list[Tensor]]]:
    with torch.no_grad(), record_pruning(model) as trace:
        targets = case.labels if labels else None
        states = hidden_states(
            model, input_ids=case.input_ids, attention_mask=case.attention_mask, images=case.images(), labels=targets
        )
    return states, trace.kept


def as_lists(kept: list[list[Tensor]]) -> list[list[list[int]]]:
    return [[row.tolist() for row in stage] for stage in kept]


def assert_equals_naive(
    model: Any, kind: str, plan: PruningSchedule, case: QwenCase, labels: bool = False
) -> list[list[Tensor]]:
    with torch.no_grad():
        expected, expected_kept = naive_qwen(model, kind, plan, case, labels)
    states, kept = run(install_pruning(model, plan), case, labels)
    assert as_lists(kept) == as_lists(expected_kept)
    mask = case.attention_mask.bool()
    torch.testing.assert_close(states[mask], expected[mask], **STATES)
    return kept


# Nothing leaves.


def install_empty(model: Any) -> None:
    install_pruning(model, PruningSchedule())


def keep_all(model: Any) -> None:
    install_pruning(model, schedule((0, "stride", 1.0), (1, "instruction", 1.0), (2, "image", 1.0), (4, "image", 1.0)))


def install_and_remove(model: Any) -> None:
    install_pruning(model, SCHEDULES["before-the-decoder"])
    model.generate(**make_case(RAGGED, "left").inputs(), max_new_tokens=2, do_sample=False)
    remove_pruning(model)
    model.model.rope_deltas = None


def everything(model: Any, side: str) -> dict[str, Tensor]:
    """Logits, loss, gradients and generated ids with their scores."""
    case, prompt = make_case(RAGGED_ANSWERS, side), make_case(RAGGED, "left")
    out = model(**case.inputs(labels=True))
    out.loss.backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {"logits": out.logits[case.attention_mask.bool()], "loss": out.loss}
    for name, options in (("greedy", {}), ("beams", {"num_beams": 2}), ("drawn", {"do_sample": True})):
        torch.manual_seed(3)
        given = {"max_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True, "do_sample": False}
        made = model.generate(**prompt.inputs(), **(given | options))
        found |= {f"ids, {name}": made.sequences, f"scores, {name}": torch.stack(made.scores)}
    return found


@pytest.mark.parametrize("change", [install_empty, keep_all, install_and_remove])
@pytest.mark.parametrize(("attn", "side"), [("sdpa", "left"), ("eager", "right")])
@pytest.mark.parametrize("kind", KINDS)
def test_bit_identical_to_stock(kind: str, attn: str, side: str, change: Any) -> None:
    model = tiny_qwen(kind, layers=5, attn=attn)
    change(model)
    found = everything(model, side)
    expected = everything(tiny_qwen(kind, layers=5, attn=attn), side)
    assert found.keys() == expected.keys() and len(expected) > 60
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert found[
        "gradient of model.visual.merger." + ("linear_fc1" if kind == "qwen3_vl" else "mlp.0") + ".weight"
    ].any()


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_read_as_the_stock_decoder_does(kind: str) -> None:
    """One number a token, three axes, the text's before them, one row for all axes, none at all."""
    model = tiny_qwen(kind)
    embeds = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(1))
    axes = torch.randint(0, 30, (3, 2, 12), generator=torch.Generator().manual_seed(2))
    text = torch.arange(12).expand(2, -1)
    mask = torch.ones(2, 12, dtype=torch.long)
    forms = (None, axes[0], axes, axes[:1], torch.cat([text[None], axes]))
    decoder = model.model.language_model
    with torch.no_grad():
        expected = [decoder(inputs_embeds=embeds, position_ids=p, attention_mask=mask)[0] for p in forms]
        keep_all(model)
        image = torch.zeros(2, 12, dtype=torch.bool)
        image[:, 3:9] = True
        for form, states in zip(forms, expected, strict=True):
            given = {"inputs_embeds": embeds, "attention_mask": mask, "image_token_mask": image}
            found = decoder(position_ids=form, **given).last_hidden_state
            assert torch.equal(found, states), None if form is None else form.shape
    assert not torch.equal(expected[0], expected[2])


@pytest.mark.parametrize("kind", KINDS)
def test_stale_deltas_of_a_generation_change_nothing(kind: str) -> None:
    """The stock model keeps them on the module."""
    model, case, text = install_pruning(tiny_qwen(kind), TWO), make_case(RAGGED_ANSWERS), make_case(("t9", "t4"))
    before, plain = run(model, case)[0], run(model, text)[0]
    model.generate(**make_case(("i4x4 t3",)).inputs(), max_new_tokens=3, do_sample=False)
    assert model.model.rope_deltas is not None
    assert torch.equal(run(model, text)[0], plain)
    assert torch.equal(run(model, case)[0], before)


# Tokens leave.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_stages_the_oracle_is_the_stock_model(kind: str, attn: str, side: str) -> None:
    model, case = tiny_qwen(kind, attn=attn), make_case(RAGGED, side)
    with torch.no_grad():
        stock = model.model(**case.inputs()).last_hidden_state
        naive, _ = naive_qwen(model, kind, PruningSchedule(), case)
    mask = case.attention_mask.bool()
    torch.testing.assert_close(naive[mask], stock[mask], **STATES)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "labels"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batch_equals_the_oracle(kind: str, name: str, labels: bool, side: str) -> None:
    case = make_case(RAGGED_ANSWERS if labels else RAGGED, side)
    kept = assert_equals_naive(tiny_qwen(kind), kind, SCHEDULES[name], case, labels)
    if name == "himap":
        images = [[int((case.input_ids[b, row] == IMAGE_ID).sum()) for b, row in enumerate(stage)] for stage in kept]
        assert images == [[6, 0, 6, 3, 5], [2, 0, 2, 1, 1]]  # half up of 12, 0, 12, 5, 9


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_equal_the_row_alone(kind: str) -> None:
    model = install_pruning(tiny_qwen(kind), SCHEDULES["before-the-decoder"])
    for side, rows, labels in (("left", RAGGED, False), ("right", RAGGED_ANSWERS, True)):
        case = make_case(rows, side)
        states, kept = run(model, case, labels)
        for b, spec in enumerate(rows):
            alone, alone_kept = run(model, make_case([spec], seed=b), labels)
            columns = case.columns(b)
            torch.testing.assert_close(states[b, columns], alone[0], **STATES)
            offset = int(columns[0])
            assert [(stage[b] - offset).tolist() for stage in kept] == [stage[0].tolist() for stage in alone_kept]


@pytest.mark.parametrize("kind", KINDS)
def test_inner_model_and_decoder_prune_as_the_whole_model(kind: str) -> None:
    plan = SCHEDULES["before-the-decoder"]
    model, case = install_pruning(tiny_qwen(kind), plan), make_case(RAGGED, "left")
    with torch.no_grad():
        logits = model(**case.inputs()).logits
        inner = model.model(**case.inputs()).last_hidden_state
        assert torch.equal(model.lm_head(inner), logits)
        where = case.input_ids == IMAGE_ID
        encoded = model.get_image_features(**case.images(), return_dict=True)
        embeds = model.get_input_embeddings()(case.input_ids)
        embeds = embeds.masked_scatter(where[..., None], torch.cat(list(encoded.pooler_output)))
        positions = torch.zeros(3, *case.input_ids.shape, dtype=torch.long)
        for b in range(len(RAGGED)):
            columns = case.columns(b)
            positions[:, b, columns] = row_positions(case.input_ids[b, columns].tolist(), case.grids[case.own(b)])
        given: dict[str, Any] = {"position_ids": positions, "attention_mask": case.attention_mask}
        if kind == "qwen3_vl":
            planes = [torch.cat(list(plane)) for plane in encoded.deepstack_features]
            given |= {"visual_pos_masks": where, "deepstack_visual_embeds": planes}
        direct = model.model.language_model(inputs_embeds=embeds, image_token_mask=where, **given).last_hidden_state
    assert torch.equal(direct, inner)


@pytest.mark.parametrize("name", ["himap", "every-layer-of-deepstack", "before-the-decoder", "enter-1"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_oracle_with_and_without_checkpointing(kind: str, name: str) -> None:
    plan, case = SCHEDULES[name], make_case(RAGGED_ANSWERS, dtype=torch.float64)

    def gradients(model: Any, states: Tensor) -> dict[str, Tensor]:
        rows = case.labels[:, 1:] != -100
        logits = model.lm_head(states[:, :-1][rows])
        torch.nn.functional.cross_entropy(logits, case.labels[:, 1:][rows]).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    oracle = tiny_qwen(kind).double()
    expected = gradients(oracle, naive_qwen(oracle, kind, plan, case, labels=True)[0])
    deepstack = [name for name in expected if "deepstack" in name and expected[name].any()]
    assert bool(deepstack) == (kind == "qwen3_vl")
    for checkpointing in (False, True):
        model = install_pruning(tiny_qwen(kind).double(), plan).train()
        if checkpointing:
            model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        states = hidden_states(
            model, input_ids=case.input_ids, attention_mask=case.attention_mask, images=case.images(),
            labels=case.labels,
        )  # fmt: skip
        found = gradients(model, states)
        assert found.keys() == expected.keys()
        for parameter, value in expected.items():
            torch.testing.assert_close(found[parameter], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_learned_ratios_get_a_gradient_and_leave_the_loss(kind: str) -> None:
    """What a ratio's gradient needs runs beside the tokens, past DeepStack's planes too."""
    given = (1.0, 0.8, 0.6, 0.5, 0.3, 0.1)
    ratios = torch.tensor(given, requires_grad=True)
    plan = schedule(*((layer, "instruction", given[layer]) for layer in range(1, 6)))
    model, case = install_pruning(tiny_qwen(kind), plan), make_case(RAGGED_ANSWERS)
    with torch.no_grad():  # a token that runs beside the others is hidden by a bias, which larger logits would undo
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight *= 0.3
    plain, _ = run(model, case, labels=True)
    with running(model, plan, ratios):
        states = hidden_states(
            model, input_ids=case.input_ids, attention_mask=case.attention_mask, images=case.images(),
            labels=case.labels,
        )  # fmt: skip
    rows = case.attention_mask.bool()
    torch.testing.assert_close(states[rows], plain[rows], **STATES)
    loss, _ = supervised_loss(states, case.labels, model.lm_head)
    loss.backward()
    assert ratios.grad is not None and ratios.grad[1:].isfinite().all() and ratios.grad[1:].abs().min() > 0


# Decoding.


def naive_greedy(model: Any, kind: str, plan: PruningSchedule, case: QwenCase, steps: int) -> Tensor:
    made = case.input_ids[:, :0]
    for _ in range(steps):
        with torch.no_grad():
            states, _ = naive_qwen(model, kind, plan, case, more=made)
            made = torch.cat([made, model.lm_head(states[:, -1]).argmax(-1, keepdim=True)], dim=1)
    return made


@pytest.mark.parametrize("name", ["himap", "every-layer-of-deepstack", "before-the-decoder", "enter-2", "enter-3"])
@pytest.mark.parametrize("kind", KINDS)
def test_generating_equals_the_oracle(kind: str, name: str) -> None:
    # Behind a prompt that ends in an image stock `generate` counts on in each axis, not from the largest number.
    rows = (*RAGGED[:-1], "t5 i3x3 t1")
    plan, case, steps = SCHEDULES[name], make_case(rows, "left", seed=2), 4
    model = tiny_qwen(kind)
    expected = naive_greedy(model, kind, plan, case, steps)
    made = install_pruning(model, plan).generate(**case.inputs(), max_new_tokens=steps, do_sample=False)
    assert made[:, case.input_ids.shape[1] :].tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["himap", "before-the-decoder", "enter-2"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_step_by_step_equals_the_oracle(kind: str, name: str) -> None:
    """Without position numbers: the model counts on from the prompt's by itself."""
    plan, case = SCHEDULES[name], make_case(RAGGED, "left")
    tokens = torch.randint(7, 263, (len(RAGGED), 5), generator=torch.Generator().manual_seed(4))
    model = tiny_qwen(kind)
    prompt = case.input_ids.shape[1]
    with torch.no_grad():
        states, _ = naive_qwen(model, kind, plan, case, more=tokens)
        expected = model.lm_head(states[:, prompt - 1 :])
        install_pruning(model, plan)
        for chunk in (1, 2):
            out = model(**case.inputs(), use_cache=True)
            logits, mask = [out.logits[:, -1:]], case.attention_mask
            assert out.past_key_values.get_seq_length() == prompt
            for start in range(0, 5, chunk):
                part = tokens[:, start : start + chunk]
                mask = torch.cat([mask, torch.ones_like(part)], dim=1)
                cache = out.past_key_values
                out = model(input_ids=part, attention_mask=mask, past_key_values=cache, use_cache=True)
                logits.append(out.logits)
            torch.testing.assert_close(torch.cat(logits, dim=1), expected, **LOGITS)


@pytest.mark.parametrize("kind", KINDS)
def test_beams_of_a_batch_equal_those_of_the_row_alone(kind: str) -> None:
    model = install_pruning(tiny_qwen(kind), SCHEDULES["before-the-decoder"])
    case = make_case(RAGGED, "left")
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    made = model.generate(**case.inputs(), **options)[:, case.input_ids.shape[1] :].reshape(len(RAGGED), 3, 4)
    for row, spec in enumerate(RAGGED):
        alone = make_case([spec], seed=row)
        found = model.generate(**alone.inputs(), **options)[:, alone.input_ids.shape[1] :]
        assert found.tolist() == made[row].tolist(), spec


@pytest.mark.parametrize("kind", KINDS)
def test_cache_holds_what_each_stage_kept(kind: str) -> None:
    case = make_case(["t3 i3x4 t4"])
    for plan, lengths in (
        (TWO, [19, 19, 13, 13, 9, 9]),
        (SCHEDULES["before-the-decoder"], [13, 13, 10, 10, 10, 10]),
        (SCHEDULES["enter-2"], [7, 7, 16, 16, 10, 10]),
    ):
        model = install_pruning(tiny_qwen(kind), plan)
        made = model.generate(**case.inputs(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        assert [layer.keys.shape[-2] for layer in made.past_key_values.layers] == [n + 2 for n in lengths]


# What is refused.


def given_wrongly(case: QwenCase) -> dict[str, tuple[dict[str, Any], str]]:
    video = torch.randn(8, 96)
    ids = case.input_ids.clone()
    ids[0, 0] = VIDEO_ID
    return {
        "videos": ({"pixel_values_videos": video}, "images and text, but there are pixel_values_videos"),
        "grid": ({"video_grid_thw": torch.tensor([[2, 2, 2]])}, "video_grid_thw"),
        "video tokens": ({"input_ids": ids}, "video tokens in input_ids"),
        "audio": ({"audio_values": video}, "audio_values"),
        "typo": ({"image_tokens_mask": ids == IMAGE_ID}, "image_tokens_mask means nothing"),
        "packed": ({"cu_seq_lens_q": torch.tensor([0, 4])}, "packed rows .cu_seq_lens_q."),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_understood_is_refused_by_name(kind: str) -> None:
    model, case = install_pruning(tiny_qwen(kind), TWO), make_case(["t3 i3x4 t4"])
    for given, message in given_wrongly(case).values():
        with pytest.raises(ValueError, match=message):
            model(**{**case.inputs(), **given})
    with pytest.raises(ValueError, match=f"family {'qwen3_vl' if kind == 'qwen3_vl' else 'qwen2_vl'}"):
        model(**case.inputs(), pixel_values_videos=torch.randn(8, 96))
    allowed = {"num_items_in_batch": 3, "return_dict": True, "output_attentions": False, "output_hidden_states": True}
    with torch.no_grad():
        plain = model(**case.inputs()).logits
        assert torch.equal(model(**case.inputs(), **allowed).logits, plain)
        torch.testing.assert_close(model(**case.inputs(), logits_to_keep=2).logits, plain[:, -2:], **LOGITS)


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_the_family_cannot_serve_are_refused(kind: str) -> None:
    plan = PruningSchedule((PruningStage(2, "instruction", 0.5),), positions="renumber")
    with pytest.raises(ValueError, match="'renumber' is not defined for family qwen"):
        install_pruning(tiny_qwen(kind), plan)
    case = make_case(["t3 i3x4 t4"])
    if kind != "qwen3_vl":
        model = install_pruning(tiny_qwen(kind), TWO)
        with pytest.raises(ValueError, match="deepstack_visual_embeds means nothing to .* family qwen2_vl"):
            model.model(**case.inputs(), deepstack_visual_embeds=[torch.zeros(12, 48)])
