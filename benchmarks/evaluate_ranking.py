"""Time of ``evaluate_ranking`` against the protocol written out query by query, at the size of Market-1501.

Run from the repository: ``OMP_NUM_THREADS=1 python -m benchmarks.evaluate_ranking``
"""

import numpy as np

from benchmarks.measure import cpu_seconds
from passreid_ray.retrieval import cosine_distance, evaluate_ranking
from tests.reference.literal_ranking import literal_ranking

QUERIES, GALLERY, PERSONS, CAMERAS, WIDTH = 3368, 15913, 751, 6, 1152


def main() -> None:
    """Print both times and whether the numbers agree."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((PERSONS, WIDTH), np.float32)
    query_ids, gallery_ids = rng.integers(0, PERSONS, QUERIES), rng.integers(0, PERSONS, GALLERY)
    cameras = rng.integers(0, CAMERAS, QUERIES), rng.integers(0, CAMERAS, GALLERY)
    query_QD = centers[query_ids] + 3 * rng.standard_normal((QUERIES, WIDTH), np.float32)
    gallery_GD = centers[gallery_ids] + 3 * rng.standard_normal((GALLERY, WIDTH), np.float32)

    distance_seconds, distance = cpu_seconds(lambda: cosine_distance(query_QD, gallery_GD))
    ours_seconds, ours = cpu_seconds(
        lambda: evaluate_ranking(None, None, query_ids, gallery_ids, *cameras, distance=distance)
    )
    literal_seconds, literal = cpu_seconds(lambda: literal_ranking(distance, query_ids, gallery_ids, *cameras, 50))
    largest = max(abs(ours.mAP - literal.mAP), abs(ours.mINP - literal.mINP), np.abs(ours.cmc - literal.cmc).max())
    print(f"{QUERIES} queries, {GALLERY} gallery features of {WIDTH} numbers; CPU seconds")
    print(f"cosine distances  {distance_seconds:8.2f}")
    print(f"evaluate_ranking  {ours_seconds:8.2f}   mAP {ours.mAP:.4f}, rank-1 {ours.cmc[0]:.4f}, mINP {ours.mINP:.4f}")
    print(f"query by query    {literal_seconds:8.2f}   {literal_seconds / ours_seconds:.0f} times as long")
    print(f"largest difference of mAP, mINP and CMC: {largest:.1e}")


if __name__ == "__main__":
    main()
