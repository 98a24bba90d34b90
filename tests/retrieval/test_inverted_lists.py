import pickle

import numpy as np
import pytest

from passreid_ray.retrieval.inverted_lists import InvertedLists, inverted_lists_index
from tests.retrieval.clustered import brute_force, clustered_features, recall, squared_distances

FEATURES_ND = clustered_features(200, 20, 48, 1.0, seed=0)


@pytest.fixture(scope="module")
def index() -> InvertedLists:
    return inverted_lists_index(FEATURES_ND)


def test_most_neighbours_of_clustered_features_are_found(index: InvertedLists) -> None:
    distances, rows = index.search(FEATURES_ND[::7], 30)
    found = recall(rows, brute_force(FEATURES_ND[::7], FEATURES_ND, 30)[1])
    assert found >= 0.95
    assert abs(found - index.sampled_recall) < 0.03
    assert index.num_probed < 100
    true = np.take_along_axis(squared_distances(FEATURES_ND[::7], FEATURES_ND), rows, 1)
    np.testing.assert_allclose(distances, true, rtol=1e-4, atol=1e-7)


def test_the_same_features_give_the_same_neighbours(index: InvertedLists) -> None:
    again = inverted_lists_index(FEATURES_ND.copy())
    assert (again.num_probed, again.sampled_recall) == (index.num_probed, index.sampled_recall)
    for found, expected in zip(again.search(FEATURES_ND, 10), index.search(FEATURES_ND, 10), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_an_index_in_use_can_be_sent_elsewhere(index: InvertedLists) -> None:
    expected = index.search(FEATURES_ND[:50], 10)
    sent = pickle.loads(pickle.dumps(index))
    for found, wanted in zip(sent.search(FEATURES_ND[:50], 10), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_blocks_of_queries_do_not_change_a_bit(index: InvertedLists) -> None:
    whole = index.search(FEATURES_ND[:100], 10)
    parts = [index.search(FEATURES_ND[start : start + 33], 10) for start in (0, 33, 66)]
    parts.append(index.search(FEATURES_ND[99:100], 10))
    for found, expected in zip(zip(*parts, strict=True), whole, strict=True):
        np.testing.assert_array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("num_rows", [1, 3, 45])
def test_a_handful_of_rows_can_be_searched(num_rows: int) -> None:
    _, rows = inverted_lists_index(FEATURES_ND[:num_rows]).search(FEATURES_ND[:num_rows], num_rows)
    np.testing.assert_array_equal(rows, brute_force(FEATURES_ND[:num_rows], FEATURES_ND[:num_rows], num_rows)[1])
