"""How unit features spread over the sphere: effective rank, uniformity and alignment."""

# Shape letters: N rows, D width.

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from scipy.special import entr

_BLOCK_ROWS = 4096
UNIFORMITY_ROWS = 2048


def effective_rank(features_ND: NDArray[np.float32]) -> float:
    """``exp`` of the entropy of the singular values as shares of their sum, 1 = one direction .. min(N, D) = all alike.

    Roy and Vetterli (EUSIPCO 2007); of features as they are, not centred, as RankMe (arXiv:2210.02574) does. In
    float64, and with the memory of a block of rows.
    """
    # From QR, block after block, not from the eigenvalues of X'X: their square roots lose half the digits near 0.
    triangle_DD = np.zeros((0, features_ND.shape[1]))
    for first in range(0, len(features_ND), _BLOCK_ROWS):
        rows_RD = features_ND[first : first + _BLOCK_ROWS].astype(np.float64)
        triangle_DD = np.linalg.qr(np.concatenate([triangle_DD, rows_RD]), mode="r")
    values = np.linalg.svd(triangle_DD, compute_uv=False)
    return float(np.exp(entr(values / values.sum()).sum()))


def uniformity(features_ND: NDArray[np.float32], seed: int) -> float:
    """``ln`` of the mean of ``exp(-2 |x - y|^2)`` over all pairs of different rows: 0 = one point, lower = more spread.

    Wang and Isola (arXiv:2005.10242), L_uniform with t = 2. Of more than 2048 rows, 2048 are drawn by ``seed``: two
    million pairs.
    """
    if len(features_ND) > UNIFORMITY_ROWS:
        drawn = np.random.default_rng(seed).choice(len(features_ND), UNIFORMITY_ROWS, replace=False)
        features_ND = features_ND[drawn]
    squared = pdist(features_ND.astype(np.float64), "sqeuclidean")
    return float(np.log(np.mean(np.exp(-2 * squared))))


def alignment(features_ND: NDArray[np.float32], positives_ND: NDArray[np.float32]) -> float:
    """Mean of ``|x - y|^2`` over the rows and their other views: 0 = views of one image get one feature.

    Wang and Isola (arXiv:2005.10242), L_align with alpha = 2.
    """
    total = 0.0
    for first in range(0, len(features_ND), _BLOCK_ROWS):
        rows = slice(first, first + _BLOCK_ROWS)
        differences_RD = np.subtract(features_ND[rows], positives_ND[rows], dtype=np.float64)
        total += float(np.vdot(differences_RD, differences_RD))
    return total / len(features_ND)
