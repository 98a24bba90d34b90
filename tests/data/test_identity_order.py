import pickle
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passreid_ray.data.identity_order import IdentityOrder
from passreid_ray.errors import UserError


def shop(num_identities: int = 23, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and cameras of a mixed lot: 1 to 12 images each, 1 to 3 cameras, a few outliers, numbers with gaps."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 13, num_identities)
    labels = np.concatenate([np.repeat(np.arange(num_identities) * 3, sizes), [-1] * 7])
    cameras = np.array([f"c{number}" for number in rng.integers(0, 3, len(labels))], dtype=object)
    shuffle = rng.permutation(len(labels))
    return labels[shuffle], cameras[shuffle]


def groups_of(order: IdentityOrder, step: int) -> np.ndarray:
    return order.batch(step)[1].reshape(-1, order.images_per_identity)


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 6), st.integers(1, 5), st.integers(0, 50))
def test_a_batch_is_whole_groups_of_one_identity_each_without_outliers(
    seed: int, num_identities: int, per_batch: int, images: int, step: int
) -> None:
    labels, cameras = shop(num_identities, seed)
    order = IdentityOrder(labels, cameras, per_batch * images, images, seed)
    draws, rows = order.batch(step)
    groups = labels[rows].reshape(per_batch, images)
    assert len(draws) == len(rows) == per_batch * images
    assert (groups == groups[:, :1]).all()
    assert (groups >= 0).all()
    times = Counter(groups[:, 0].tolist()).values()
    assert max(times) - min(times) <= 1
    assert len(times) == min(per_batch, num_identities)


def test_a_pass_shows_every_identity_once_and_drops_less_than_a_batch() -> None:
    labels, cameras = shop(23)
    order = IdentityOrder(labels, cameras, 5 * 4, 4, seed=0)
    assert (order.num_identities, order.identities_per_batch, order.steps_per_pass) == (23, 5, 4)
    passes = []
    for number in range(3):
        steps = range(number * 4, number * 4 + 4)
        seen = np.concatenate([labels[groups_of(order, step)[:, 0]] for step in steps]).tolist()
        assert len(set(seen)) == len(seen) == 20
        passes.append(tuple(seen))
    assert len(set(passes)) == 3
    whole = IdentityOrder(labels, cameras, 23 * 4, 4, seed=0)
    assert set(labels[whole.batch(0)[1]]) == set(labels[labels >= 0])


@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(0, 20), st.booleans())
def test_companions_have_other_cameras_than_the_anchor_and_repeat_only_where_too_few(
    seed: int, images: int, step: int, has_cameras: bool
) -> None:
    labels, cameras = shop(seed=seed)
    if not has_cameras:
        cameras = np.array([None] * len(labels), dtype=object)
    order = IdentityOrder(labels, cameras if seed % 2 or has_cameras else None, 8 * images, images, seed)
    for anchor, *companions in groups_of(order, step).tolist():
        own = set(np.flatnonzero(labels == labels[anchor]).tolist())
        candidates = {row for row in own if cameras[row] != cameras[anchor]} or own - {anchor} or {anchor}
        times = Counter(companions)
        assert times.keys() <= candidates
        assert len(times) == min(len(candidates), images - 1)
        assert max(times.values()) - min(times.values()) <= 1


def test_every_image_is_an_anchor_as_often_as_any_other() -> None:
    labels, cameras = np.zeros(5, int), np.array(["a", "a", "a", "a", "b"], dtype=object)
    order = IdentityOrder(labels, cameras, 2, 2, seed=0)
    times = Counter(int(order.batch(step)[1][0]) for step in range(2000))
    assert all(abs(times[row] - 400) < 75 for row in range(5))  # 4 standard deviations


def test_a_single_image_fills_its_group() -> None:
    labels = np.array([4, -1, 9, 9, 9, 9])
    order = IdentityOrder(labels, None, 8, 4, seed=0)
    groups = {int(labels[group[0]]): sorted(group) for group in groups_of(order, 0).tolist()}
    assert groups == {4: [0, 0, 0, 0], 9: [2, 3, 4, 5]}


