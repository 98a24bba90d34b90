"""The search that GPUs use, here on the CPU: the same neighbours as the other exact one."""

import numpy as np
import torch

from passreid_ray.retrieval.device_search import DeviceIndex
from passreid_ray.retrieval.scan import exact_index


def check(features: np.ndarray, queries: np.ndarray, k: int) -> None:
    distances, rows = DeviceIndex(features, torch.device("cpu")).search(queries, k)
    true_distances, true_rows = exact_index(features).search(queries, k)
    assert np.array_equal(rows, true_rows)
    np.testing.assert_allclose(distances, true_distances, rtol=1e-5, atol=1e-5)


def test_it_finds_what_the_exact_index_finds() -> None:
    features = np.random.default_rng(0).standard_normal((700, 24), np.float32)
    check(features, features, 30)
    check(features + 100, features[:5] + 100, 7)


def test_ties_are_in_row_order_and_too_few_rows_are_said() -> None:
    features = np.repeat(np.eye(4, 6, dtype=np.float32), 3, axis=0)
    check(features, features, 5)
    check(features, features[:2], 15)
