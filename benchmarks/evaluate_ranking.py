"""Time of ``evaluate_ranking`` at the size of Market-1501, and its memory with 519,732 gallery features.

Run from the repository: ``OMP_NUM_THREADS=1 python -m benchmarks.evaluate_ranking``, with ``market`` or ``large`` for
one of the two. ``large`` computes 2.7e12 products and sums.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import psutil

from benchmarks.measure import Cost, cost, cpu_seconds, in_own_process
from benchmarks.vectorised_ranking import vectorised_ranking
from passreid_ray.retrieval import RankingResult, cosine_distance, evaluate_ranking
from tests.reference.literal_ranking import literal_ranking

QUERIES, GALLERY, PERSONS, CAMERAS, WIDTH = 3368, 15913, 751, 6, 1152
LARGE_GALLERY, LARGE_WIDTH = 519_732, 768
FALSE_ACCEPT_RATES = (1e-4, 1e-3, 1e-2)


def labels_of(num_gallery: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids and cameras of query and gallery."""
    rng = np.random.default_rng(1)
    query_ids, gallery_ids = rng.integers(0, PERSONS, QUERIES), rng.integers(0, PERSONS, num_gallery)
    return query_ids, gallery_ids, rng.integers(0, CAMERAS, QUERIES), rng.integers(0, CAMERAS, num_gallery)


def features_of(ids: np.ndarray, width: int, seed: int) -> np.ndarray:
    """float32 features around one centre for each id, made in place."""
    centers = np.random.default_rng(0).standard_normal((PERSONS, width), np.float32)
    features_ND = np.empty((len(ids), width), np.float32)
    np.random.default_rng(seed).standard_normal(dtype=np.float32, out=features_ND)
    features_ND *= 3
    for start in range(0, len(ids), 4096):
        features_ND[start : start + 4096] += centers[ids[start : start + 4096]]
    return features_ND


def market() -> None:
    """CPU seconds given the distances, against sorting the gallery and against the protocol query by query."""
    labels = labels_of(GALLERY)
    query_QD, gallery_GD = features_of(labels[0], WIDTH, 2), features_of(labels[1], WIDTH, 3)
    distance_seconds, distance = cpu_seconds(lambda: cosine_distance(query_QD, gallery_GD))

    def ours_with(rates: tuple[float, ...]) -> Callable[[], RankingResult]:
        return lambda: evaluate_ranking(None, None, *labels, distance=distance, false_accept_rates=rates)

    compile_seconds, _ = cpu_seconds(
        lambda: evaluate_ranking(None, None, labels[0][:99], labels[1], None, None, distance=distance[:99])
    )
    ours_seconds, ours = cpu_seconds(ours_with(()))
    rates_seconds, with_rates = cpu_seconds(ours_with(FALSE_ACCEPT_RATES))
    sorted_seconds, by_sorting = cpu_seconds(lambda: vectorised_ranking(distance, *labels, 50))
    literal_seconds, literal = cpu_seconds(lambda: literal_ranking(distance, *labels, 50))
    print(f"{QUERIES} queries, {GALLERY} gallery features of {WIDTH} numbers; CPU seconds")
    print(f"cosine distances   {distance_seconds:8.2f}")
    print(f"first call         {compile_seconds:8.2f}   99 queries; loads or compiles the counting")
    print(
        f"evaluate_ranking   {ours_seconds:8.2f}   mAP {ours.mAP:.4f}, rank-1 {ours.cmc[0]:.4f}, mINP {ours.mINP:.4f}"
    )
    print(f"... and accept rates {rates_seconds:6.2f}   {with_rates.true_accept_rates}")
    print(f"sorting, numpy     {sorted_seconds:8.2f}   {sorted_seconds / ours_seconds:.0f} times as long")
    print(f"query by query     {literal_seconds:8.2f}   {literal_seconds / ours_seconds:.0f} times as long")
    for name, other in (("sorting", by_sorting), ("query by query", literal)):
        largest = max(abs(ours.mAP - other.mAP), abs(ours.mINP - other.mINP), np.abs(ours.cmc - other.cmc).max())
        print(f"largest difference of mAP, mINP and CMC to {name}: {largest:.1e}")


def large_cost(rates: tuple[float, ...]) -> tuple[Cost, int, RankingResult]:
    """Cost of a call with the large gallery, the highest memory of the process in it, and the result."""
    labels = labels_of(LARGE_GALLERY)
    query_QD, gallery_GD = features_of(labels[0], LARGE_WIDTH, 2), features_of(labels[1], LARGE_WIDTH, 3)
    small = [values[:999] for values in labels]
    evaluate_ranking(query_QD[:999], gallery_GD[:999], *small)  # loads or compiles the counting
    before_bytes = psutil.Process().memory_info().rss
    found, result = cost(lambda: evaluate_ranking(query_QD, gallery_GD, *labels, false_accept_rates=rates))
    return found, before_bytes + found.peak_bytes, result


def product_seconds() -> tuple[float, float]:
    """CPU and wall time of the products alone, one block of queries after the other."""
    columns_MD = features_of(labels_of(LARGE_GALLERY)[1], LARGE_WIDTH, 3)
    query_QD = columns_MD[:QUERIES].copy()
    block = np.empty((128, 4096), np.float32)
    start, wall = time.process_time(), time.perf_counter()
    for first in range(0, QUERIES, 128):
        for column in range(0, LARGE_GALLERY, 4096):
            columns = columns_MD[column : column + 4096]
            queries = query_QD[first : first + 128]
            np.matmul(queries, columns.T, out=block[: len(queries), : len(columns)])
    return time.process_time() - start, time.perf_counter() - wall


def large() -> None:
    """Memory and time from the features, and the share of the products."""
    print(f"{QUERIES} queries, {LARGE_GALLERY} gallery features of {LARGE_WIDTH} numbers")
    for rates in ((), FALSE_ACCEPT_RATES):
        found, process_bytes, result = in_own_process(large_cost, rates)
        print(f"evaluate_ranking{' and accept rates' * bool(rates)}: {found}")
        print(f"  process at most {process_bytes / 1e9:.3f} GB; mAP {result.mAP:.4f}, {result.true_accept_rates}")
    cpu, wall = in_own_process(product_seconds)
    print(f"the products alone: {cpu:7.2f} s CPU, {wall:7.2f} s wall")


def main(parts: list[str]) -> None:
    """Print the parts asked for, or both."""
    for name, part in (("market", market), ("large", large)):
        if not parts or name in parts:
            part()


if __name__ == "__main__":
    main(sys.argv[1:])
