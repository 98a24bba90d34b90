"""Re-ranking at the size of Market-1501 from sparse codes against the dense version.

The dense version is handed its distance matrices, ours the neighbours, row maxima and query x gallery block.

Run from the repository: ``OMP_NUM_THREADS=1 python -m benchmarks.rerank``
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.dense_jaccard import dense_rerank
from benchmarks.measure import Cost, cost, in_own_process
from passreid_ray.retrieval import rerank
from passreid_ray.retrieval.rerank import rerank_from
from passreid_ray.retrieval.scan import exact_index

QUERIES, GALLERY, PERSONS, WIDTH, NOISE = 3368, 15913, 751, 1152, 2.5
K1, K2, LAMBDA = 20, 6, 0.3
WARM_UP = 20
"""How many times smaller the input is on which everything is imported and compiled."""

Features = NDArray[np.float32]


def save_features(folder: Path, shrink: int) -> None:
    """Unit features of queries and gallery as files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    centers = _unit(rng.standard_normal((PERSONS // shrink, WIDTH), np.float32))
    num_queries, num_rows = QUERIES // shrink, (QUERIES + GALLERY) // shrink
    features_ND = rng.standard_normal((num_rows, WIDTH), np.float32)
    features_ND *= NOISE / np.sqrt(WIDTH)
    features_ND += centers[rng.integers(0, len(centers), num_rows)]
    features_ND = _unit(features_ND)
    np.save(folder / "query.npy", features_ND[:num_queries])
    np.save(folder / "gallery.npy", features_ND[num_queries:])


def load_features(folder: Path) -> tuple[Features, Features]:
    """What ``save_features`` wrote."""
    return np.load(folder / "query.npy"), np.load(folder / "gallery.npy")


def _unit(features_ND: Features) -> Features:
    features_ND /= np.linalg.norm(features_ND, axis=1, keepdims=True)
    return features_ND


def squared_distances(features_ND: Features, others_MD: Features) -> Features:
    """``(N, M)`` of unit features, made in place."""
    squared_NM = features_ND @ others_MD.T
    squared_NM *= -2
    squared_NM += 2
    return np.maximum(squared_NM, 0, out=squared_NM)


def euclidean_distances(features_ND: Features, others_MD: Features) -> Features:
    """``(N, M)`` of unit features, made in place; the dense version squares them."""
    squared_NM = squared_distances(features_ND, others_MD)
    return np.sqrt(squared_NM, out=squared_NM)


def after_distances(query_QD: Features, gallery_GD: Features) -> tuple[Cost, Features]:
    """Cost and result of our steps after the distances."""
    features_ND = np.concatenate([query_QD, gallery_GD])
    _, rows_NK, largest_N = exact_index(features_ND).search_rows_and_farthest(slice(0, len(features_ND)), K1 + 1)
    squared_QG = squared_distances(query_QD, gallery_GD)
    return cost(lambda: rerank_from(features_ND, rows_NK, largest_N, squared_QG, K2, LAMBDA))


def whole(query_QD: Features, gallery_GD: Features) -> tuple[Cost, Features]:
    """Cost and result of ``rerank`` from features."""
    return cost(lambda: rerank(query_QD, gallery_GD, K1, K2, LAMBDA))


def dense(query_QD: Features, gallery_GD: Features) -> tuple[Cost, Features]:
    """Cost and result of the dense version after the distances."""
    query_gallery_QG = euclidean_distances(query_QD, gallery_GD)
    query_query_QQ = euclidean_distances(query_QD, query_QD)
    gallery_gallery_GG = euclidean_distances(gallery_GD, gallery_GD)
    return cost(lambda: dense_rerank(query_gallery_QG, query_query_QQ, gallery_gallery_GG, K1, K2, LAMBDA))


def measured(kind: str, folder: Path) -> tuple[Cost, Features]:
    """Cost and result of one version, after a small input."""
    version = {"after": after_distances, "whole": whole, "dense": dense}[kind]
    version(*load_features(folder / "small"))
    return version(*load_features(folder / "all"))


def main(shrink: int = 1) -> None:
    """Print the costs and how far the results are apart."""
    with tempfile.TemporaryDirectory() as name:
        in_own_process(save_features, Path(name) / "small", shrink * WARM_UP)
        in_own_process(save_features, Path(name) / "all", shrink)
        ours, ours_QG = in_own_process(measured, "after", Path(name))
        whole_cost, whole_QG = in_own_process(measured, "whole", Path(name))
        literal, literal_QG = in_own_process(measured, "dense", Path(name))
    print(f"re-ranking {QUERIES // shrink} x {GALLERY // shrink} features of {WIDTH} numbers")
    print(f"after the distances, sparse codes    {ours}")
    print(f"after the distances, dense matrices  {literal}")
    print(f"{literal.cpu_seconds / ours.cpu_seconds:.1f} times the CPU time")
    print(f"rerank() from features               {whole_cost}")
    # Rows whose distances are equal but for rounding may stand in another order, and lists then differ in one row.
    for name, found_QG in (("sparse codes", ours_QG), ("rerank()", whole_QG)):
        difference_QG = np.abs(found_QG - literal_QG)
        print(
            f"{name}: median difference from the dense version {np.median(difference_QG):.1e}, "
            f"{int((difference_QG > 1e-5).sum())} of {difference_QG.size} pairs differ by more than 1e-5"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
