"""k-reciprocal distances written out on dense N x N matrices, row by row: what ours are measured and tested against.

From the definition (Zhong et al., arXiv:1701.08398) in the steps and data types of the code that PASS publishes.
"""

# Shape letters: N rows, k neighbours, Q queries, G gallery rows.

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int32]
Matrix = NDArray[np.float32]


def dense_jaccard_distance(features_ND: Matrix, neighbours_Nk: Rows, k2: int) -> Matrix:
    """``(N, N)`` distances of unit features, from the ``k1`` nearest rows of each, itself first."""
    num_rows, k1 = neighbours_Nk.shape
    sets = reciprocal_sets(neighbours_Nk)
    half_sets = reciprocal_sets(neighbours_Nk[:, : int(np.around(k1 / 2)) + 1])
    codes_NN = np.zeros((num_rows, num_rows), np.float32)
    for row in range(num_rows):
        members = with_half_sets(sets[row], half_sets)
        weights = np.exp(-(2 - 2 * (features_ND[members] @ features_ND[row])))
        codes_NN[row, members] = weights / weights.sum()
    if k2 > 1:
        codes_NN = expanded(codes_NN, neighbours_Nk[:, :k2])
    return overlap_distances(codes_NN, num_rows)


def dense_rerank(
    query_gallery_QG: Matrix, query_query_QQ: Matrix, gallery_gallery_GG: Matrix, k1: int, k2: int, lambda_value: float
) -> Matrix:
    """``(Q, G)`` re-ranked distances. The given ones are squared here, whether they have been squared before or not."""
    num_queries = len(query_gallery_QG)
    original_NN = np.concatenate(
        [
            np.concatenate([query_query_QQ, query_gallery_QG], axis=1),
            np.concatenate([query_gallery_QG.T, gallery_gallery_GG], axis=1),
        ]
    )
    original_NN = np.square(original_NN)
    original_NN = np.transpose(original_NN / np.max(original_NN, axis=0))
    neighbours_NN = np.argsort(original_NN).astype(np.int32)
    num_rows = len(original_NN)
    sets = reciprocal_sets(neighbours_NN[:, : k1 + 1])
    half_sets = reciprocal_sets(neighbours_NN[:, : int(np.around(k1 / 2)) + 1])
    codes_NN = np.zeros((num_rows, num_rows), np.float32)
    for row in range(num_rows):
        members = with_half_sets(sets[row], half_sets)
        weights = np.exp(-original_NN[row, members])
        codes_NN[row, members] = weights / weights.sum()
    original_QG = original_NN[:num_queries, num_queries:].copy()
    del original_NN
    if k2 > 1:
        codes_NN = expanded(codes_NN, neighbours_NN[:, :k2])
    del neighbours_NN
    jaccard_QG = overlap_distances(codes_NN, num_queries)[:, num_queries:]
    return (jaccard_QG * (1 - lambda_value) + original_QG * lambda_value).astype(np.float32)


def reciprocal_sets(neighbours_Nk: Rows) -> list[Rows]:
    """Of every row: its neighbours that have it among theirs."""
    sets = []
    for row, forward_k in enumerate(neighbours_Nk):
        backward_kk = neighbours_Nk[forward_k]
        sets.append(forward_k[np.where(backward_kk == row)[0]])
    return sets


def with_half_sets(members: Rows, half_sets: list[Rows]) -> Rows:
    """A set and those half sets of its members of which more than two thirds lie in it."""
    parts = [members]
    for member in members:
        half_set = half_sets[member]
        if len(np.intersect1d(half_set, members)) > 2 / 3 * len(half_set):
            parts.append(half_set)
    return np.unique(np.concatenate(parts))


def expanded(codes_NN: Matrix, neighbours_Nk: Rows) -> Matrix:
    """Every row's code becomes the mean of its neighbours' codes."""
    expanded_NN = np.zeros_like(codes_NN)
    for row, nearest in enumerate(neighbours_Nk):
        expanded_NN[row] = np.mean(codes_NN[nearest], axis=0)
    return expanded_NN


def overlap_distances(codes_NN: Matrix, num_first: int) -> Matrix:
    """Distances of the first rows to all, by an index of the rows that have a weight in each column."""
    rows_of_column = [np.where(codes_NN[:, column] != 0)[0] for column in range(len(codes_NN))]
    distance_FN = np.zeros((num_first, len(codes_NN)), np.float32)
    for row in range(num_first):
        overlap_N = np.zeros(len(codes_NN), np.float32)
        for column in np.where(codes_NN[row] != 0)[0]:
            others = rows_of_column[column]
            overlap_N[others] += np.minimum(codes_NN[row, column], codes_NN[others, column])
        distance_FN[row] = 1 - overlap_N / (2 - overlap_N)
    distance_FN[distance_FN < 0] = 0
    return distance_FN
