"""How a number of workers that may change shares a batch: equal shares, in pieces that never grow."""

import math

from passreid_ray.errors import UserError


def num_pieces(batch_size: int, world_size: int, most_workers: int, micro_batches: int = 1) -> int:
    """In how many equal pieces each of ``world_size`` workers computes its share of a batch, one after the other.

    ``most_workers`` workers do it in ``micro_batches`` pieces each. A share that is larger, because fewer workers are
    there, is cut into more pieces, none of them larger than those: memory does not grow with the share.

    >>> num_pieces(24, 3, 3), num_pieces(24, 2, 3), num_pieces(24, 1, 3)
    (1, 2, 3)
    """
    share, largest = batch_size // world_size, batch_size // (most_workers * micro_batches)
    return next(num for num in range(1, share + 1) if share % num == 0 and share // num <= largest)


def check_shared(
    key: str, things: str, batch_size: int, sizes: range, *, micro_batches: int = 1, unit: int = 1
) -> None:
    """Raise ``UserError`` unless ``batch_size`` can be divided among any number of workers in ``sizes``.

    The most of them must also be able to do it in ``micro_batches``. ``key`` is the setting, ``things`` what it counts;
    the sizes that the error names as working are multiples of ``unit`` too.
    """
    most_parts = sizes[-1] * micro_batches
    refused = [size for size in sizes if batch_size % size]
    if not refused and batch_size % most_parts == 0:
        return
    parts = math.lcm(*sizes, most_parts, unit)
    nearest = max(1, math.floor(batch_size / parts + 0.5)) * parts
    where = f" (workers.num_workers=[{sizes[0]}, {sizes[-1]}])" if len(sizes) > 1 else ""
    raise UserError(
        f"{key}: {batch_size} {things} cannot be divided among {_words(refused or [sizes[-1]])} workers{where} in "
        f"{micro_batches} micro-batches; make it a multiple of {parts}: the nearest is {nearest}"
    )


def _words(sizes: list[int]) -> str:
    *others, last = map(str, sizes)
    return f"{', '.join(others)} or {last}" if others else last
