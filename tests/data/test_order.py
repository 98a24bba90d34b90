import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passreid_ray.data.order import EpochOrder
from passreid_ray.errors import UserError


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 3))
def test_an_epoch_shows_different_rows_and_drops_less_than_a_batch(num_rows: int, batch_size: int, seed: int) -> None:
    if batch_size > num_rows:
        num_rows, batch_size = batch_size, num_rows
    order = EpochOrder(num_rows, batch_size, seed)
    batches = [order.batch(step) for step in range(order.steps_per_epoch)]
    seen = np.concatenate([numbers for _, numbers in batches])
    assert all(draws.tolist() == [0] * batch_size for draws, _ in batches)
    assert len(set(seen)) == len(seen) > num_rows - batch_size
    assert set(seen) <= set(range(num_rows))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_slices_of_all_workers_are_the_global_batch(world_size: int) -> None:
    order = EpochOrder(40, 6, seed=1)
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


def test_substitutes_are_the_next_rows_of_the_epoch_and_wrap_around() -> None:
    order = EpochOrder(5, 5, seed=0)
    sequence = order.batch(0)[1].tolist()
    assert [order.substitute(0, sequence[3], attempt) for attempt in (1, 2, 5)] == [
        sequence[4], sequence[0], sequence[3],
    ]  # fmt: skip


def test_a_batch_larger_than_the_data_is_told() -> None:
    with pytest.raises(UserError, match="9 images per batch, but the data has 8; set batch_size to 8 or less"):
        EpochOrder(8, 9, seed=0)
