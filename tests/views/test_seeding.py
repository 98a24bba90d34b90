import os
import subprocess
import sys

import numpy as np

from passreid_ray.views import view_rng

TRIPLES = [(0, 0, "a.jpg"), (0, 0, "b.jpg"), (0, 1, "a.jpg"), (1, 0, "a.jpg"), (10, 0, "a.jpg"), (1, 0, "0/a.jpg")]


def test_another_process_with_another_hash_seed_draws_the_same_numbers() -> None:
    program = (
        "from passreid_ray.views import view_rng; "
        "print(repr(view_rng(7, 2, 'käse/0001_c1.jpg').integers(0, 2**62, 4).tolist()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == repr(view_rng(7, 2, "käse/0001_c1.jpg").integers(0, 2**62, 4).tolist())


def test_every_seed_epoch_and_image_has_its_own_stream() -> None:
    first_draws = [int(view_rng(*triple).integers(0, 2**62)) for triple in TRIPLES]
    assert len(set(first_draws)) == len(TRIPLES)


def test_streams_of_neighbouring_images_are_uncorrelated() -> None:
    draws = np.array([view_rng(0, 0, f"{index}.jpg").random(64) for index in range(200)])
    correlations = np.asarray(np.corrcoef(draws))[np.triu_indices(200, 1)]
    # Independent rows of 64 have a correlation of standard deviation 1 / 8.
    assert abs(correlations.std() - 1 / 8) < 0.01
    assert abs(draws.mean() - 0.5) < 0.01
