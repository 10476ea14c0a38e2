"""The gradient of a keep ratio: against a naive decoder that moves the marginal tokens' bias, and real differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import RAGGED_ANSWERS, make_case
from naive import dropped_tokens, kept_count, naive_layer, naive_logits, naive_scores
from tiny import tiny_llava
from torch import Tensor

from himap_train import PruningSchedule, PruningStage, install_pruning, load_llava
from himap_train.data.batches import collate, pad_token_id_of
from himap_train.data.encode import Encoder
from himap_train.data.sources import open_source
from himap_train.models.features import hidden_states
from himap_train.models.install import change_schedule, running
from himap_train.models.loss import supervised_loss
from himap_train.models.versions import checkpoint_activations
from himap_train.pruning.learned.marginal import MARGINAL_SHARE

RATIOS = (1.0, 0.8, 0.6, 0.6, 0.3, 0.1)  # of the six layers; the fourth stage removes nothing


def every_layer(ratios: tuple[float, ...] | list[float], first: int = 1, switch: int = 3) -> PruningSchedule:
    """A stage at every layer from the first on."""
    criteria = ["instruction" if layer < switch else "image" for layer in range(len(ratios))]
    return PruningSchedule(
        tuple(PruningStage(layer, criteria[layer], ratios[layer]) for layer in range(first, len(ratios)))
    )


def gradient(model: Any, schedule: PruningSchedule, ratios: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of the summed loss by the ratios; and the loss."""
    leaf = torch.tensor(ratios, dtype=torch.float32, requires_grad=True)
    with running(model, schedule, leaf):
        loss, _ = supervised_loss(hidden_states(model, **inputs), inputs["labels"], model.lm_head)
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad, loss.detach()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("specs", [RAGGED_ANSWERS, ("t3 i40 t4 a3", "t2 i30 t3 a2 t2 i16 t3 a2")])
# So large a share that a row which begins with its image keeps more than one of its first tokens; see HIDDEN.
@pytest.mark.parametrize("given", [(), (PruningStage(0, "divprune", 0.95),)], ids=["alone", "behind a set"])
def test_against_a_naive_decoder(attn: str, specs: tuple[str, ...], given: tuple[PruningStage, ...]) -> None:
    """In a ragged batch with several images and turns: the derivative by each ratio, from central differences."""
    model = tiny_llava(attn=attn, layers=len(RATIOS))
    case, schedule = make_case(model, specs, seed=5), PruningSchedule((*given, *every_layer(RATIOS).stages))
    install_pruning(model, schedule)
    found, loss = gradient(model, schedule, RATIOS, case.inputs(labels=True))
    model.double()
    choices: dict[Any, Any] = {}
    assert float(loss) == pytest.approx(naive_sum(model, schedule, case, choices, 1, 0.0), rel=1e-4)
    expected = torch.zeros(len(RATIOS))
    step = 2e-3  # not smaller: RMSNorm runs in fp32 in any model
    for layer in range(1, len(RATIOS)):
        up, down = (naive_sum(model, schedule, case, choices, layer, sign * step) for sign in (1, -1))
        expected[layer] = (up - down) / (2 * step)
    assert expected[1:].abs().min() > 0.02  # every ratio matters here
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def naive_sum(
    model: Any, schedule: PruningSchedule, case: Any, choices: dict[Any, Any], moved: int, amount: float
) -> float:
    """Summed loss of a batch when the ratio of one layer moves, as far as its marginal tokens tell.

    `choices` remembers who stays and who is marginal from the first call on, which moves nothing: both follow scores.
    """
    is_image = case.input_ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(case.input_ids).detach()
    embeds = embeds.masked_scatter(is_image[..., None], torch.cat(case.features).to(embeds.dtype))
    total = 0.0
    for row in range(len(case.input_ids)):
        columns = case.columns(row)
        labels = case.labels[row, columns]
        chosen = choices.setdefault(row, {})
        states = naive_row(model, schedule, embeds[row, columns], is_image[row, columns], labels, chosen, moved, amount)
        for place in range(1, len(columns)):
            if int(labels[place]) != -100:
                total -= float(naive_logits(model, states[place - 1]).log_softmax(-1)[labels[place]].detach())
    return total


