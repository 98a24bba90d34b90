import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passreid_ray.data.order import EpochOrder, Rest, first_step
from passreid_ray.data.streamed_order import FULL_SHUFFLE_ROWS, OrderConfig, RowGroups, StreamedOrder
from passreid_ray.errors import UserError

Batches = list[tuple[np.ndarray, np.ndarray]]


@st.composite
def orders(draw: st.DrawFn, rest: Rest = "drop") -> StreamedOrder:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=30))
    num_streams = draw(st.integers(1, 6))
    batch_size = num_streams * draw(st.integers(1, 4))
    num_rows = sum(sizes)
    if batch_size > num_rows:
        sizes, num_rows = [*sizes, batch_size - num_rows], batch_size
    groups = RowGroups(np.cumsum([0, *sizes[:-1]]), num_rows)
    return StreamedOrder(groups, batch_size, draw(st.integers(0, 3)), num_streams, draw(st.integers(1, 20)), rest)


def epoch_of(order: StreamedOrder, epoch: int, world_size: int = 1, start: int | None = None) -> Batches:
    """All workers' batches from step ``start`` to the end of the epoch, put together step by step."""
    first, last = (first_step(epoch + plus, order.steps_per_epoch) for plus in (0, 1))
    steps = range(first if start is None else start, last)
    slices = [[order.batch(step, rank, world_size) for rank in range(world_size)] for step in steps]
    joined = ([np.concatenate(own) for own in zip(*parts, strict=True)] for parts in slices)
    return [(draws, numbers) for draws, numbers in joined]


@given(orders())
@settings(max_examples=50, deadline=None)
def test_every_epoch_shows_each_row_at_most_once_and_drops_less_than_a_batch(order: StreamedOrder) -> None:
    for epoch in (0, 1):
        batches = epoch_of(order, epoch)
        seen = np.concatenate([numbers for _, numbers in batches])
        assert all(draws.tolist() == [epoch] * order.batch_size for draws, _ in batches)
        assert len(set(seen)) == len(seen) > order.num_rows - order.batch_size
        assert set(seen) <= set(range(order.num_rows))


@given(orders(rest="carry"))
@settings(max_examples=50, deadline=None)
def test_with_carried_rows_every_epoch_shows_each_row_exactly_once(order: StreamedOrder) -> None:
    steps = first_step(3, order.steps_per_epoch) + 3 * order.num_streams  # streams may be a few rows apart
    draws, numbers = (np.concatenate(own) for own in zip(*[order.batch(step) for step in range(steps)], strict=True))
    for epoch in (0, 1, 2):
        assert sorted(numbers[draws == epoch]) == list(range(order.num_rows))


@given(orders(), st.data())
@settings(max_examples=50, deadline=None)
def test_any_number_of_workers_from_any_step_on_sees_the_sequence_of_one(
    order: StreamedOrder, data: st.DataObject
) -> None:
    alone = epoch_of(order, 1)
    first = int(order.steps_per_epoch)
    start = data.draw(st.integers(first, 2 * first - 1))
    for world_size in (own for own in (1, 2, 3, 4, 6) if order.num_streams % own == 0):
        again = epoch_of(order, 1, world_size, start)
        for (draws, numbers), (own_draws, own_numbers) in zip(alone[start - first :], again, strict=True):
            assert np.array_equal(draws, own_draws)
            assert np.array_equal(numbers, own_numbers)


