"""Random generators that depend on what is being viewed, never on who computes it."""

import hashlib

import numpy as np


def view_rng(seed: int, draw: int, image_id: str) -> np.random.Generator:
    """Generator for one draw of an image's views: the same triple gives the same stream in every process.

    ``draw`` tells apart the times that an image is seen: in pre-training it is the epoch.
    Python's own ``hash`` is salted per process, so the key is BLAKE2b of the triple; it seeds Philox, whose streams
    for different keys are independent (Salmon et al., SC 2011).
    """
    digest = hashlib.blake2b(f"{seed}/{draw}/{image_id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