@torch.no_grad()
def naive_row(
    model: Any,
    schedule: Any,
    x: Tensor,
    is_image: Tensor,
    labels: Tensor,
    chosen: dict[int, tuple[Tensor, list[tuple[list[int], list[int]]]]],
    moved: int,
    amount: float,
) -> Tensor:
    """One row (T, D), whose stage at layer `moved` keeps `amount` of the image tokens more."""
    decoder, stages = model.model.language_model, {stage.layer: stage for stage in schedule.stages}
    positions, alive, weights = torch.arange(len(x)), torch.ones(len(x), dtype=torch.bool), torch.zeros(0)
    change = torch.zeros(len(x), dtype=x.dtype)  # by how much each token that stays is more present
    presence, gains = None, dict[int, float]()
    for number, layer in enumerate(decoder.layers):
        if number in stages:
            if number not in chosen:
                stage, before = stages[number], alive
                stay = alive & ~dropped_tokens(stage, weights, x, is_image, labels, len(x), alive)[0]
                sides = [
                    marginal(stage, weights, before, [p for p in tokens if stay[p]], tokens, labels)
                    if stage.method.ranks
                    else ([], [])
                    for tokens in turns(is_image, labels)
                ]
                chosen[number] = (stay, sides)
            alive, sides = chosen[number]
            change = change * (alive & is_image)
            presence, gains = alive.to(x.dtype) + change, {}
            for tokens, (last, first) in zip(turns(is_image, labels), sides, strict=True):
                wanted = amount * len(tokens) if number == moved else 0.0
                missing = wanted - float(change[tokens].sum())
                change[last] += missing / max(len(last), 1)  # for the stages behind
                share = 0.5 if last and first else 1.0
                presence[last] += share * missing / max(len(last), 1)
                gains |= {place: share * missing / len(first) for place in first}
        x, weights = naive_layer(layer, decoder.rotary_emb, x, positions, alive, presence, gains)
    return decoder.norm(x)


def turns(is_image: Tensor, labels: Tensor) -> list[list[int]]:
    """The image tokens of each turn."""
    found: dict[int, list[int]] = {}
    turn = 0
    for place in range(len(is_image)):
        if int(labels[place]) != -100 and (place == 0 or int(labels[place - 1]) == -100):
            turn += 1
        if is_image[place]:
            found.setdefault(turn, []).append(place)
    return list(found.values())


def marginal(
    stage: Any, weights: Tensor, before: Tensor, present: list[int], tokens: list[int], labels: Tensor
) -> tuple[list[int], list[int]]:
    """The last tokens that a stage keeps and the first that it drops, by the ranks that it gave."""
    number = max(round(MARGINAL_SHARE * len(tokens)), 1)
    assert len(present) == max(kept_count(stage, len(tokens)), len(present)) or not present
    supervised = [int(label) != -100 for label in labels]
    last = tokens[-1]
    end = next((p for p in range(last, len(labels)) if supervised[p]), len(labels))
    begin = max((p + 1 for p in range(tokens[0]) if supervised[p]), default=0)
    prompt = [p for p in range(begin, end) if not supervised[p]]
    text = [p for p in prompt if p not in tokens and p > tokens[0]] or [prompt[-1]]
    current = [p for p in tokens if before[p]]
    scores = naive_scores(stage.criterion, weights, current, text, len(present))
    protected = {p for p in tokens if p + 1 < len(labels) and supervised[p + 1]}
    ranked = sorted(current, key=lambda p: (p not in protected, -scores[p], p))
    cut = len(present)
    return ranked[max(cut - number, 0) : cut], ranked[cut : cut + number]


