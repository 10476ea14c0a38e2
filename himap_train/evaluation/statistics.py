"""Mean and standard error of scores that come in clusters: several questions about one scene or image are not
independent.

N samples, C clusters. With one sample a cluster this is the ordinary standard error of a mean, which for right/wrong
scores is the binomial one (up to the factor N / (N - 1)).
"""

from __future__ import annotations

import math

import torch


def mean_and_standard_error(scores: torch.Tensor, clusters: torch.Tensor) -> tuple[float, float]:
    """Mean of the scores and its cluster-robust standard error.

    Args:
        scores: (N,) floating point, one score a sample.
        clusters: (N,) integers; samples with the same number belong together.

    Returns:
        Mean, and sqrt(C / (C - 1) * sum_c (sum_{i in c} (score_i - mean))^2) / N; NaN where fewer than two clusters
        tell nothing of the spread.

    Raises:
        ValueError: there are no scores.
    """
    if scores.numel() == 0:
        raise ValueError("no sample was scored; check the data source and the limit")
    scores = scores.double()
    mean = scores.mean()
    _, index = torch.unique(clusters, return_inverse=True)
    count = int(index.max()) + 1
    if count < 2:
        return mean.item(), math.nan
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, scores - mean)
    variance = count / (count - 1) * sums.square().sum() / scores.numel() ** 2
    return mean.item(), math.sqrt(variance.item())
