"""Methods that choose a set, by their definitions: one token at a time, in double precision, for the oracle."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.detach().double(), b.detach().double(), dim=0))


def coverage_order(
    method: Any, hidden: Tensor, tokens: list[int], protected: list[int], text: list[int], count: int
) -> list[int]:
    """MMTok: the token that adds most to what the chosen ones cover of question and image is next."""

    def shares(of: list[int], temperature: float) -> list[list[float]]:
        found = []
        for j in of:
            powers = [math.exp(cosine(hidden[j], hidden[i]) / temperature) for i in tokens]
            found.append([power / sum(powers) / len(of) for power in powers])
        return found

    covered = [[method.text_weight * share for share in row] for row in shares(text, method.text_temperature)]
    covered += [[method.image_weight * share for share in row] for row in shares(tokens, method.image_temperature)]

    def worth(chosen: list[int]) -> float:
        return sum(max((row[tokens.index(i)] for i in chosen), default=0.0) for row in covered)

    chosen = list(protected)
    while len(chosen) < count:
        chosen.append(max((p for p in tokens if p not in chosen), key=lambda p: (worth([*chosen, p]), -p)))
    return chosen + [p for p in tokens if p not in chosen]


def dart_order(
    method: Any, hidden: Tensor, keys: Tensor, tokens: list[int], protected: list[int], text: list[int], count: int
) -> list[int]:
    """DART: pivots by the norm of their keys (heads, T, width); each takes the tokens least like it."""

    def norm(p: int) -> float:
        heads, half = keys[:, p].detach().double(), keys.shape[2] // 2
        return sum(math.hypot(*pair) for head in heads for pair in zip(head[:half], head[half:], strict=True))

    def loudest(candidates: list[int]) -> list[int]:
        return sorted(candidates, key=lambda p: (p not in protected, -norm(p), p))

    pivots = loudest(tokens)[: min(max(method.image_pivots, len(protected)), count)]
    chosen, pivots = list(pivots), pivots + loudest(text)[: method.text_pivots]
    left = count - len(chosen)
    for number, pivot in enumerate(pivots):
        share = left // len(pivots) + (number < left % len(pivots))
        rest = sorted((p for p in tokens if p not in chosen), key=lambda p: (cosine(hidden[pivot], hidden[p]), p))
        chosen += rest[:share]
    return chosen + [p for p in tokens if p not in chosen]


def dominant_and_contextual(
    method: Any, readings: Tensor, tokens: list[int], protected: list[int], count: int
) -> tuple[list[int], dict[int, dict[int, float]]]:
    """VisionZip: the order, and of which tokens each contextual one is made, with their shares."""
    number = min(math.floor(count * method.contextual + 0.5), count - len(protected))
    ranked = sorted(tokens, key=lambda p: (p not in protected, -float(readings[p, 0]), p))
    dominant, rest = ranked[: count - number], sorted(ranked[count - number :])
    targets = rest[:: max(len(rest) // number, 1)][:number] if number else []
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for p in rest:
        if p not in targets and targets:
            joined[max(targets, key=lambda t: (cosine(readings[p, 1:], readings[t, 1:]), -t))].append(p)
    made = {t: {t: 0.5, **{p: 0.5 / len(others) for p in others}} for t, others in joined.items() if others}
    return dominant + targets + [p for p in rest if p not in targets], made


def by_windows(side: int, places: dict[int, tuple[int, int, int]], scores: dict[int, float], first: list[int]) -> Any:
    """Window FastV: every window (of a grid, by row and column) keeps the same share, its best tokens."""
    windows: dict[tuple[int, int, int], list[int]] = {}
    for token in sorted(scores, key=lambda p: (p not in first, -scores[p], p)):
        grid, row, column = places[token]
        windows.setdefault((grid, row // side, column // side), []).append(token)
    share = {p: (at + 0.5) / len(tokens) for tokens in windows.values() for at, p in enumerate(tokens)}
    return sorted(scores, key=lambda p: (p not in first, round(share[p], 6), -scores[p], p))


def over_window_means(side: int, places: dict[int, tuple[int, int, int]], scores: dict[int, float]) -> dict[int, float]:
    """Each token's score over the mean of those in its window."""

    def window(p: int) -> tuple[int, int, int]:
        return places[p][0], places[p][1] // side, places[p][2] // side

    together = {p: [scores[q] for q in scores if window(q) == window(p)] for p in scores}
    return {p: scores[p] * len(together[p]) / sum(together[p]) for p in scores}


def square_places(is_image: Tensor) -> dict[int, tuple[int, int, int]]:
    """Image, row and column of each image token, of images that are squares, or else one row."""
    places, start = {}, 0
    for token in range(len(is_image)):
        if is_image[token]:
            start = token if token == 0 or not is_image[token - 1] else start
            length = next((p for p in range(start, len(is_image)) if not is_image[p]), len(is_image)) - start
            side = math.isqrt(length) if math.isqrt(length) ** 2 == length else length
            places[token] = (start, (token - start) // side, (token - start) % side)
    return places


def rater_tokens(states: Tensor, image: list[int], text: list[int]) -> list[int]:
    """SparseVLM: text that gets at least the mean of what image tokens spread over it."""
    given = (states[image].double() @ states[text].double().T).softmax(dim=1).mean(dim=0)
    return [p for p, share in zip(text, given.tolist(), strict=True) if share >= (1 - 1e-6) / len(text)]


def recycled(
    method: Any, hidden: Tensor, order: list[int], protected: list[int], count: int
) -> tuple[list[int], dict[int, list[int]]]:
    """SparseVLM: the order with cluster centres in the last places that stay, and the members of each."""
    merged = int((len(order) - count) * method.recycle + 1e-9)
    number = min(merged // 10 + 1, count // 2, count - len(protected)) if merged else 0
    if number == 0:
        return order, {}
    main, pool = order[: count - number], sorted(order[count - number : count + merged])
    far = {(a, b): float((hidden[a] - hidden[b]).double().norm()) / hidden.shape[1] ** 0.5 for a in pool for b in pool}
    nearest = {a: sorted(far[a, b] for b in pool)[:number] for a in pool}
    density = {a: math.exp(-sum(d * d for d in nearest[a]) / number) for a in pool}
    worth = {}
    for a in pool:
        denser = [b for b in pool if (density[b], -b) > (density[a], -a)]
        worth[a] = density[a] * (min(far[a, b] for b in denser) if denser else max(far[a, b] for b in pool))
    centres = sorted(sorted(pool, key=lambda a: (-worth[a], a))[:number])
    clusters = {centre: [centre] for centre in centres}
    for a in pool:
        if a not in clusters:
            clusters[min(centres, key=lambda c: (far[a, c], c))].append(a)
    return main + centres + [p for p in order if p not in main and p not in centres], clusters
