"""Jaccard distance and DBSCAN from sparse rows against the dense version, handed the same exact neighbours.

Run from the repository: ``OMP_NUM_THREADS=1 python -m benchmarks.jaccard``
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score

from benchmarks.dense_jaccard import dense_jaccard_distance
from benchmarks.measure import Cost, cost, in_own_process
from passreid_ray.retrieval import dbscan_labels, nearest_neighbours
from passreid_ray.retrieval.jaccard import plain_neighbourhood, unit_weighting
from passreid_ray.retrieval.k_reciprocal import encode, expand, overlap_distance, reciprocal_half

ROWS, WARM_UP_ROWS, WIDTH, IMAGES_EACH, NOISE = 20_000, 500, 384, 20, 2.0
"""With this noise identities overlap."""
K1, K2, EPS, MIN_SAMPLES = 30, 6, 0.6, 4


def features_of(num_rows: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit features around unit centres, in random order, and their identities."""
    rng = np.random.default_rng(0)
    person_ids = rng.permutation(num_rows) // IMAGES_EACH
    centers = _unit(rng.standard_normal((num_rows // IMAGES_EACH, WIDTH), np.float32))
    noise_ND = NOISE / np.sqrt(WIDTH) * rng.standard_normal((num_rows, WIDTH), np.float32)
    return _unit(centers[person_ids] + noise_ND.astype(np.float32)), person_ids


def _unit(features_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    return features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)


def sparse_labels(features_ND: NDArray[np.float32], rows_NK: NDArray[np.int32]) -> NDArray[np.int64]:
    """Ours: the steps of ``jaccard_distance`` after the search, and ``dbscan_labels``."""
    neighbourhood, everything = plain_neighbourhood(rows_NK, K2), slice(0, len(features_ND))
    weighting = unit_weighting(features_ND)
    codes_NN = encode(neighbourhood, reciprocal_half(neighbourhood), features_ND, weighting, everything)
    expanded_NN = expand(codes_NN, neighbourhood, everything)
    return dbscan_labels(overlap_distance(expanded_NN, expanded_NN.tocsc(), EPS), EPS, MIN_SAMPLES)


def dense_labels(features_ND: NDArray[np.float32], rows_NK: NDArray[np.int32]) -> NDArray[np.int64]:
    """The dense matrix, and scikit-learn."""
    distance_NN = dense_jaccard_distance(features_ND, rows_NK, K2)
    return DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="precomputed").fit(distance_NN).labels_


def save_inputs(folder: Path, num_rows: int) -> None:
    """Features and their exact neighbours as files."""
    folder.mkdir()
    features_ND, _ = features_of(num_rows)
    np.save(folder / "features.npy", features_ND)
    np.save(folder / "rows.npy", nearest_neighbours(features_ND, K1)[1])


def load_inputs(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """What ``save_inputs`` wrote."""
    return np.load(folder / "features.npy"), np.load(folder / "rows.npy")


def measured(kind: str, folder: Path) -> tuple[Cost, NDArray[np.int64]]:
    """Cost and labels of one version, after a small input on which everything is imported and compiled."""
    labels_of = {"sparse": sparse_labels, "dense": dense_labels}[kind]
    labels_of(*load_inputs(folder / "small"))
    inputs = load_inputs(folder / "all")
    return cost(lambda: labels_of(*inputs))


def main(num_rows: int = ROWS) -> None:
    """Print both costs and whether the labels are identical."""
    with tempfile.TemporaryDirectory() as name:
        in_own_process(save_inputs, Path(name) / "small", WARM_UP_ROWS)
        in_own_process(save_inputs, Path(name) / "all", num_rows)
        ours, labels_N = in_own_process(measured, "sparse", Path(name))
        dense, dense_labels_N = in_own_process(measured, "dense", Path(name))
    person_ids = features_of(num_rows)[1]
    own_N = np.where(labels_N < 0, -1 - np.arange(num_rows), labels_N)  # outliers each on their own
    outliers = int((labels_N < 0).sum())
    print(
        f"Jaccard distance and DBSCAN of {num_rows} features of {WIDTH} numbers, noise {NOISE}; neighbours not counted"
    )
    print(f"sparse rows     {ours}")
    print(f"dense matrices  {dense}")
    print(
        f"{dense.cpu_seconds / ours.cpu_seconds:.1f} times the CPU time, "
        f"{dense.peak_bytes / ours.peak_bytes:.1f} times the memory"
    )
    same = "identical" if np.array_equal(labels_N, dense_labels_N) else "NOT identical"
    print(
        f"{labels_N.max() + 1} clusters and {outliers} outliers of {person_ids.max() + 1} identities, "
        f"ARI {adjusted_rand_score(person_ids, own_N):.3f}; labels are {same}"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
