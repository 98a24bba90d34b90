"""How the features spread over k-means clusters, and how far that is from an expected distribution."""

# Shape letters: N rows, D width, k clusters.

from typing import Any, Literal, get_args

import faiss
import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax

from passreid_ray.errors import UserError
from passreid_ray.retrieval.distances import as_array

Prior = Literal["zipf", "uniform", "empirical"]
Assignment = Literal["soft", "hard"]

_MAX_SEED = 2**31 - 1
_ITERATIONS = 25
_TRAINING_ROWS_PER_CLUSTER = 256
_BLOCK_BYTES = 16 * 2**20


def prior_distribution(
    num_clusters: int, prior: Prior, *, exponent: float = 1.0, empirical_counts: Any = None
) -> NDArray[np.float64]:
    """The expected shares of the clusters, largest first, ``(k,)``; they are positive and sum to 1.

    "zipf": the i-th largest share is proportional to ``i ** -exponent`` (ELo, arXiv:2002.12177, with exponent 1).
    "uniform": equal shares. "empirical": ``empirical_counts``, for example images per person of a reference set, one
    positive count for each cluster, in any order.

    Raises ``UserError`` for fewer than 2 clusters, an unknown prior, an exponent below 0, and counts that are missing,
    that do not fit, or that another prior would ignore.
    """
    if num_clusters < 2:
        raise UserError(f"num_clusters: {num_clusters} say nothing of how features spread; give at least 2")
    if empirical_counts is not None and prior != "empirical":
        raise UserError(f"empirical_counts: given with prior={prior!r}, which ignores them; give prior='empirical'")
    match prior:
        case "zipf":
            if not 0 <= exponent < np.inf:
                raise UserError(f"exponent: expected a number from 0 on (0 = uniform, 1 = Zipf's law), got {exponent}")
            weights_k = np.arange(1, num_clusters + 1, dtype=np.float64) ** -exponent
        case "uniform":
            weights_k = np.ones(num_clusters)
        case "empirical":
            weights_k = _descending_counts(empirical_counts, num_clusters)
        case _:
            raise UserError(f"prior: expected 'zipf', 'uniform' or 'empirical', got {prior!r}")
    if weights_k[-1] <= 0:
        raise UserError(f"exponent: at {exponent} the smallest of {num_clusters} shares is 0; give a lower one")
    return weights_k / weights_k.sum()


def unit_centroids(features_ND: NDArray[np.float32], num_clusters: int, seed: int) -> NDArray[np.float64]:
    """Centroids of ``num_clusters`` clusters of unit features, by spherical k-means, of length 1: ``(k, D)``.

    Spherical, because features are compared by cosine, and because the plain mean of a loose cluster is short: such a
    centroid is near to every row, and would draw the probability that belongs to the compact clusters. Starts from
    k-means++ and is a function of the features and ``seed``. Learnt from at most 256 rows for each cluster, drawn by
    the seed. Where there are fewer different rows than clusters, centroids lie (nearly) on top of each other.

    Raises ``UserError`` for more clusters than rows, and for a seed that is not in 0..2**31 - 1.
    """
    num_rows, width = features_ND.shape
    if num_clusters > num_rows:
        raise UserError(
            f"num_clusters: {num_clusters} clusters of {num_rows} features; lower it, or give more features"
        )
    if not 0 <= seed <= _MAX_SEED:
        raise UserError(f"seed: expected a whole number from 0 to {_MAX_SEED}, got {seed}")
    kmeans = faiss.Kmeans(
        width,
        num_clusters,
        niter=_ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_TRAINING_ROWS_PER_CLUSTER,
    )
    kmeans.cp.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    kmeans.train(features_ND)
    centroids_kD = np.asarray(kmeans.centroids, np.float64)
    return centroids_kD / np.linalg.norm(centroids_kD, axis=1, keepdims=True)


def cluster_distribution(
    features_ND: NDArray[np.float32], centroids_kD: NDArray[np.float64], assignment: Assignment
) -> NDArray[np.float64]:
    """Share of every cluster, largest first, ``(k,)``.

    "soft": the mean over the rows of ``p(c | x) = softmax_c(-|x - c|^2)``, a Gaussian of 2 sigma^2 = 1 around every
    centroid (ELo, arXiv:2002.12177). "hard": the share of rows that are nearest to the centroid.

    Sorted, so that the number k-means gives to a cluster changes nothing. Raises ``UserError`` for another assignment.
    """
    check_assignment(assignment)
    total_k = np.zeros(len(centroids_kD))
    block_rows = max(1, _BLOCK_BYTES // (8 * max(centroids_kD.shape)))
    for first in range(0, len(features_ND), block_rows):
        rows_RD = features_ND[first : first + block_rows].astype(np.float64)
        # |x - c|^2 less |x|^2, which is the same for every cluster.
        logits_Rk = 2 * rows_RD @ centroids_kD.T - np.square(centroids_kD).sum(axis=1)
        match assignment:
            case "soft":
                total_k += softmax(logits_Rk, axis=1).sum(axis=0)
            case "hard":
                total_k += np.bincount(logits_Rk.argmax(axis=1), minlength=len(total_k))
    return np.sort(total_k)[::-1] / len(features_ND)


def check_assignment(assignment: str) -> None:
    """Raise ``UserError`` unless it is one that ``cluster_distribution`` knows."""
    if assignment not in get_args(Assignment):
        raise UserError(f"assignment: expected 'soft' or 'hard', got {assignment!r}")


def kl_divergence(found_k: NDArray[np.float64], expected_k: NDArray[np.float64]) -> float:
    """KL(found || expected) in nats, the largest share of one against the largest of the other: 0 = the same shares.

    The order of either does not matter. All rows in one cluster give ``-ln`` of the largest expected share.
    """
    return float(rel_entr(np.sort(found_k), np.sort(expected_k)).sum())


def _descending_counts(counts: Any, num_clusters: int) -> NDArray[np.float64]:
    if counts is None:
        raise UserError("empirical_counts: prior='empirical' needs them; give one positive count for each cluster")
    counts_k = as_array(counts).astype(np.float64)
    if counts_k.shape != (num_clusters,):
        raise UserError(
            f"empirical_counts: expected {num_clusters}, one for each cluster, got shape {counts_k.shape}; "
            "give as many counts as num_clusters"
        )
    if not (np.isfinite(counts_k) & (counts_k > 0)).all():
        bad = counts_k[~(np.isfinite(counts_k) & (counts_k > 0))]
        raise UserError(
            f"empirical_counts: {len(bad)} of {num_clusters} are not positive numbers, the first is {bad[0]}; leave "
            "them out and lower num_clusters (a share of 0 makes the divergence infinite)"
        )
    return np.sort(counts_k)[::-1]
