"""Unit features in clusters, and the plain way to their neighbours."""

import numpy as np
from numpy.typing import NDArray


def clustered_features(num_persons: int, num_each: int, width: int, noise: float, seed: int) -> NDArray[np.float32]:
    """Unit centres plus Gaussian noise of about the given length, unit again, in random order of persons."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((num_persons, width))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    person_ids = rng.permutation(np.repeat(np.arange(num_persons), num_each))
    features_ND = centers[person_ids] + noise / np.sqrt(width) * rng.standard_normal((len(person_ids), width))
    return (features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)).astype(np.float32)


def squared_distances(queries_QD: NDArray, features_ND: NDArray) -> NDArray[np.float64]:
    """``(Q, N)`` from differences, in float64."""
    return np.stack([np.square(features_ND.astype(np.float64) - query).sum(1) for query in queries_QD])


def brute_force(queries_QD: NDArray, features_ND: NDArray, k: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The ``k`` smallest squared distances of every query and their rows, ties by row."""
    distances_QN = squared_distances(queries_QD, features_ND)
    rows_Qk = np.argsort(distances_QN, axis=1, kind="stable")[:, :k].astype(np.int32)
    return np.take_along_axis(distances_QN, rows_Qk, 1), rows_Qk


def recall(found_Qk: NDArray[np.int32], true_Qk: NDArray[np.int32]) -> float:
    """Share of the true neighbours that were found."""
    pairs = zip(found_Qk.tolist(), true_Qk.tolist(), strict=True)
    return sum(len(set(found) & set(true)) for found, true in pairs) / true_Qk.size