def test_with_few_identities_a_batch_goes_round_them_with_images_not_yet_seen() -> None:
    labels = np.repeat([0, 1], 12)
    order = IdentityOrder(labels, None, 6 * 4, 4, seed=0)
    assert order.steps_per_pass == 1
    for step in range(5):
        assert sorted(order.batch(step)[1].tolist()) == list(range(24))  # every image exactly once
    twice = IdentityOrder(labels, None, 12 * 4, 4, seed=0)
    assert set(Counter(twice.batch(0)[1].tolist()).values()) == {2}


@pytest.mark.parametrize("num_identities", [1, 3, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 24])
def test_the_slices_of_all_workers_are_the_global_batch(num_identities: int, world_size: int) -> None:
    labels, cameras = shop(num_identities)
    order = IdentityOrder(labels, cameras, 24, 4, seed=1)  # 8 and 24 workers cut through the groups
    for step in (0, 1, 7):
        whole = order.batch(step)
        slices = [order.batch(step, rank, world_size) for rank in range(world_size)]
        for position in range(2):
            assert [len(own[position]) for own in slices] == [24 // world_size] * world_size
            assert np.array_equal(np.concatenate([own[position] for own in slices]), whole[position])


def test_no_draw_comes_twice() -> None:
    order = IdentityOrder(*shop(), 20, 4, seed=0)
    draws = np.concatenate([order.batch(step)[0] for step in range(30)])
    assert np.issubdtype(draws.dtype, np.integer)
    assert len(set(draws.tolist())) == len(draws)


def test_steps_and_seeds_have_batches_of_their_own_and_the_same_ones_again() -> None:
    labels, cameras = shop()
    batches = [
        tuple(IdentityOrder(labels, cameras, 20, 4, seed).batch(step)[1]) for seed in (0, 1) for step in (0, 1, 4, 8)
    ]
    assert len(set(batches)) == len(batches)
    again = IdentityOrder(labels, cameras, 20, 4, 1)
    assert [tuple(again.batch(step)[1]) for step in (8, 0)] == [batches[7], batches[4]]


def test_substitutes_are_the_other_images_of_the_identity_then_those_of_others() -> None:
    labels, cameras = shop()
    order = IdentityOrder(labels, cameras, 20, 4, seed=0)
    identities = np.unique(labels[labels >= 0]).tolist()
    first = int(np.flatnonzero(labels >= 0)[0])
    for row in np.flatnonzero(labels >= 0).tolist():
        own = set(np.flatnonzero(labels == labels[row]).tolist()) - {row}
        following = identities[(identities.index(labels[row]) + 1) % len(identities)]
        found = [order.substitute(17, row, attempt) for attempt in range(1, len(own) + 2)]
        assert set(found[:-1]) == own
        assert len(found) == len(own) + 1
        assert labels[found[-1]] == following
    assert all(labels[order.substitute(0, first, attempt)] >= 0 for attempt in range(1, len(labels)))


def test_a_million_rows_travel_as_plain_arrays_and_batches_take_no_time() -> None:
    rng = np.random.default_rng(0)
    labels, cameras = rng.integers(-1, 50_000, 1_000_000), rng.integers(0, 15, 1_000_000)
    order = IdentityOrder(labels, cameras, 256, 8, seed=0)
    packed = pickle.dumps(order, protocol=5)
    assert len(packed) < 9_000_000
    unpacked = pickle.loads(packed)
    start = time.process_time()
    batches = [unpacked.batch(step)[1] for step in range(10)]
    assert time.process_time() - start < 10 * 256 * 1e-3
    assert all(np.array_equal(own, order.batch(step)[1]) for step, own in enumerate(batches))


def test_orders_that_cannot_be_made_are_told() -> None:
    labels = np.zeros(40, int)
    with pytest.raises(
        UserError, match=r"batch_size: 30 images cannot be made of identities with 4 images each .* of 4"
    ):
        IdentityOrder(labels, None, 30, 4, seed=0)
    with pytest.raises(UserError, match="labels: none of the 40 images has an identity"):
        IdentityOrder(labels - 1, None, 32, 4, seed=0)
    with pytest.raises(UserError, match="cameras: 3 cameras for 40 labels"):
        IdentityOrder(labels, np.array(["a", "b", None]), 32, 4, seed=0)
    order = IdentityOrder(labels, None, 32, 4, seed=0)
    with pytest.raises(UserError, match=r"batch_size: 32 images cannot be divided among 3 workers; .* of 3"):
        order.batch(0, 0, 3)
