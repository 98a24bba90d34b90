"""Independent random streams: what is drawn for one thing never shifts what is drawn for another."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a stream is for; part of its key, so that numbers must not be reused."""

    PERSON = 0
    CAMERA = 1
    SCENE = 2
    SHOT = 3
    NUM_IMAGES = 4
    CAMERA_ORDER = 5


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """The random generator of one thing, the same on every machine and in any order of calls."""
    return np.random.default_rng((seed, stream, *key))
