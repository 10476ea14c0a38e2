"""A LLaVA with pruning installed, called as its users and trainers call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import RAGGED, RAGGED_ANSWERS, make_case
from checks import STATES, assert_equals_naive, assert_same_kept, run, two_stages
from naive import naive_forward, naive_loss
from peft import LoraConfig, get_peft_model
from tiny import tiny_llava
from torch.nn.functional import cross_entropy

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning, remove_pruning
from himap_train.models.features import hidden_states
from himap_train.models.install import change_schedule, pruning_of, running
from himap_train.pruning.reading import fitted_schedule

pytestmark = pytest.mark.core


@pytest.mark.parametrize("side", ["left", "right"])
def test_model_call_has_full_length_and_the_loss_of_the_oracle(side: str) -> None:
    model = tiny_llava()
    case, plan = make_case(model, RAGGED_ANSWERS, side), two_stages()
    install_pruning(model, plan)
    with torch.no_grad():
        out = model(**case.inputs(labels=True))
        expected = naive_loss(model, naive_forward(model, plan, **case.naive(labels=True)).hidden, case.labels)
    assert out.logits.shape[:2] == case.input_ids.shape
    torch.testing.assert_close(out.loss, expected, **STATES)
    shifted = cross_entropy(out.logits[:, :-1].flatten(0, 1), case.labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, shifted, **STATES)


def test_pixels_and_precomputed_features_give_the_same() -> None:
    model = install_pruning(tiny_llava(), two_stages())
    case = make_case(model, ["t3 i16 t4", "t9", "t1 i16 t2 i16 t3"], "left")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        case.features = list(model.get_image_features(pixels).pooler_output)
        expected = naive_forward(model, two_stages(), **case.naive())
        texts = {"input_ids": case.input_ids, "attention_mask": case.attention_mask}
        with record_pruning(model) as trace:
            states = hidden_states(model, **texts, images={"pixel_values": pixels})
        logits = model(**texts, pixel_values=pixels).logits
    assert_same_kept(trace.kept, expected.kept)
    mask = case.attention_mask.bool()
    torch.testing.assert_close(states[mask], expected.hidden[mask], **STATES)
    torch.testing.assert_close(logits[mask], model.lm_head(expected.hidden)[mask], atol=1e-3, rtol=1e-4)


def test_train_and_eval_are_the_same_to_the_last_bit() -> None:
    model = install_pruning(tiny_llava(), two_stages())
    case = make_case(model, RAGGED_ANSWERS)
    expected = model.eval()(**case.inputs(labels=True))
    found = model.train()(**case.inputs(labels=True))
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert_same_kept(run(model.train(), case, labels=True)[1], run(model.eval(), case, labels=True)[1])


def test_pruning_does_not_depend_on_hooks() -> None:
    model = install_pruning(tiny_llava(), two_stages())
    case = make_case(model, RAGGED)
    before, kept_before = run(model, case)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
    after, kept_after = run(model, case)
    assert torch.equal(before, after)
    assert_same_kept(kept_after, kept_before)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_is_in_the_scores(order: str) -> None:
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|k|v|o)_proj", init_lora_weights=False)
    base, plan = tiny_llava(), two_stages()
    if order == "before":
        install_pruning(base, plan)
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    if order == "after":
        assert install_pruning(model, plan) is model
    case = make_case(base, RAGGED, "left")
    with torch.no_grad():
        expected = naive_forward(base, plan, **case.naive())
        without = naive_forward(tiny_llava(), plan, **case.naive())
    states, kept = run(model, case)
    assert_same_kept(kept, expected.kept)
    mask = case.attention_mask.bool()
    torch.testing.assert_close(states[mask], expected.hidden[mask], **STATES)
    assert any(a.tolist() != b.tolist() for a, b in zip(kept[0], without.kept[0], strict=True))
    remove_pruning(model)
    assert pruning_of(model) is None


def test_counts_of_the_last_forward() -> None:
    model = install_pruning(tiny_llava(), two_stages())
    pruning = pruning_of(model)
    assert pruning is not None and pruning.last is None and pruning.schedule == two_stages()
    run(model, make_case(model, RAGGED))
    assert (pruning_of(model).last.image_tokens, list(pruning_of(model).last.kept)) == (16 + 25 + 7 + 12, [31, 8])
    run(model, make_case(model, ["t4"]))
    assert (pruning_of(model).last.image_tokens, list(pruning_of(model).last.kept)) == (0, [0, 0])


def test_changed_schedule_runs_from_the_next_forward_on() -> None:
    """On what is installed: a trace that records goes on."""
    model = install_pruning(tiny_llava(), two_stages("last_token", "stride"))
    case, installed = make_case(model, RAGGED), pruning_of(model)
    run(model, case)
    change_schedule(model, two_stages())
    assert pruning_of(model) is installed
    assert_equals_naive(model, two_stages(), case)
    with pytest.raises(ValueError, match="decoder has layers 0 to 5"):
        change_schedule(model, PruningSchedule((PruningStage(9, "image", 0.5),)))
    with pytest.raises(ValueError, match="install_pruning"):
        change_schedule(remove_pruning(model), two_stages())


def test_another_schedule_runs_inside_a_block_only() -> None:
    """Also where it ends in an error; its counts stay."""
    own = two_stages("last_token", "stride")
    model = install_pruning(tiny_llava(), own)
    case, installed, ratios = make_case(model, RAGGED), pruning_of(model), torch.ones(6)
    run(model, case)
    with pytest.raises(KeyError), running(model, two_stages(), ratios):
        assert (installed.schedule, installed.ratios, installed.last) == (two_stages(), ratios, None)
        with running(model, PruningSchedule()):
            assert installed.schedule == PruningSchedule() and installed.ratios is None
        assert installed.schedule == two_stages() and installed.ratios is ratios
        run(model, case)
        raise KeyError
    assert installed.schedule == own and installed.ratios is None and installed.last.kept == [31, 8]
    with pytest.raises(ValueError, match="decoder has layers 0 to 5"):
        with running(model, PruningSchedule((PruningStage(9, "image", 0.5),))):
            pass
    assert installed.schedule == own


@pytest.mark.parametrize(
    "given", ["vtw", {"stages": [{"layer": 2, "criterion": "image", "keep_ratio": 0.5}]}, None], ids=str
)
def test_schedules_by_name_mapping_or_none(given: Any) -> None:
    model = install_pruning(tiny_llava(), given)
    assert pruning_of(model).schedule == fitted_schedule(given, 6)
    with pytest.raises(ValueError, match="did you mean 'himap'"):
        install_pruning(model, "himpa")
    assert pruning_of(model).schedule == fitted_schedule(given, 6)


def test_a_compiled_model_prunes_through_either_name() -> None:
    model = tiny_llava()
    compiled: Any = torch.compile(model, backend="eager")
    install_pruning(compiled, two_stages())
    case = make_case(model, RAGGED)
    with torch.no_grad():
        pruned, through = (called(**case.inputs()).logits for called in (model, compiled))
        assert pruning_of(compiled) is pruning_of(model) is not None
        remove_pruning(compiled)
        stock, again = (called(**case.inputs()).logits for called in (model, compiled))
    assert torch.allclose(through, pruned, atol=1e-5) and torch.allclose(again, stock, atol=1e-5)
    assert pruning_of(model) is None and not torch.allclose(pruned, stock, atol=1e-3)


def test_layers_on_several_gpus_are_refused() -> None:
    model = tiny_llava()
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1, "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"layers lie on several GPUs \(0, 1, by its device_map\)"):
        install_pruning(model, two_stages())
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    assert pruning_of(install_pruning(model, two_stages())) is not None


def test_installing_again_replaces_the_schedule() -> None:
    model = install_pruning(tiny_llava(), two_stages("last_token", "stride"))
    case = make_case(model, RAGGED)
    run(model, case)
    assert_equals_naive(model, two_stages(), case)


def test_inner_model_and_decoder_called_directly_prune_as_the_whole_does() -> None:
    """Fused losses and other trainers call them."""
    model = install_pruning(tiny_llava(), two_stages())
    case = make_case(model, RAGGED_ANSWERS, "right")
    supervised = case.labels != -100
    with torch.no_grad(), record_pruning(model) as trace:
        states = hidden_states(model, **case.inputs(labels=True))
        expected = trace.kept
        inner = model.model(**case.inputs(), supervised_mask=supervised).last_hidden_state
        assert torch.equal(inner, states)
        assert_same_kept(trace.kept, expected)
        where = case.input_ids == model.config.image_token_id
        embeds = model.get_input_embeddings()(case.input_ids)
        embeds = embeds.masked_scatter(where[..., None], torch.cat(case.features))
        masks = {"attention_mask": case.attention_mask, "supervised_mask": supervised}
        decoder = model.model.language_model
        assert torch.equal(decoder(inputs_embeds=embeds, image_token_mask=where, **masks).last_hidden_state, states)
        text = make_case(model, ["t9", "t4"], "right")
        assert decoder(input_ids=text.input_ids, attention_mask=text.attention_mask).last_hidden_state.any()
        decoder(input_ids=case.input_ids, **masks)  # placeholders without features are image tokens all the same
        images = [int((case.input_ids[b, row] == 4).sum()) for b, row in enumerate(trace.kept[0])]
        assert images == [8, 0, 13, 4, 6]
