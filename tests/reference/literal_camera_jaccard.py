"""Camera-aware k-reciprocal distances by sets and loops, from the definition (Chen et al., arXiv:2311.10605)."""

import numpy as np
from numpy.typing import NDArray

from benchmarks.dense_jaccard import overlap_distances


def literal_camera_jaccard(
    features_ND: NDArray[np.float32],
    cameras_N: NDArray,
    k1_same: int,
    k1_other: int,
    k2_same: int,
    k2_other: int,
) -> NDArray[np.float32]:
    """Dense ``(N, N)``: every row has a list within its camera and one over all others; both together are its list."""
    num_rows = len(features_ND)
    wide = features_ND.astype(np.float64)

    def nearest(row: int, num_same: int, num_other: int) -> list[int]:
        order = sorted(range(num_rows), key=lambda other: (float(np.square(wide[row] - wide[other]).sum()), other))
        same = [other for other in order if cameras_N[other] == cameras_N[row]]
        others = [other for other in order if cameras_N[other] != cameras_N[row]]
        return same[:num_same] + others[:num_other]

    def mutual(lists: list[list[int]]) -> list[set[int]]:
        return [{other for other in lists[row] if row in lists[other]} for row in range(num_rows)]

    sets = mutual([nearest(row, k1_same + 1, k1_other + 1) for row in range(num_rows)])
    codes_NN = np.zeros((num_rows, num_rows), np.float32)
    for row in range(num_rows):
        for member in sets[row]:
            codes_NN[row, member] = np.exp(-np.square(wide[row] - wide[member]).sum())
        codes_NN[row] /= codes_NN[row].sum()
    expanded_NN = np.stack([codes_NN[nearest(row, k2_same, k2_other)].mean(axis=0) for row in range(num_rows)])
    return overlap_distances(expanded_NN, num_rows)
