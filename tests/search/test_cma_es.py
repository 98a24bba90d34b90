"""CMA-ES on the library."""

import math

import numpy as np
import pytest
from cmaes import CMA

from passreid_ray.errors import UserError
from passreid_ray.search.cma_es import CmaEs, Evaluated, follow


def ellipse(genes_D: np.ndarray) -> float:
    return float((np.array([1.0, 4.0, 9.0]) * (genes_D - np.array([0.2, 0.5, 0.7])) ** 2).sum())


def middle() -> CMA:
    return CMA(np.full(3, 0.5), 0.3, bounds=np.tile([0.0, 1.0], (3, 1)), seed=0, population_size=8)


def test_it_is_the_library_with_a_stream_for_each_generation() -> None:
    strategy = CmaEs(3, population=8, seed=7)
    library = middle()
    for generation in range(10):
        library.reseed_rng(int(np.random.SeedSequence([7, generation]).generate_state(1)[0]))
        solutions = [(genes_D, ellipse(genes_D)) for genes_D in (library.ask() for _ in range(8))]
        for genes_D, fitness in solutions:
            individual = strategy.ask()
            assert individual is not None
            np.testing.assert_array_equal(individual.genes, genes_D)
            strategy.tell(individual.number, fitness)
        library.tell(solutions)


def test_only_ranks_count() -> None:
    plain, cubed = CmaEs(3, population=8), CmaEs(3, population=8)
    for _ in range(80):
        one, other = plain.ask(), cubed.ask()
        assert one is not None
        assert other == one
        plain.tell(one.number, ellipse(np.array(one.genes)))
        cubed.tell(one.number, 1e30 * ellipse(np.array(one.genes)) ** 3)


def test_failures_among_the_better_half_pull_nowhere() -> None:
    gaussian = middle()
    genes = [(0.9, 0.5, 0.5), *[(0.5, 0.0, 0.0)] * 7]
    follow(gaussian, Evaluated(genes, [1.0, *[math.inf] * 7]))
    # The weight of the best of four, by formula (49) of arXiv:1604.00772: 1.0 is the mean's learning rate.
    logs = [math.log(4.5) - math.log(rank) for rank in (1, 2, 3, 4)]
    np.testing.assert_allclose(gaussian.mean, [0.5 + 0.4 * logs[0] / sum(logs), 0.5, 0.5])


def test_failures_rank_behind_every_success() -> None:
    genes = [tuple(genes_D) for genes_D in np.random.default_rng(0).random((8, 3)).tolist()]
    failed, worst = middle(), middle()
    follow(failed, Evaluated(genes, [3.0, math.inf, 1.0, 2.0, math.inf, 0.0, 5.0, 4.0]))
    follow(worst, Evaluated(genes, [3.0, 98.0, 1.0, 2.0, 99.0, 0.0, 5.0, 4.0]))
    np.testing.assert_array_equal(failed.mean, worst.mean)
    np.testing.assert_array_equal(failed.ask(), worst.ask())


def test_a_search_at_rest_begins_again_in_the_middle() -> None:
    strategy = CmaEs(3, population=8)
    spreads = []
    for _ in range(200):
        genes_LD = np.array(strategy.state()["open"]["genes"])
        spreads.append(genes_LD.std(0).max())
        for row, genes_D in enumerate(genes_LD):
            strategy.tell(strategy.generation * 8 + row, ellipse(genes_D))
    rest = int(np.argmin(spreads))
    assert spreads[rest] < 1e-8
    assert max(spreads[rest:]) > 0.1


@pytest.mark.parametrize(
    "wrong", [{"dimension": 0}, {"seed": -1}, {"population": 3}, {"sigma": 0.0}, {"sigma": 1.5}, {"sigma": math.nan}]
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="evolution"):
        CmaEs(**{"dimension": 6, **wrong})


@pytest.mark.parametrize("dimension", [1, 2])
def test_the_smallest_population_evolves_few_genes(dimension: int) -> None:
    strategy = CmaEs(dimension, population=4)
    for number in range(4 * 40):
        individual = strategy.ask()
        assert individual is not None
        strategy.tell(number, float(np.sum((np.array(individual.genes) - 0.3) ** 2)))
    assert strategy.best is not None
    assert strategy.best[1] < 1e-3


@pytest.mark.parametrize("key", ["genes", "fitness"])
def test_a_history_that_lacks_an_individual_is_refused(key: str) -> None:
    strategy = CmaEs(3, population=8)
    for number in range(8):
        strategy.tell(number, float(number))
    state = strategy.state()
    state["history"][0][key].pop()
    with pytest.raises(UserError, match="is damaged"):
        CmaEs.from_state(state)


def test_a_generation_in_which_all_fail_is_followed_by_another_draw_of_the_same_gaussian() -> None:
    untouched, gaussian = middle(), middle()
    follow(gaussian, Evaluated(np.random.default_rng(0).random((8, 3)).tolist(), [math.inf] * 8))
    np.testing.assert_array_equal([gaussian.ask() for _ in range(8)], [untouched.ask() for _ in range(8)])
