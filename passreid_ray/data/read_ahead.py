"""Batches of an order, read by threads of this process while the one before is used."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from passreid_ray.data.order import Order
from passreid_ray.data.rows import Rows
from passreid_ray.data.stream import MakeViews, read_batch


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
    with ThreadPoolExecutor(max_workers=threads) as pool:
        waiting: deque[Future[dict[str, np.ndarray]]] = deque()
        for step in range(start_step, end_step):
            waiting.append(pool.submit(read_batch, rows, order, step, make_views, rank, world_size))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
