"""Work done by threads of this process while what they made before is used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from passreid_ray.data.order import Order
from passreid_ray.data.rows import Rows
from passreid_ray.data.stream import MakeViews, read_batch

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_ahead(function: Callable[[Item], Made], items: Iterable[Item], threads: int = 1) -> Iterator[Made]:
    """``function`` of each item, in order; ``threads`` threads work ahead of the reader, each by about one result."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_ahead(
    rows: Rows,
    order: Order,
    start_step: int,
    end_step: int,
    make_views: MakeViews,
    *,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """What a ``Stream`` gives for these steps, for orders that last a few steps only.

    An execution of Ray Data takes seconds to start; this begins at once, and decodes on one machine only.
    """
    read = partial(read_batch, rows, order, make_views=make_views, rank=rank, world_size=world_size)
    return made_ahead(read, range(start_step, end_step), threads)
