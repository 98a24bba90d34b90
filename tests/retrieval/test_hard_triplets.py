"""Mined triplets against all triplets, one by one."""

import math
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.hard_triplets import MinedTriplets, hardest_pairs, mine_triplets

NUM, MARGIN, HARDEST = 60, 0.1, 25


def pool(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """60 images of 12 people of 1 to 9 images, who are hard to tell apart; lengths differ, as labels have gaps."""
    rng = np.random.default_rng(seed)
    sizes = [1, 9, 2, 8, 3, 7, 4, 6, 5, 5, 9, 1]
    labels_N = rng.permutation(np.repeat(np.arange(12) * 7 + 3, sizes))
    people_PD = rng.normal(size=(12, 8))
    features_ND = people_PD[labels_N // 7] + rng.normal(size=(NUM, 8))
    return (features_ND * rng.uniform(0.5, 3, (NUM, 1))).astype(np.float32), labels_N


@cache
def literal_losses(query: int) -> dict[tuple[int, int], float]:
    """Ranking losses of all triplets of a query by (positive, negative), hardest first, not yet cut off at 0."""
    features_ND, labels_N = pool()
    unit_ND = [row / math.sqrt(row @ row) for row in features_ND.astype(np.float64)]

    def squared(other: int) -> float:
        return float(((unit_ND[query] - unit_ND[other]) ** 2).sum())

    losses = {
        (positive, negative): (MARGIN + squared(positive) - squared(negative)) / 2
        for positive in range(NUM)
        if positive != query and labels_N[positive] == labels_N[query]
        for negative in range(NUM)
        if labels_N[negative] != labels_N[query]
    }
    return {pair: losses[pair] for pair in sorted(losses, key=lambda pair: -losses[pair])}


def literal_hardest(query: int, num_hardest: int = HARDEST) -> dict[tuple[int, int], float]:
    """The hardest (positive, negative) pairs of a query among all of its triplets, with their losses."""
    return {pair: max(0.0, loss) for pair, loss in list(literal_losses(query).items())[:num_hardest]}


def mined(num_triplets: int = 600, seed: int = 0, num_hardest: int = HARDEST) -> MinedTriplets:
    return mine_triplets(*pool(), num_triplets, np.random.default_rng(seed), num_hardest=num_hardest, margin=MARGIN)


def test_the_hardest_pairs_of_every_query_are_those_among_all_its_triplets() -> None:
    features_ND, labels_N = pool()
    unit_ND = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    num_checked = 0
    for query in range(NUM):
        positives = np.flatnonzero((labels_N == labels_N[query]) & (np.arange(NUM) != query))
        negatives = np.flatnonzero(labels_N != labels_N[query])
        if len(positives):
            expected = literal_hardest(query)
            squared_N = ((unit_ND[query] - unit_ND) ** 2).sum(axis=1)
            pairs_H2, loss_H = hardest_pairs(squared_N, positives, negatives, HARDEST, MARGIN)
            found = dict(zip(map(tuple, pairs_H2.tolist()), loss_H.tolist(), strict=True))
            assert found.keys() == expected.keys()
            assert found == pytest.approx(expected, abs=1e-6)
            assert loss_H.tolist() == sorted(loss_H.tolist(), reverse=True)
            num_checked += 1
    assert num_checked == 58


def test_fewer_triplets_than_asked_for_are_all_there_are() -> None:
    squared_N = np.array([0.0, 1.0, 4.0, 2.0, 3.0], np.float32)
    pairs_H2, loss_H = hardest_pairs(squared_N, np.array([1, 2]), np.array([3, 4]), 25, 0.5)
    assert pairs_H2.tolist() == [[2, 3], [2, 4], [1, 3], [1, 4]]
    assert loss_H.tolist() == [1.25, 0.75, 0.0, 0.0]


def test_equally_hard_pairs_come_by_row() -> None:
    pairs_H2, _ = hardest_pairs(np.ones(5, np.float32), np.array([1, 2]), np.array([3, 4]), 3, 0.1)
    assert pairs_H2.tolist() == [[1, 3], [1, 4], [2, 3]]


def test_every_triplet_is_one_of_the_hardest_of_its_query_and_every_one_of_them_is_drawn() -> None:
    expected = {query: literal_hardest(query) for query in range(NUM)}
    result = mined(58 * 200)
    drawn: dict[int, set[tuple[int, int]]] = {query: set() for query in range(NUM)}
    losses = []
    for query, positive, negative in result.triplets_T3.tolist():
        assert (positive, negative) in expected[query]
        drawn[query].add((positive, negative))
        losses.append(expected[query][positive, negative])
    missed = sum(len(pairs) for pairs in expected.values()) - sum(len(pairs) for pairs in drawn.values())
    assert missed <= 5  # each of about 1,400 is missed with a chance of 0.96^200, 0.0003
    assert result.mean_loss == pytest.approx(np.mean(losses), abs=1e-6)


def test_a_positive_shows_the_same_person_in_another_image_and_a_negative_another_person() -> None:
    _, labels_N = pool()
    query_T, positive_T, negative_T = mined().triplets_T3.T
    assert (labels_N[query_T] == labels_N[positive_T]).all()
    assert (query_T != positive_T).all()
    assert (labels_N[query_T] != labels_N[negative_T]).all()


def test_queries_come_once_before_one_comes_again() -> None:
    _, labels_N = pool()
    eligible = [row for row in range(NUM) if (labels_N == labels_N[row]).sum() > 1]
    queries_T = mined(150).triplets_T3[:, 0].tolist()
    assert sorted(queries_T[:58]) == sorted(queries_T[58:116]) == eligible
    assert len(set(queries_T[116:])) == 150 - 116
    assert queries_T[:58] != queries_T[58:116]


@pytest.mark.parametrize("num_hardest", [1, 25, 100])
def test_mined_triplets_are_harder_than_random_ones(num_hardest: int) -> None:
    result = mined(num_hardest=num_hardest)
    assert result.mean_loss > result.random_loss > 0


def test_the_random_loss_is_the_mean_over_all_triplets_of_the_queries() -> None:
    of_queries = []
    for query in range(NUM):
        losses = literal_hardest(query, num_hardest=NUM**2)
        of_queries += [np.mean(list(losses.values()))] if losses else []
    assert mined(58 * 100).random_loss == pytest.approx(np.mean(of_queries), rel=0.05)


def test_the_single_hardest_triplet_is_the_batch_hard_one() -> None:
    for query, positive, negative in mined(58, num_hardest=1).triplets_T3.tolist():
        assert [(positive, negative)] == list(literal_hardest(query, num_hardest=1))


def test_a_seed_decides_the_triplets() -> None:
    assert np.array_equal(mined(seed=4).triplets_T3, mined(seed=4).triplets_T3)
    assert not np.array_equal(mined(seed=4).triplets_T3, mined(seed=5).triplets_T3)


@pytest.mark.parametrize(
    ("labels_N", "message"),
    [
        (np.arange(NUM), "no person has two images among the 60 of the pool"),
        (np.zeros(NUM, np.int64), "there is only one person among the 60 of the pool"),
    ],
)
def test_a_pool_without_triplets_is_refused(labels_N: NDArray[np.int64], message: str) -> None:
    with pytest.raises(UserError, match=rf"ranking: {message}; raise ranking\.pool_size or give more data"):
        mine_triplets(pool()[0], labels_N, 10, np.random.default_rng(0))
