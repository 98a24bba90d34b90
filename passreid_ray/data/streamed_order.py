"""The order of data that is too large to be shuffled as a whole: canonical streams over shuffled row groups.

An epoch permutes the row groups, lays their rows end to end and cuts this line into one piece per canonical stream. A
stream shuffles its piece window by window. A global batch is the next few rows of every stream, stream after
stream: the same for every number of workers. A worker has whole streams, so hardly any row group is read by two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from pydantic import Field

from passreid_ray.config import Section
from passreid_ray.data.order import EpochOrder, Rest, check_batch_size, permutation, steps_per_epoch
from passreid_ray.errors import UserError

FULL_SHUFFLE_ROWS = 32768
"""Up to here a reader can hold the encoded images of a whole epoch."""
MAX_AUTO_STREAMS = 32


class OrderConfig(Section):
    """In which order rows are seen: it decides what every batch holds, whatever the number of workers."""

    streams: int | None = Field(default=None, ge=1)
    """Canonical streams that a batch is made of; the number of workers must divide it, and it must divide batch_size.
    None: data of up to 32,768 rows are shuffled as a whole and shared by any number of workers, each of which reads
    all row groups of packed data; of more, the largest number of streams up to 32 that divides batch_size."""
    window_rows: int = Field(default=1024, ge=1)
    """Rows of one stream that are shuffled together. Whoever reads for a worker holds so many encoded images of each
    of the worker's streams, and reads the next as many meanwhile."""
    rest: Rest = "drop"
    """Rows of an epoch that do not fill a batch: "drop" leaves them out (others in every epoch), "carry" puts them
    before those of the next epoch. Streams whose lengths differ by a row then drift apart by a row an epoch."""

    def build(
        self, group_starts: np.ndarray, num_rows: int, *, batch_size: int, seed: int, num_workers: int
    ) -> "EpochOrder | StreamedOrder":
        """The order of ``num_rows`` rows whose row groups begin at ``group_starts``.

        Raises ``UserError`` when the data does not fill a batch, or when streams, batch and workers do not divide.
        """
        check_batch_size(batch_size, num_rows)
        streams = self.streams
        if streams is None:
            if num_rows <= FULL_SHUFFLE_ROWS:
                return EpochOrder(num_rows, batch_size, seed, self.rest)
            streams = max(number for number in range(1, MAX_AUTO_STREAMS + 1) if batch_size % number == 0)
        if batch_size % streams:
            raise UserError(
                f"order.streams: {streams} streams cannot fill batches of {batch_size} images alike; give a divisor of "
                "batch_size"
            )
        if streams % num_workers:
            raise UserError(
                f"workers.num_workers: {num_workers} workers cannot share {streams} streams of data alike; give a "
                f"divisor of {streams}, or for a new run an order.streams that {num_workers} divides"
            )
        return StreamedOrder(RowGroups(group_starts, num_rows), batch_size, seed, streams, self.window_rows, self.rest)


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Runs of neighbouring rows that are read together."""

    starts: np.ndarray
    """First row of each group, ascending from 0."""
    num_rows: int

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each group."""
        return np.diff(self.starts, append=self.num_rows)


class _Line(NamedTuple):
    """An epoch's row groups, end to end."""

    shifts: np.ndarray
    """What makes a row number of a position on the line, per place in the line."""
    ends: np.ndarray
    """Position behind each place's last row."""

    def rows(self, first: int, last: int) -> np.ndarray:
        """Row numbers at the positions from ``first`` to ``last`` - 1."""
        low, high = np.searchsorted(self.ends, [first, last - 1], side="right")
        positions = np.arange(first, last)
        places = low + np.searchsorted(self.ends[low:high], positions, side="right")
        return positions + self.shifts[places]


@dataclass(frozen=True, eq=False)
class StreamedOrder:
    """Canonical streams of shuffled windows over shuffled row groups; what is in memory does not grow with the rows."""

    groups: RowGroups
    batch_size: int
    """Images of a global batch, over all workers together."""
    seed: int
    num_streams: int
    window_rows: int
    rest: Rest = "drop"

    @property
    def num_rows(self) -> int:
        """Rows of the data that is ordered."""
        return self.groups.num_rows

    @property
    def steps_per_epoch(self) -> Fraction:
        """Global batches in an epoch; whole unless the rest of an epoch is carried over."""
        return steps_per_epoch(self.num_rows, self.batch_size, self.rest)

    @property
    def rows_per_step(self) -> int:
        """Rows that every stream gives to a global batch."""
        return self.batch_size // self.num_streams

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(draws, row numbers) of one worker's slice of the global batch at ``step``; the draw is the epoch."""
        own = self.num_streams // world_size
        pieces = [piece for stream in range(rank * own, (rank + 1) * own) for piece in self._pieces(stream, step)]
        draws, numbers = zip(*pieces, strict=True)
        return np.repeat(draws, [len(rows) for rows in numbers]), np.concatenate(numbers)

    def window_end(self, step: int) -> int:
        """The first step after ``step`` whose rows come from other windows."""
        epoch, offset = divmod(step * self.rows_per_step, self._length(0))
        window_end = min(offset - offset % self._window_length() + self._window_length(), self._length(0))
        return -(-(epoch * self._length(0) + window_end) // self.rows_per_step)

    def substitute(self, draw: int, row: int, attempt: int) -> int:
        """The row that takes the place of one that cannot be read: any of the data, for bad ones come in runs."""
        return int(np.random.default_rng([self.seed, draw, row, attempt]).integers(self.num_rows))

    def _pieces(self, stream: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, rows) that ``stream`` gives to ``step``, window by window."""
        length = self._length(stream)
        position, end = step * self.rows_per_step, (step + 1) * self.rows_per_step
        while position < end:
            epoch, offset = divmod(position, length)
            window, inside = divmod(offset, self._window_length())
            rows = _window(self, stream, epoch, window)[inside : inside + end - position]
            yield epoch, rows
            position += len(rows)

    def _length(self, stream: int) -> int:
        """Rows that ``stream`` gives in an epoch."""
        if self.rest == "drop":
            return int(self.steps_per_epoch) * self.rows_per_step
        return (stream + 1) * self.num_rows // self.num_streams - stream * self.num_rows // self.num_streams

    def _window_length(self) -> int:
        # Whole steps, so that without carried rows no step needs two windows.
        return max(1, self.window_rows // self.rows_per_step) * self.rows_per_step


@lru_cache(maxsize=4096)
def _window(order: StreamedOrder, stream: int, epoch: int, window: int) -> np.ndarray:
    """Row numbers of a window, shuffled."""
    piece = stream * order.num_rows // order.num_streams
    first = window * order._window_length()
    last = min(first + order._window_length(), order._length(stream))
    rows = _line(order.groups, order.seed, epoch).rows(piece + first, piece + last)
    return np.random.default_rng([order.seed, epoch, stream, window]).permutation(rows)


@lru_cache(maxsize=2)
def _line(groups: RowGroups, seed: int, epoch: int) -> _Line:
    order = permutation(len(groups.starts), seed, epoch)
    sizes = groups.sizes[order]
    ends = np.cumsum(sizes)
    return _Line(groups.starts[order] - (ends - sizes), ends)
