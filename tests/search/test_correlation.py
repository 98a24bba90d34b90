"""Agreement of a label-free fitness with mAP."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from passreid_ray.errors import UserError
from passreid_ray.search import rank_correlation


def scipys(fitness: Any, score: Any) -> tuple[float, float]:
    rho, p_value = np.asarray(spearmanr(fitness, score))
    return float(rho), float(p_value)


@pytest.mark.parametrize("num_pairs", [5, 12, 60])
def test_rho_is_scipys_with_ties(num_pairs: int) -> None:
    rng = np.random.default_rng(0)
    fitness_N, score_N = rng.integers(0, 6, num_pairs), rng.random(num_pairs)
    correlation = rank_correlation(fitness_N, score_N)
    assert correlation.rho == pytest.approx(scipys(fitness_N, score_N)[0])
    assert correlation.num_pairs == num_pairs


def test_p_of_a_few_pairs_counts_every_order() -> None:
    fitness, score = [0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.8, 0.5, 0.6, 0.1]
    correlation = rank_correlation(fitness, score)
    rhos = [scipys(fitness, order)[0] for order in itertools.permutations(score)]
    as_far = np.mean([abs(rho) >= 0.9 - 1e-9 for rho in rhos])
    assert correlation.rho == pytest.approx(-0.9)
    assert correlation.p_value == pytest.approx(as_far)


def test_p_of_many_pairs_is_near_students() -> None:
    rng = np.random.default_rng(1)
    fitness_N = rng.random(30)
    score_N = rng.random(30) - 0.3 * fitness_N
    correlation = rank_correlation(fitness_N, score_N)
    expected = scipys(fitness_N, score_N)[1]
    assert 0.001 < expected < 0.5
    assert correlation.p_value == pytest.approx(expected, rel=0.3)


def test_a_perfect_order_of_three_proves_nothing() -> None:
    correlation = rank_correlation([1, 2, 3], [3, 2, 1])
    assert correlation.rho == pytest.approx(-1)
    assert correlation.p_value == pytest.approx(1 / 3)
    assert "chance alone may give that" in correlation.in_words()


def test_failures_are_left_out_of_both() -> None:
    fitness = [1.0, math.inf, 2.0, 3.0, 4.0, 5.0]
    score = [0.5, 0.9, 0.4, math.nan, 0.3, 0.2]
    correlation = rank_correlation(fitness, score)
    assert (correlation.num_pairs, correlation.num_left_out) == (4, 2)
    assert correlation.rho == pytest.approx(-1)
    assert "over 4 individuals, 2 left out" in correlation.in_words()


@pytest.mark.parametrize(("fitness", "score"), [([], []), ([1, 2], [2, 1]), ([1, 1, 1], [1, 2, 3])])
def test_without_three_that_differ_there_is_no_correlation(fitness: list[float], score: list[float]) -> None:
    correlation = rank_correlation(fitness, score)
    assert math.isnan(correlation.rho)
    assert math.isnan(correlation.p_value)
    assert "no rank correlation" in correlation.in_words()


def test_the_words_say_which_way_it_goes() -> None:
    up = np.arange(10.0)
    good = rank_correlation(up, -up).in_words("KL", "mAP")
    bad = rank_correlation(up, up).in_words("KL", "mAP")
    assert good.startswith("KL and mAP: Spearman -1.00 (p = 0.0001) over 10 individuals: a lower KL went with a higher")
    assert bad.endswith("a lower KL went with a LOWER mAP; do not select by it")


def test_the_words_know_a_fitness_of_which_more_is_better() -> None:
    up = np.arange(10.0)
    good = rank_correlation(up, up).in_words("rank", "mAP", "max")
    bad = rank_correlation(up, -up).in_words("rank", "mAP", "max")
    assert good.endswith("Spearman +1.00 (p = 0.0001) over 10 individuals: a higher rank went with a higher mAP")
    assert bad.endswith("a higher rank went with a LOWER mAP; do not select by it")


def test_the_same_seed_gives_the_same_p() -> None:
    rng = np.random.default_rng(2)
    fitness_N, score_N = rng.random(20), rng.random(20)
    assert rank_correlation(fitness_N, score_N, seed=3) == rank_correlation(fitness_N, score_N, seed=3)


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(UserError, match="one length"):
        rank_correlation([1, 2, 3], [1, 2])
