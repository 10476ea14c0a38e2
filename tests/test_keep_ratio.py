"""What learns: the budget after every step, the optimum that steps find, and the plain schedule at the end."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlavaConfig

from himap_train import PruningSchedule, PruningStage
from himap_train.pruning.learned.ratios import KeepRatios

CONFIG = LlavaConfig(
    text_config=LlamaConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=12, num_attention_heads=8)
)
TOKENS = {"image_tokens": 576, "text_tokens": 115}


def learner(budget: float = 0.5, target: float | None = None, **changes: Any) -> KeepRatios:
    fields: dict[str, Any] = {"first_layer": 2, "switch_layer": 5} | TOKENS | changes
    ratios = KeepRatios(CONFIG, budget, **fields)
    ratios.target = budget if target is None else target
    return ratios


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(-10, 10), min_size=12, max_size=12), max_size=20), st.floats(0.35, 1.0))
def test_whatever_the_gradients_the_budget_is_met_and_ratios_never_grow(
    steps: list[list[float]], budget: float
) -> None:
    ratios = learner(0.35, budget)
    for gradient in steps:
        ratios.step(torch.tensor(gradient))
    found = ratios.ratios()
    assert (
        found[:2].tolist() == [1.0, 1.0] and bool((found[1:] <= found[:-1] + 1e-12).all()) and bool((found >= 0).all())
    )
    assert flops(found) == pytest.approx(budget, rel=1e-6)
    frozen = ratios.freeze()
    assert frozen.cost(CONFIG, **TOKENS).flops_ratio == pytest.approx(budget, rel=0.01)


@pytest.mark.parametrize(
    "value",
    [
        [0, 0, 8, 7, 9, 3, 6, 1, 1, 0.5, 0.2, 0.1],  # worth most early
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 9],  # what is needed late must not leave before
        [0, 0, 1, 1, 1, 1, 9, 1, 1, 1, 1, 1],
    ],
)
def test_steps_find_the_best_shares_of_a_known_loss(value: list[float]) -> None:
    """Loss linear in what each layer keeps: the optimum lies where tokens leave at two layers at most."""
    worth = torch.tensor(value, dtype=torch.float64)
    ratios = learner(0.5, step_size=0.1)
    noise = torch.Generator().manual_seed(0)
    for _ in range(600):
        ratios.step(-worth + 3 * torch.randn(12, generator=noise, dtype=torch.float64))
    found = float(worth @ ratios.ratios())
    assert found > 0.98 * max(float(worth @ kept) for kept in corner_schedules(0.5))


def corner_schedules(budget: float) -> list[Tensor]:
    """Keep ratios that meet a budget with tokens leaving at one or two layers, to a thousandth."""
    found = []
    layers = (*range(2, 12), None)
    for early, late in combinations(layers, 2):
        low, high = 0.0, 1.0
        for _ in range(30):
            share = (low + high) / 2
            low, high = (share, high) if flops(kept_when(early, late, share)) > budget else (low, share)
        if abs(flops(kept_when(early, late, high)) - budget) < 1e-3:
            found.append(kept_when(early, late, high))
    assert len(found) > 5
    return found


def kept_when(early: int, late: int | None, share: float) -> Tensor:
    """`share` of the tokens leave early, the rest late, or never."""
    kept = torch.ones(12, dtype=torch.float64)
    kept[early:] = 1 - share
    if late is not None:
        kept[late:] = 0
    return kept


def flops(kept: Tensor) -> float:
    """Prefill relative to dense, by the formula of the design."""
    tokens, width, inner = 115 + 576 * kept, 256, 688
    layer = tokens * (4 * width**2 + 3 * width * inner) + 2 * tokens**2 * width
    dense = 691 * (4 * width**2 + 3 * width * inner) + 2 * 691**2 * width
    return float(layer.sum() / (12 * dense))


def test_dense_at_first_and_the_same_on_every_rank() -> None:
    ratios = learner(target=1.0)
    assert ratios.ratios().tolist() == [1.0] * 12 and ratios.freeze().stages == ()
    gradients = torch.randn(10, 12, generator=torch.Generator().manual_seed(1))
    one, other = learner(), learner()
    for gradient in gradients:
        one.step(gradient)
        other.step(gradient.clone())
    assert torch.equal(one.ratios(), other.ratios())


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    ratios = learner()
    before = ratios.ratios()
    ratios.step(torch.full((12,), torch.nan))
    assert torch.equal(ratios.ratios(), before)
    ratios.step(torch.randn(12))  # and is not remembered
    assert bool(torch.isfinite(ratios.ratios()).all()) and not torch.equal(ratios.ratios(), before)


def test_state_goes_on_where_it_was() -> None:
    gradients = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    whole, first, second = learner(), learner(), learner()
    for gradient in gradients:
        whole.step(gradient)
    for gradient in gradients[:4]:
        first.step(gradient)
    second.load_state_dict(first.state_dict())
    for gradient in gradients[4:]:
        second.step(gradient)
    assert torch.equal(second.ratios(), whole.ratios())


def test_frozen_stages_are_few_and_ranked_by_their_layer() -> None:
    """Shares that leave at layers 3 and 7 give two stages; with a wide tolerance, one."""
    ratios = learner(0.5)
    ratios._weights[:] = -30.0
    for layer, weight in ((3, 0.0), (7, 0.0)):
        ratios._weights[layer - 2] = weight
    ratios._weights[-1] = 0.0
    frozen = ratios.freeze(tolerance=0.02)
    assert [(stage.layer, stage.criterion) for stage in frozen.stages] == [(3, "instruction"), (7, "image")]
    assert len(learner(0.5).freeze(tolerance=0.0).stages) == 10
    assert len(learner(0.5).freeze(tolerance=0.3).stages) < 5


def test_a_start_is_where_the_ratios_begin() -> None:
    """Its shape at its own cost, a tenth of the shares aside; nothing is impossible from there."""
    stages = (PruningStage(3, "instruction", 0.5), PruningStage(7, "image", 0.2))
    start = PruningSchedule(stages)
    ratios = learner(start.cost(CONFIG, **TOKENS).flops_ratio, start=start)
    expected = torch.tensor([1.0] * 3 + [0.5] * 4 + [0.2] * 5, dtype=torch.float64)
    torch.testing.assert_close(ratios.ratios(), expected, atol=0.06, rtol=0)
    for _ in range(300):
        ratios.step(-torch.nn.functional.one_hot(torch.tensor(11), 12).double())
    assert ratios.ratios()[11] > 0.4
    found = [(stage.layer, stage.criterion) for stage in learner(0.5, start=start).freeze(0.05).stages]
    assert found == [(3, "instruction"), (7, "image")]


GIVEN = PruningStage(0, "divprune", 0.6)


def test_what_leaves_before_the_first_layer_is_given() -> None:
    ratios = learner(0.4, start=PruningSchedule((GIVEN, PruningStage(6, "image", 0.3))))
    before = ratios.ratios()
    assert before[:3].tolist() == pytest.approx([0.6, 0.6, 0.6], abs=0.02) and float(before[6]) < 0.4
    # What choosing costs at layer 0 is part of the budget; 0.6 of 576 tokens are 345.6.
    choosing = PruningSchedule((GIVEN,)).cost(CONFIG, **TOKENS).flops_ratio - flops(torch.full((12,), 346 / 576))
    assert choosing > 0.005 and flops(before) + choosing == pytest.approx(0.4, rel=1e-6)
    gradient = torch.zeros(12)
    gradient[2] = -1.0  # more tokens at the first layer that learns would help
    for _ in range(30):
        ratios.step(gradient)
    after = ratios.ratios()
    assert after[:2].tolist() == [0.6, 0.6] and float(after[4]) > float(before[4]) - 1e-6
    assert flops(after) + choosing == pytest.approx(0.4, rel=1e-6)
    assert ratios.schedule(after).stages[0] == GIVEN
    frozen = ratios.freeze()
    assert frozen.stages[0] == GIVEN
    assert frozen.cost(CONFIG, **TOKENS).flops_ratio == pytest.approx(0.4, rel=0.01)


def test_nothing_is_removed_twice_and_positions_are_those_of_the_start() -> None:
    start = PruningSchedule((GIVEN, PruningStage(10, "image", 0.0)), positions="renumber")
    least = PruningSchedule((GIVEN, PruningStage(10, "image", 0.0))).cost(CONFIG, **TOKENS).flops_ratio
    ratios = learner(least + 0.001, first_layer=10, switch_layer=10, start=start)
    frozen = ratios.freeze()
    kept = [stage.keep_ratio for stage in frozen.stages]
    assert kept == sorted(set(kept), reverse=True) and len(kept) == 2
    assert frozen.positions == ratios.schedule(ratios.ratios()).positions == "renumber"
    with pytest.raises(ValueError, match="is below what remains when every image token leaves"):
        learner(least - 0.01, first_layer=10, switch_layer=10, start=start)


@pytest.mark.parametrize(("tokens", "given"), [((16, 8), 0.1), ((16, 8), 0.05), ((49, 10), 0.3), ((64, 20), 0.01)])
def test_small_images_have_no_stage_that_removes_nothing_and_what_is_given_stays(
    tokens: tuple[int, int], given: float
) -> None:
    stage = PruningStage(0, "divprune", given)
    sample = dict(zip(TOKENS, tokens, strict=True))
    least, most = (
        PruningSchedule((stage, *more)).cost(CONFIG, **sample).flops_ratio
        for more in ((PruningStage(2, "image", 0.0),), ())
    )
    for share in (0.1, 0.3, 0.5):
        frozen = learner(least + share * (most - least), start=PruningSchedule((stage,)), **sample).freeze()
        counts = [round((one.keep_ratio or 0.0) * tokens[0]) for one in frozen.stages[1:]]
        assert frozen.stages[0] == stage and len(set(counts)) == len(counts)


@pytest.mark.parametrize("tolerance", [0.02, 0.3])
def test_what_is_frozen_meets_the_budget_where_little_is_left_to_remove(tolerance: float) -> None:
    """The given stage nearly meets it: all that is learned differs by less than the tolerance."""
    within = flops(torch.full((12,), 0.6, dtype=torch.float64))
    ratios = learner(within - 0.03, start=PruningSchedule((GIVEN, PruningStage(6, "image", 0.58))))
    frozen = ratios.freeze(tolerance)
    assert frozen.stages[0] == GIVEN and len(frozen.stages) > 1
    assert frozen.cost(CONFIG, **TOKENS).flops_ratio <= within - 0.03 + 0.006


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.1}, "at least 0.270"),
        ({"budget": 1.5}, "above 1"),
        ({"switch_layer": 12}, "switch_layer is 12; expected a layer of the decoder, 1 to 11"),
        ({"first_layer": 0}, "first_layer is 0"),
        ({"first_layer": 6}, "lies before first_layer"),
        ({"start": PruningSchedule((PruningStage(0, "divprune", 0.2),))}, r"budget 0.5 is above 0\.273.*higher ratios"),
        ({"start": PruningSchedule((PruningStage(1, "image", keep_count=9),))}, "expected a keep_ratio in each"),
        ({"start": PruningSchedule((PruningStage(1, "image", 0.0),))}, "above 0 before first_layer 2"),
        ({"start": PruningSchedule((PruningStage(3, "learned", 0.5),))}, "no learned ranking from there on"),
        ({"start": PruningSchedule((PruningStage(12, "image", 0.5),))}, "stage at layer 12"),
        ({"deep": "imge"}, "did you mean 'image'"),
        ({"start": PruningSchedule((PruningStage(3, "image", 0.5),), enter=2)}, "image tokens enter at layer 2"),
        ({"image_tokens": 0}, "no record has an image"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(**changes)
