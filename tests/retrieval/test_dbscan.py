from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from passreid_ray.errors import UserError
from passreid_ray.retrieval import dbscan_labels
from passreid_ray.retrieval.dbscan import attach_border, core_links, count_within, merge_links


def random_graph(seed: int, num_rows: int, density: float) -> np.ndarray:
    """Symmetric float32 distances in twentieths; 1 where there is no link, 0 on the diagonal."""
    rng = np.random.default_rng(seed)
    dense = (rng.integers(0, 20, (num_rows, num_rows)) / 20).astype(np.float32)
    dense[rng.random((num_rows, num_rows)) > density] = 1
    dense = np.triu(dense, 1)
    dense += dense.T
    return dense


def stored(dense: np.ndarray) -> sp.csr_array:
    """All pairs below 1, zeros among them."""
    row, column = np.nonzero(dense < 1)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(dense)))])
    return sp.csr_array((dense[row, column], column.astype(np.int32), indptr.astype(np.int32)), shape=dense.shape)


def sklearn_labels(dense: np.ndarray, eps: float, min_samples: int) -> np.ndarray:
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(dense).labels_


graphs = given(
    seed=st.integers(0, 2**32),
    num_rows=st.integers(1, 60),
    density=st.floats(0, 0.4),
    eps=st.sampled_from([0.05, 0.3, 0.5, 0.6, 0.95]),
    min_samples=st.integers(1, 7),
)


@settings(deadline=None)
@graphs
def test_labels_and_their_numbers_are_scikit_learns(
    seed: int, num_rows: int, density: float, eps: float, min_samples: int
) -> None:
    dense = random_graph(seed, num_rows, density)
    np.testing.assert_array_equal(
        dbscan_labels(stored(dense), eps, min_samples), sklearn_labels(dense, eps, min_samples)
    )


@settings(deadline=None)
@graphs
def test_any_blocks_of_rows_give_the_labels_of_the_whole(
    seed: int, num_rows: int, density: float, eps: float, min_samples: int
) -> None:
    distance = stored(random_graph(seed, num_rows, density))
    rng = np.random.default_rng(seed)
    edges = np.unique([0, *rng.integers(0, num_rows, rng.integers(0, 6)), num_rows]).tolist()
    blocks = [(start, distance[start:end]) for start, end in pairwise(edges)]
    is_core = np.concatenate([count_within(block, eps) for _, block in blocks]) >= min_samples
    links = [core_links(block, eps, start, is_core) for start, block in blocks]
    cluster = merge_links([links[i] for i in rng.permutation(len(links))], is_core)
    labels = np.concatenate([attach_border(block, eps, start, cluster) for start, block in blocks])
    np.testing.assert_array_equal(labels, dbscan_labels(distance, eps, min_samples))


def test_links_of_a_block_are_no_more_than_the_core_rows_it_reaches() -> None:
    distance = stored(np.zeros((50, 50), np.float32))
    assert len(core_links(distance[:10], 0.5, 0, np.ones(50, bool))) <= 50


def test_a_border_row_joins_the_lowest_cluster_that_reaches_it() -> None:
    dense = np.ones((9, 9), np.float32)
    for group in (range(1, 5), range(5, 9)):
        dense[np.ix_(group, group)] = 0.2
    dense[0, [4, 8]] = dense[[4, 8], 0] = 0.5  # three within eps, itself among them: no core row
    np.fill_diagonal(dense, 0)
    labels = dbscan_labels(stored(dense), 0.5, 4)
    assert labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    order = [0, 5, 6, 7, 8, 1, 2, 3, 4]
    assert dbscan_labels(stored(dense[np.ix_(order, order)]), 0.5, 4).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_a_pair_just_at_eps_is_within_it() -> None:
    dense = np.array([[0, 0.6], [0.6, 0]], np.float32)
    assert dbscan_labels(stored(dense), 0.6, 2).tolist() == [0, 0]
    assert dbscan_labels(stored(dense), 0.5999, 2).tolist() == [-1, -1]


def test_rows_without_pairs_are_outliers() -> None:
    dense = random_graph(0, 30, 0.3)
    distance = stored(dense).tolil()
    distance[[0, 7, 29]] = 0
    distance = sp.csr_array(distance)  # rows that lack even their diagonal
    counts = count_within(distance, 0.6)
    assert counts[[0, 7, 29]].tolist() == [0, 0, 0]
    assert (dbscan_labels(distance, 0.6, 1)[[0, 7, 29]] == -1).all()


def test_far_rows_are_all_outliers_or_clusters_of_one() -> None:
    distance = stored(1 - np.eye(5, dtype=np.float32))
    assert dbscan_labels(distance, 0.6, 2).tolist() == [-1] * 5
    assert dbscan_labels(distance, 0.6, 1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("eps", "min_samples", "message"),
    [
        (0, 4, r"eps: expected a distance in \(0, 1\], got 0"),
        (1.5, 4, r"eps: .* got 1.5"),
        (float("nan"), 4, r"eps: .* got nan"),
        (0.6, 0, "min_samples: expected at least 1, got 0"),
    ],
)
def test_unusable_densities_are_refused(eps: float, min_samples: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dbscan_labels(stored(np.zeros((2, 2), np.float32)), eps, min_samples)


def test_a_pair_that_very_many_blocks_give_still_connects() -> None:
    links = [np.array([[1, 0]], np.int32)] * 256
    assert merge_links(links, np.ones(2, bool)).tolist() == [0, 0]