def test_streams_take_neighbouring_row_groups_and_windows_mix_them() -> None:
    order = StreamedOrder(RowGroups(np.arange(0, 4000, 100), 4000), 16, 0, num_streams=4, window_rows=500)
    steps_per_window = 500 // 4
    first = np.concatenate([order.batch(step, 0, 4)[1] for step in range(steps_per_window)])
    groups, counts = np.unique(first // 100, return_counts=True)
    assert len(groups) == 5
    assert set(counts) == {100}
    assert len(set(first[:20] // 100)) > 3  # shuffled, not group after group


@given(orders(), st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_a_window_ends_where_rows_of_other_windows_begin(order: StreamedOrder, step: int) -> None:
    end = order.window_end(step)
    windows = order._window_length() // order.rows_per_step
    position = step % int(order.steps_per_epoch)
    assert end > step
    assert end - step == min(windows - position % windows, int(order.steps_per_epoch) - position)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    groups = RowGroups(np.arange(0, 2000, 50), 2000)
    firsts = {
        tuple(StreamedOrder(groups, 8, seed, 4, 100).batch(step)[1].tolist()) for seed in (0, 1) for step in (0, 250)
    }
    assert len(firsts) == 4


def test_substitutes_lie_all_over_the_data_and_are_the_same_every_time() -> None:
    order = StreamedOrder(RowGroups(np.array([0, 5000]), 10_000), 2, 0, 1, 4)
    rows = [order.substitute(0, 8, attempt) for attempt in range(1, 50)]
    assert len(set(rows)) > 40
    assert min(rows) < 1000
    assert max(rows) > 9000
    assert rows == [order.substitute(0, 8, attempt) for attempt in range(1, 50)]


def build(num_rows: int, num_workers: int = 1, batch_size: int = 48, **settings: Any) -> EpochOrder | StreamedOrder:
    starts = np.arange(0, num_rows, 128)
    return OrderConfig(**settings).build(starts, num_rows, batch_size=batch_size, seed=0, num_workers=num_workers)


def test_small_data_are_shuffled_as_a_whole_and_large_data_in_streams() -> None:
    assert isinstance(build(FULL_SHUFFLE_ROWS), EpochOrder)
    large = build(FULL_SHUFFLE_ROWS + 1, num_workers=3)
    assert isinstance(large, StreamedOrder)
    assert large.num_streams == 24
    assert isinstance(build(1000, streams=4), StreamedOrder)


def test_numbers_that_do_not_divide_are_told() -> None:
    with pytest.raises(UserError, match="5 workers cannot share 24 streams of data alike; give a divisor of 24, or"):
        build(FULL_SHUFFLE_ROWS + 1, num_workers=5)
    with pytest.raises(UserError, match=r"order\.streams: 7 streams cannot fill batches of 48 images alike"):
        build(1000, streams=7)
    with pytest.raises(UserError, match="9 images per batch, but the data has 8"):
        build(8, batch_size=9, streams=3)


BILLION = """
import time
import numpy as np
from passreid_ray.data.streamed_order import RowGroups, StreamedOrder
def peak():  # not getrusage, which begins at the peak of the parent
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
groups = RowGroups(np.arange(0, 10**9, 1000), 10**9)
seconds = []
for rank, step in [(0, 0), (1023, 123_456), (511, 900_000)]:
    order = StreamedOrder(groups, 1024, 0, 1024, 1024)  # as after a restart: nothing is remembered
    start = time.process_time()
    draws, numbers = order.batch(step, rank, 1024)
    seconds.append(time.process_time() - start)
    assert len(numbers) == 1
print(max(seconds), peak() - before)
"""


def test_of_a_billion_rows_any_workers_next_batch_is_known_at_once_in_little_memory() -> None:
    done = subprocess.run([sys.executable, "-c", BILLION], capture_output=True, text=True, check=True)
    seconds, num_bytes = map(float, done.stdout.split())
    assert seconds < 1
    assert num_bytes < 500e6


def test_of_a_billion_rows_a_sample_of_workers_sees_each_row_of_its_piece_exactly_once() -> None:
    order = StreamedOrder(RowGroups(np.arange(0, 10**9, 1000), 10**9), 8192, 3, 1024, 1024)
    first = int(order.steps_per_epoch)  # the second epoch
    pieces = [
        np.concatenate([order.batch(step, rank, 1024)[1] for step in range(first, 2 * first, 1)]) for rank in (0, 517)
    ]
    for rows in pieces:
        assert len(rows) == len(np.unique(rows)) == first * 8
        assert len(np.unique(rows // 1000)) <= -(-first * 8 // 1000) + 1  # no other worker's row groups but at the ends
    assert not set(pieces[0].tolist()) & set(pieces[1].tolist())
