"""A ranking that is learned: what it is, what it foresees, that only the prompt is asked, and how it is trained."""

from __future__ import annotations

import pytest
import torch
from cases import RAGGED, RAGGED_ANSWERS, Case, make_case
from tiny import tiny_llava
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning, remove_pruning
from himap_train.models.features import hidden_states
from himap_train.models.foresight import make_scorers
from himap_train.models.install import pruning_of
from himap_train.models.installed import give_scorers
from himap_train.models.stock import text_decoder
from himap_train.pruning.layout import build_layout
from himap_train.pruning.learned.scorer import HEAD, Asked, Lesson, Scorer, ranking_loss
from himap_train.pruning.methods import read_method
from himap_train.pruning.methods.base import Seen


def learned(*layers: int, spread: float = 0.0, keep: float = 0.4) -> PruningSchedule:
    by = {"name": "learned", "spread": spread, "width": 32}
    return PruningSchedule(tuple(PruningStage(layer, by, keep) for layer in layers))


def ranked(schedule: PruningSchedule, seed: int = 0) -> LlavaForConditionalGeneration:
    """A tiny model whose scorers are random and far from flat."""
    model = install_pruning(tiny_llava(), schedule)
    noise = torch.Generator().manual_seed(seed)
    for scorer in make_scorers(model, schedule).values():
        for weight in scorer.parameters():
            weight.data = 0.3 * torch.randn(weight.shape, generator=noise)
    return model


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.T / query.shape[1] ** 0.5).softmax(1) @ value


