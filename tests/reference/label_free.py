"""ELo's label-free score and the spread of features, row by row and pair by pair."""

from collections.abc import Sequence
from math import exp, log

import numpy as np

Rows = Sequence[Sequence[float]]


def literal_squared_distance(first: Sequence[float], second: Sequence[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True))


def literal_zipf(num_clusters: int, exponent: float) -> list[float]:
    """q(c_i) = 1 / i^s / H(k, s)."""
    harmonic = sum(1 / i**exponent for i in range(1, num_clusters + 1))
    return [1 / i**exponent / harmonic for i in range(1, num_clusters + 1)]


def literal_shares(features: Rows, centroids: Rows, assignment: str) -> list[float]:
    """p(c_i): the mean over x of p(c_i | x), largest first."""
    totals = [0.0] * len(centroids)
    for feature in features:
        distances = [literal_squared_distance(feature, centroid) for centroid in centroids]
        if assignment == "hard":
            totals[distances.index(min(distances))] += 1
        else:
            densities = [exp(-distance) for distance in distances]
            for i, density in enumerate(densities):
                totals[i] += density / sum(densities)
    return sorted((total / len(features) for total in totals), reverse=True)


def literal_kl(found: Sequence[float], expected: Sequence[float]) -> float:
    """sum p ln(p / q), a share of 0 adding nothing."""
    return sum(p * log(p / q) for p, q in zip(found, expected, strict=True) if p > 0)


def literal_uniformity(features: Rows) -> float:
    """ln of the mean of the Gaussian potential exp(-2 |x - y|^2) of all pairs."""
    potentials = []
    for i, first in enumerate(features):
        for second in features[i + 1 :]:
            potentials.append(exp(-2 * literal_squared_distance(first, second)))
    return log(sum(potentials) / len(potentials))


def literal_alignment(features: Rows, positives: Rows) -> float:
    """The mean squared distance of the two views of a row."""
    pairs = zip(features, positives, strict=True)
    return sum(literal_squared_distance(*pair) for pair in pairs) / len(features)


def literal_effective_rank(features: Rows) -> float:
    """exp of the entropy of the singular values, of all rows at once."""
    values = np.linalg.svd(np.array(features, np.float64), compute_uv=False).tolist()
    shares = [value / sum(values) for value in values]
    return exp(-sum(share * log(share) for share in shares if share > 0))
