"""Hard triplets among the features of a pool: for each query one of those with the highest ranking loss."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.neighbours import unit_features

_QUERY_ROWS = 256


@dataclass(frozen=True)
class MinedTriplets:
    """Triplets and how hard they are."""

    triplets_T3: NDArray[np.int64]
    """Rows of query, positive and negative."""
    mean_loss: float
    """Of these triplets."""
    random_loss: float
    """Of triplets of the same queries whose positives and negatives are drawn at random."""


def mine_triplets(
    features_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    num_triplets: int,
    rng: np.random.Generator,
    *,
    num_hardest: int = 25,
    margin: float = 0.1,
) -> MinedTriplets:
    """``num_triplets`` triplets, each drawn from the ``num_hardest`` of highest loss of a query drawn at random.

    Features are L2-normalised; a positive is another row with the query's label. Queries are drawn without
    replacement, and over again when there are too few. Source: Almazan et al., arXiv:1801.05339, section 3.

    Raises:
        UserError: no label has two rows, or all rows have one label.
    """
    features_ND = unit_features(features_ND)
    _, label_N, counts = np.unique(labels_N, return_inverse=True, return_counts=True)
    eligible = np.flatnonzero(counts[label_N] > 1)
    if len(eligible) == 0 or len(counts) == 1:
        found = "no person has two images" if len(counts) > 1 else "there is only one person"
        raise UserError(
            f"ranking: {found} among the {len(labels_N)} of the pool; raise ranking.pool_size or give more data"
        )
    rounds = -(-num_triplets // len(eligible))
    queries_T = np.concatenate([rng.permutation(eligible) for _ in range(rounds)])[:num_triplets]
    triplets: list[tuple[int, int, int]] = []
    losses, random_losses = [], []
    for first in range(0, num_triplets, _QUERY_ROWS):
        own = queries_T[first : first + _QUERY_ROWS]
        squared_QN = 2 - 2 * (features_ND[own] @ features_ND.T)
        for query, squared_N in zip(own.tolist(), squared_QN, strict=True):
            is_same_N = label_N == label_N[query]
            negatives = np.flatnonzero(~is_same_N)
            is_same_N[query] = False
            positives = np.flatnonzero(is_same_N)
            pairs_H2, loss_H = hardest_pairs(squared_N, positives, negatives, num_hardest, margin)
            chosen = int(rng.integers(len(pairs_H2)))
            triplets.append((query, int(pairs_H2[chosen, 0]), int(pairs_H2[chosen, 1])))
            losses.append(loss_H[chosen])
            drawn = squared_N[rng.choice(positives)] - squared_N[rng.choice(negatives)]
            random_losses.append(max(0.0, margin + drawn) / 2)
    return MinedTriplets(np.asarray(triplets), float(np.mean(losses)), float(np.mean(random_losses)))


def hardest_pairs(
    squared_N: NDArray[np.float32],
    positives: NDArray[np.int64],
    negatives: NDArray[np.int64],
    num_hardest: int,
    margin: float,
) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """The (positive, negative) pairs ``(H, 2)`` of highest ranking loss for one query, and their losses ``(H,)``.

    ``squared_N``: squared distances of the query to all rows. A triplet among the H hardest has one of the H farthest
    positives and one of the H nearest negatives, so only these are put together. Equal ones by row.
    """
    far = positives[np.argsort(-squared_N[positives], kind="stable")[:num_hardest]]
    near = negatives[np.argsort(squared_N[negatives], kind="stable")[:num_hardest]]
    excess_PM = squared_N[far][:, None] - squared_N[near]
    order = np.argsort(-excess_PM, axis=None, kind="stable")[:num_hardest]
    rows, columns = np.unravel_index(order, excess_PM.shape)
    return np.stack([far[rows], near[columns]], axis=1), np.maximum(0, margin + excess_PM[rows, columns]) / 2
