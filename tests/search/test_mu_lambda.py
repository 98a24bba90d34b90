"""Selection, crossover and mutation of the (mu, lambda) strategy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passreid_ray.errors import UserError
from passreid_ray.search.mu_lambda import MuLambda, children, reflected, selected


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf]), min_size=1, max_size=12), st.integers(1, 5))
def test_no_row_that_is_left_out_is_better_than_one_that_is_chosen(fitness: list[float], num_parents: int) -> None:
    chosen = selected(fitness, num_parents)
    left_out = [row for row in range(len(fitness)) if row not in chosen]
    assert len(chosen) == min(num_parents, sum(math.isfinite(value) for value in fitness))
    assert all((fitness[one], one) < (fitness[other], other) for one in chosen for other in left_out)


@given(st.floats(0, 1), st.integers(-3, 3))
def test_a_mirror_at_either_end_shows_the_same_gene(gene: float, room: int) -> None:
    images = np.array([2 * room + gene, 2 * room - gene])
    np.testing.assert_allclose(reflected(images), gene, atol=1e-12)


def test_genes_in_range_are_not_moved_by_the_mirror() -> None:
    genes = np.linspace(0, 1, 101)
    np.testing.assert_array_equal(reflected(genes), genes)


def test_intermediate_children_lie_around_the_mean_of_the_parents() -> None:
    parents_MD = np.array([[0.2, 0.5], [0.4, 0.5], [0.6, 0.8]])
    genes_LD, steps_L = children(parents_MD, np.full(3, 1e-6), 50, np.random.default_rng(0))
    np.testing.assert_allclose(genes_LD, np.broadcast_to([0.4, 0.6], (50, 2)), atol=1e-4)
    assert steps_L.shape == (50,)


def test_steps_are_log_normal_about_the_mean_step_of_the_parents_and_moves_follow_them() -> None:
    dimension, num_children = 4, 20_000
    parents_MD = np.full((2, dimension), 0.5)
    genes_LD, steps_L = children(parents_MD, np.array([1e-3, 3e-3]), num_children, np.random.default_rng(0))
    logs = np.log(steps_L / 2e-3)
    # Standard deviation 1 / sqrt(D) = 0.5; the bounds are four standard errors.
    assert abs(logs.mean()) < 4 * 0.5 / math.sqrt(num_children)
    assert abs(logs.std() - 0.5) < 4 * 0.5 / math.sqrt(2 * num_children)
    moves = (genes_LD - 0.5) / steps_L[:, None]
    assert abs(moves.mean()) < 4 / math.sqrt(dimension * num_children)
    assert abs(moves.std() - 1) < 4 / math.sqrt(2 * dimension * num_children)


def test_parents_die_with_their_generation() -> None:
    strategy = MuLambda(2, population=6, parents=1, seed=0, step=0.01)
    first = strategy.ask()
    assert first is not None
    for number in range(6):
        strategy.tell(number, float(number))  # number 0 is the best there ever is
    for number in range(6, 12):
        strategy.tell(number, 100.0 + number)
    parent = strategy.state()["parent_genes"]
    assert strategy.best == (first, 0.0)
    assert parent != [list(first.genes)]


def test_the_first_generation_covers_the_range() -> None:
    genes = np.array(MuLambda(2, population=2000, seed=0).state()["open"]["genes"])
    counts = np.histogram2d(genes[:, 0], genes[:, 1], bins=4, range=[[0, 1], [0, 1]])[0]
    assert counts.min() > 80  # 125 in each of 16 fields on average


@pytest.mark.parametrize(
    "wrong",
    [
        {"dimension": 0},
        {"seed": -1},
        {"parents": 0},
        {"parents": 12},
        {"step": 0.0},
        {"step": 0.6},
        {"step": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="evolution"):
        MuLambda(**{"dimension": 6, **wrong})
