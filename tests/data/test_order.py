from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passreid_ray.data.order import EpochOrder, Rest, first_step
from passreid_ray.errors import UserError


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 3))
def test_an_epoch_shows_different_rows_and_drops_less_than_a_batch(num_rows: int, batch_size: int, seed: int) -> None:
    if batch_size > num_rows:
        num_rows, batch_size = batch_size, num_rows
    order = EpochOrder(num_rows, batch_size, seed)
    batches = [order.batch(step) for step in range(int(order.steps_per_epoch))]
    seen = np.concatenate([numbers for _, numbers in batches])
    assert all(draws.tolist() == [0] * batch_size for draws, _ in batches)
    assert len(set(seen)) == len(seen) > num_rows - batch_size
    assert set(seen) <= set(range(num_rows))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3))
def test_carried_rows_are_seen_before_those_of_the_next_epoch(num_rows: int, batch_size: int, seed: int) -> None:
    if batch_size > num_rows:
        num_rows, batch_size = batch_size, num_rows
    order = EpochOrder(num_rows, batch_size, seed, rest="carry")
    assert order.steps_per_epoch == Fraction(num_rows, batch_size)
    batches = [order.batch(step) for step in range(first_step(3, order.steps_per_epoch))]
    draws, numbers = (np.concatenate(own)[: 3 * num_rows] for own in zip(*batches, strict=True))
    assert draws.tolist() == np.repeat([0, 1, 2], num_rows).tolist()
    for epoch in range(3):
        assert sorted(numbers[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


@pytest.mark.parametrize("rest", ["drop", "carry"])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_slices_of_all_workers_are_the_global_batch(world_size: int, rest: Rest) -> None:
    order = EpochOrder(40, 6, seed=1, rest=rest)
    for step in (0, 5, 6, 20):
        draws, whole = order.batch(step)
        slices = [order.batch(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate([own for own, _ in slices]), draws)
        assert np.array_equal(np.concatenate([numbers for _, numbers in slices]), whole)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order, other = EpochOrder(100, 100, seed=0), EpochOrder(100, 100, seed=1)
    assert order.batch(1)[0].tolist() == [1] * 100
    firsts = [tuple(own.batch(step)[1]) for own in (order, other) for step in (0, 1)]
    assert len(set(firsts)) == 4
    assert tuple(EpochOrder(100, 100, seed=0).batch(1)[1]) == firsts[1]


@pytest.mark.parametrize(("rest", "ends"), [("drop", [3, 3, 3, 6]), ("carry", [4, 4, 4, 4, 7, 7, 7, 10])])
def test_a_window_is_an_epoch(rest: Rest, ends: list[int]) -> None:
    order = EpochOrder(10, 3, seed=0, rest=rest)
    assert [order.window_end(step) for step in range(len(ends))] == ends


def test_substitutes_are_the_next_rows_of_the_epoch_and_wrap_around() -> None:
    order = EpochOrder(5, 5, seed=0)
    sequence = order.batch(0)[1].tolist()
    assert [order.substitute(0, sequence[3], attempt) for attempt in (1, 2, 5)] == [
        sequence[4], sequence[0], sequence[3],
    ]  # fmt: skip


def test_a_batch_larger_than_the_data_is_told() -> None:
    with pytest.raises(UserError, match="9 images per batch, but the data has 8; set batch_size to 8 or less"):
        EpochOrder(8, 9, seed=0)