def normed(tokens: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
    centred = tokens - tokens.mean(1, keepdim=True)
    standard = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return standard if norm is None else standard * norm.weight + norm.bias


def written_out(scorer: Scorer, image: Tensor, text: Tensor) -> Tensor:
    """Scores of one row, (N,), a head at a time; image (N, D), text (T, D)."""
    width = scorer.text.out_features
    place = torch.arange(len(text), 0, -1)[:, None] * torch.exp(torch.arange(width // 2) * (-8 / width))
    words = scorer.text(normed(text)) + torch.cat([place.sin(), place.cos()], 1)
    block, heads = scorer.block, [slice(at, at + HEAD) for at in range(0, width, HEAD)]
    query, key, value = block.mix(normed(words, block.before_mix)).chunk(3, 1)
    words = words + block.out(torch.cat([attention(query[:, h], key[:, h], value[:, h]) for h in heads], 1))
    words = normed(words + block.mlp(normed(words, block.before_mlp)), scorer.norm)
    tokens = scorer.image(normed(image))
    scores = scorer.own(tokens)[:, 0]
    for number, head in enumerate(heads if len(text) else []):
        share = scorer.share(words)[:, number].softmax(0)
        after = (share[:, None] * scorer.query(words)[:, head]).sum(0)
        scores = scores + tokens[:, head] @ after / len(heads) ** 0.5
    return scores


def best_of(image: list[int], scores: Tensor) -> list[int]:
    return [image[at] for at in scores.argsort(descending=True).tolist()]


def prompt(case: Case, row: int) -> tuple[list[int], list[int]]:
    """Columns of the first turn's image tokens and of the text behind the first of them, up to its answer."""
    answers = (case.labels[row] != -100).nonzero()[:, 0].tolist()
    columns = [c for c in case.columns(row).tolist() if not answers or c < answers[0]]
    image = [c for c in columns if case.input_ids[row, c] == 4]
    return image, [c for c in columns if image and c > image[0] and c not in image]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "labels"])
def test_scores_as_written_out(labels: bool, side: str) -> None:
    """In a ragged batch the best stay by a score that each row has alone, from its image and its question."""
    model = ranked(learned(0, keep=0.5))
    rows = ["t3 i16 t4 a3", "t9 a1", "t2 i9 t1 i16 t5 a1 t3 a2", "t1 i7 t2 a6"] if labels else list(RAGGED)
    case = make_case(model, rows, side, seed=3)
    embeds = model.get_input_embeddings()(case.input_ids)
    states = embeds.masked_scatter((case.input_ids == 4)[..., None], torch.cat(case.features))
    with torch.no_grad(), record_pruning(model) as trace:
        hidden_states(model, **case.inputs(labels))
    (scorer,) = text_decoder(model).himap_scorers.values()
    for row, kept in enumerate(trace.kept[0]):
        image, question = prompt(case, row)
        if not image:
            continue
        scores = written_out(scorer, states[row, image], states[row, question])
        best = best_of(image, scores)[: int(len(image) * 0.5 + 0.5)]
        expected = sorted(best)
        found = [c for c in kept.tolist() if c in image]
        if question:
            assert found == expected, row
        else:  # the last, from which the answer follows, must stay
            assert found == sorted({image[-1], *[c for c in best_of(image, scores) if c != image[-1]][: len(best) - 1]})


def test_what_stays_beside_the_best_differs_from_all_that_stays() -> None:
    layout, counts = build_layout(torch.tensor([[False] * 2 + [True] * 36 + [False] * 3]))
    noise = torch.Generator().manual_seed(1)
    scores, states = torch.rand(1, 41, generator=noise), torch.randn(1, 41, 8, generator=noise)
    states[0, 20] = 2.0 * states[0, 10]  # a copy: all of its worth is there already
    scores[0, 10], scores[0, 20] = 1.5, 1.4
    method = read_method({"name": "learned", "spread": 0.75})
    ranks = method.choose(Seen(layout, counts, scores=scores, states=states), torch.tensor([[12]]))[0, 2:38]
    worth, shown, chosen = scores[0, 2:38], states[0, 2:38], list[int]()
    while len(chosen) < 12:
        likest = torch.cosine_similarity(shown[:, None], shown[chosen], dim=2).amax(1) if chosen else torch.zeros(36)
        gain = worth + 0.75 * (1 - likest).clamp(1e-6, 1.0).log()
        chosen.append(max(set(range(36)) - set(chosen), key=gain.tolist().__getitem__))
    assert chosen[0] == 8 and 18 not in chosen
    assert ranks.argsort()[:12].tolist() == chosen


def test_while_it_is_trained_half_of_what_stays_is_chosen_by_difference_alone() -> None:
    layout, counts = build_layout(torch.tensor([[False] * 2 + [True] * 36 + [False] * 3]))
    noise = torch.Generator().manual_seed(1)
    scores, states = torch.rand(1, 41, generator=noise), torch.randn(1, 41, 8, generator=noise)
    seen = Seen(layout, counts, scores=scores, states=states, learns=True)
    ranks = read_method("learned").choose(seen, torch.tensor([[13]]))[0, 2:38]
    chosen = scores[0, 2:38].argsort(descending=True)[:7].tolist()
    while len(chosen) < 13:
        likest = torch.cosine_similarity(states[0, 2:38, None], states[0, 2:38][chosen], dim=2).amax(1)
        chosen.append(int(likest.argmin()))
    assert sorted((ranks < 13).nonzero()[:, 0].tolist()) == sorted(chosen)


def test_only_what_is_learned_from_explores() -> None:
    """The same model keeps other tokens in a step that trains its ranking than without gradients."""
    model = ranked(learned(0, spread=1.0, keep=0.5))
    pruning, case = pruning_of(model), make_case(model, ["t2 i81 t4 a3"], "right", seed=3)
    kept = []
    for learn, grad in ((None, True), (lambda *_: None, True), (lambda *_: None, False)):
        pruning.learn = learn
        with torch.set_grad_enabled(grad), record_pruning(model) as trace:
            hidden_states(model, **case.inputs(labels=True))
        kept.append(trace.kept[0][0].tolist())
    assert kept[0] == kept[2] != kept[1]


def test_answers_never_rank() -> None:
    """Every image comes before its row's answers, so that at no layer anything of them may reach a score."""
    model = ranked(learned(0, 2, keep=0.4))
    scores = []
    for seed in (1, 2):
        case = make_case(model, list(RAGGED_ANSWERS), "right", seed=5)
        answers = case.labels != -100
        other = torch.randint(5, 264, case.input_ids.shape, generator=torch.Generator().manual_seed(seed))
        case.input_ids = torch.where(answers, other, case.input_ids)
        with torch.no_grad(), record_pruning(model, watch=True) as trace:
            hidden_states(model, **case.inputs(labels=True))
        scores.append([shown.scores[shown.layout.image] for shown in trace.shown.values()])
    assert len(scores[0]) == 2 and all(torch.equal(one, other) for one, other in zip(*scores, strict=True))


@pytest.mark.parametrize("trained", ["all", "head"])
def test_foresees_what_the_loss_owes_to_each_token_that_stays(trained: str) -> None:
    """To first order how the loss moves when a token's state behind the stage is scaled, by finite differences."""
    stages = (PruningStage(layer, {"name": "learned", "spread": 0.0}, keep) for layer, keep in ((0, 0.6), (2, 0.3)))
    model = ranked(PruningSchedule(tuple(stages))).double()
    if trained == "head":
        model.model.requires_grad_(False)
    case = make_case(model, ["t3 i16 t4 a3", "t2 i9 t6 a2", "t5 a4"], "right", seed=7)
    case.features = [feature.double() for feature in case.features]
    found: dict[int, Lesson] = {}
    pruning = pruning_of(model)
    assert pruning is not None
    pruning.learn = found.__setitem__

    def cross_entropy() -> Tensor:
        logits = model(**case.inputs(labels=True)).logits[:, :-1]  # the model's own loss is of fp32
        return nn.functional.cross_entropy(logits.flatten(0, 1), case.labels[:, 1:].flatten())

    with record_pruning(model) as trace:
        cross_entropy().backward()
    pruning.learn = None

    def loss(layer: int, row: int, place: int, step: float) -> float:
        def scaled(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            hidden = args[0].clone()
            hidden[row, place] *= 1 + step
            return (hidden,)

        hook = text_decoder(model).layers[layer].register_forward_pre_hook(scaled)
        with torch.no_grad():
            value = float(cross_entropy())
        hook.remove()
        return value

    assert found.keys() == {0, 2}
    for row in (0, 1):
        image, question = prompt(case, row)
        for stage, layer in enumerate((0, 2)):
            lesson, kept = found[layer], trace.kept[stage][row].tolist()
            assert int(lesson.asked.text_real[row].sum()) == len(question)
            image = [column for column in image if column in kept]
            assert int(lesson.asked.image_real[row].sum()) == len(image)
            for number, column in enumerate(image):
                sides = [loss(layer, row, kept.index(column), step) for step in (0.01, -0.01)]
                slope = abs(sides[0] - sides[1]) / 0.02
                assert float(lesson.target[row, number]) == pytest.approx(
                    slope, rel=0.01, abs=2e-5
                )  # norms are of fp32
    assert not found[0].asked.image_real[2].any()


def test_gradient_of_the_loss_by_finite_differences() -> None:
    torch.manual_seed(0)
    scorer = Scorer(24, 32).double()
    real, words = torch.arange(9) < torch.tensor([[9], [5]]), torch.arange(4) < torch.tensor([[2], [4]])
    asked = Asked(torch.randn(2, 9, 24).double(), real, torch.randn(2, 4, 24).double(), words)
    target = torch.rand(2, 9).double() ** 3

    def loss() -> Tensor:
        return ranking_loss(scorer(asked), Lesson(asked, target))[0]

    loss().backward()
    for name, weight in scorer.named_parameters():
        at = int(weight.grad.abs().argmax())
        flat, step = weight.data.view(-1), 1e-5
        sides = []
        for moved in (step, -step):
            flat[at] += moved
            sides.append(float(loss().detach()))
            flat[at] -= moved
        slope = (sides[0] - sides[1]) / (2 * step)
        assert slope == pytest.approx(float(weight.grad.view(-1)[at]), rel=1e-5, abs=1e-8), name


def test_loss_is_the_divergence_and_least_at_the_target() -> None:
    target = torch.tensor([[1.0, 3.0, 0.0, 7.0], [0.0, 0.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    real = torch.tensor([[True, True, True, False], [True] * 4, [False] * 4])
    nothing = torch.zeros(3, 0, 0)
    lesson = Lesson(Asked(nothing, real, nothing, real), target)
    even = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())  # entropy
    total, rows = ranking_loss(torch.zeros(3, 4), lesson)
    torch.testing.assert_close(total, torch.tensor(3.0).log() - even + torch.tensor(2.0).log())
    assert int(rows) == 2
    same = torch.tensor([[0.25, 0.75, 1e-12, 9.0], [1e-12, 1e-12, 0.5, 0.5], [1.0] * 4]).log()
    assert abs(float(ranking_loss(same, lesson)[0])) < 1e-6


def test_no_part_of_the_model_and_never_guessed() -> None:
    model = tiny_llava()
    names = set(model.state_dict())
    case = make_case(model, RAGGED, "left")
    install_pruning(model, learned(0))
    with pytest.raises(ValueError, match="no ranking at this layer"):
        model(**case.inputs(labels=True))
    make_scorers(model, learned(0))
    assert set(model.state_dict()) == names and not any("scorer" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        first = model(**case.inputs()).logits
        install_pruning(remove_pruning(model), learned(0))
        assert torch.equal(model(**case.inputs()).logits, first)
    give_scorers(text_decoder(model), {})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"spread": 10.5}, "spread is 10.5; expected 0 to 10"),
        ({"width": 40}, "width is 40; expected a multiple of 16"),
        ({"width": 0}, "width is 0"),
        ({"width": True}, "width is True"),
    ],
)
def test_numbers_that_cannot_be(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_method({"name": "learned", **parameters})