def test_the_forward_pass_is_the_hard_removal() -> None:
    """What the ratios add to it is zero; layers before the first stage run as without."""
    model = tiny_llava(layers=len(RATIOS))
    case, schedule = make_case(model, RAGGED_ANSWERS, seed=1), every_layer(RATIOS)
    install_pruning(model, schedule)
    plain = hidden_states(model, **case.inputs(labels=True))
    with running(model, schedule, torch.tensor(RATIOS, requires_grad=True)):
        torch.testing.assert_close(hidden_states(model, **case.inputs(labels=True)), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_then_two_backwards(checkpointing: bool) -> None:
    """Each adds its own gradient, computed again or not."""
    model = tiny_llava(layers=len(RATIOS))
    schedule = every_layer(RATIOS)
    install_pruning(model, schedule)
    cases = [make_case(model, RAGGED_ANSWERS, seed=seed) for seed in (1, 2)]
    alone = [gradient(model, schedule, RATIOS, case.inputs(labels=True))[0] for case in cases]
    if checkpointing:
        model.train()
        checkpoint_activations(model.model.language_model)
    leaf = torch.tensor(RATIOS, requires_grad=True)
    losses = []
    with running(model, schedule, leaf):
        for case in cases:
            hidden = hidden_states(model, **case.inputs(labels=True))
            losses.append(supervised_loss(hidden, case.labels, model.lm_head)[0])
    for loss in losses:
        loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, alone[0] + alone[1], rtol=1e-4, atol=1e-5)


def test_without_gradients_nothing_is_added() -> None:
    """Validation and generation run as if nothing were learned."""
    model = tiny_llava(layers=len(RATIOS))
    case, schedule = make_case(model, RAGGED_ANSWERS, seed=1), every_layer(RATIOS)
    install_pruning(model, schedule)
    plain = hidden_states(model, **case.inputs(labels=True))
    with running(model, schedule, torch.tensor(RATIOS, requires_grad=True)), torch.no_grad():
        assert torch.equal(hidden_states(model, **case.inputs(labels=True)), plain)


def test_sign_and_order_of_real_differences() -> None:
    """On the embedded model, averaged over questions: keeping more or less at one layer, loss against loss."""
    model, processor = load_llava("embedded")
    model.requires_grad_(False)
    ratios, apart, questions = [1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], 0.04, 192
    source, encoder = open_source(f"embedded:validation?scenes={questions}&seed=5"), Encoder(processor, 256)
    samples = [encoder.encode(source[index]) for index in range(questions)]  # type: ignore[index]
    batches = []
    for start in range(0, questions, 64):
        batch = collate(samples[start : start + 64], pad_token_id_of(processor.tokenizer))
        features = model.model.get_image_features(**batch["images"])
        kept = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        batches.append(kept | {"mm_encoder_outputs": {"image": features}})
    install_pruning(model, every_layer(ratios))
    found = torch.zeros(len(ratios))
    for batch in batches:
        found += gradient(model, every_layer(ratios), ratios, batch)[0]
    real = torch.zeros(len(ratios))
    for layer in range(1, 5):  # from the fifth on the loss hardly depends on how many stay
        up, down = (
            losses(model, every_layer([*ratios[:layer], ratios[layer] + move, *ratios[layer + 1 :]]), batches)
            for move in (apart, -apart)
        )
        real[layer] = (up - down) / (2 * apart)
    found, real = found[1:5], real[1:5]
    # Both are estimates from these questions: a difference that is small beside the largest may be noise.
    large = real.abs() > 0.5 * real.abs().max()
    assert large.sum() >= 2 and torch.equal(found.sign()[large], real.sign()[large]), (found, real)
    assert found.argmin() == real.argmin() and float(torch.corrcoef(torch.stack([found, real]))[0, 1]) > 0.7


@torch.no_grad()
def losses(model: Any, schedule: PruningSchedule, batches: list[dict[str, Any]]) -> float:
    """Summed over all batches."""
    change_schedule(model, schedule)
    return sum(
        float(supervised_loss(hidden_states(model, **batch), batch["labels"], model.lm_head)[0]) for batch in batches
    )
