"""Batches of mined triplets: the same for every number of workers."""

import numpy as np
import pytest

from passreid_ray.data.triplet_order import TripletOrder
from passreid_ray.errors import UserError

PER_STEP, STEPS, FIRST = 6, 4, 10
FIRST_DRAW = 1000
LABELS_N = np.array([0, 1, 0, 2, 1, 0, 2, 3, 1, 0])


def new_order() -> TripletOrder:
    """Triplets of random rows for steps 10 to 13."""
    triplets_T3 = np.random.default_rng(0).integers(0, len(LABELS_N), (PER_STEP * STEPS, 3))
    return TripletOrder(triplets_T3, LABELS_N, PER_STEP, FIRST, FIRST_DRAW)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_shares_of_all_workers_together_are_the_triplets_of_the_step(world_size: int) -> None:
    order = new_order()
    for step in range(FIRST, FIRST + STEPS):
        shares = [order.batch(step, rank, world_size)[1] for rank in range(world_size)]
        found = [triplet for rows in shares for triplet in zip(*np.split(rows, 3), strict=True)]
        place = (step - FIRST) * PER_STEP
        assert found == [tuple(triplet) for triplet in order.triplets_T3[place : place + PER_STEP]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_image_has_the_same_draw_on_any_worker(world_size: int) -> None:
    order = new_order()
    alone = np.stack(order.batch(FIRST + 1)).reshape(2, 3, PER_STEP)
    shares = [np.stack(order.batch(FIRST + 1, rank, world_size)).reshape(2, 3, -1) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares, axis=2), alone)


def test_no_draw_comes_twice_and_each_tells_its_step() -> None:
    order = new_order()
    draws = [order.batch(step)[0] for step in range(FIRST, FIRST + STEPS)]
    assert len(np.unique(np.concatenate(draws))) == STEPS * order.batch_size == STEPS * 18
    for step, own in enumerate(draws, FIRST):
        assert ((own - FIRST_DRAW) // order.batch_size == step - FIRST).all()


def test_a_round_that_begins_later_goes_on_with_fresh_draws() -> None:
    earlier = new_order()
    later = TripletOrder(
        earlier.triplets_T3, LABELS_N, PER_STEP, FIRST + STEPS, FIRST_DRAW + STEPS * earlier.batch_size
    )
    assert np.array_equal(later.batch(FIRST + STEPS)[1], earlier.batch(FIRST)[1])
    assert later.batch(FIRST + STEPS)[0].min() > earlier.batch(FIRST + STEPS - 1)[0].max()


def test_a_substitute_is_another_image_of_the_person_as_long_as_there_is_one() -> None:
    order = new_order()
    for row, label in enumerate(LABELS_N):
        own = set(np.flatnonzero(label == LABELS_N).tolist())
        tried = [order.substitute(0, row, attempt) for attempt in range(1, len(own))]
        assert set(tried) == own - {row}


def test_substitutes_reach_every_row_of_the_data_once() -> None:
    order = new_order()
    for row in range(order.num_rows):
        tried = [order.substitute(0, row, attempt) for attempt in range(1, order.num_rows)]
        assert sorted([row, *tried]) == list(range(order.num_rows))


def test_substitutes_do_not_depend_on_the_draw() -> None:
    order = new_order()
    assert [order.substitute(3, 4, attempt) for attempt in range(1, 10)] == [
        order.substitute(99, 4, attempt) for attempt in range(1, 10)
    ]


def test_triplets_that_workers_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(UserError, match=r"triplets_per_step: 6 triplets cannot be divided among 4 workers"):
        new_order().batch(FIRST, 0, 4)
