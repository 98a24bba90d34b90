"""The Market-1501 protocol query by query: sort, leave out, look."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score


@dataclass
class LiteralRanking:
    mAP: float
    mINP: float
    cmc: list[float]
    average_precision: list[float]


def literal_ranking(
    distance_QG: NDArray[np.floating],
    query_ids: NDArray,
    gallery_ids: NDArray,
    query_cameras: NDArray,
    gallery_cameras: NDArray,
    max_rank: int,
) -> LiteralRanking:
    """Average precision by scikit-learn; CMC and INP on the list with tied non-matches before tied matches."""
    precisions, penalties, first_ranks = [], [], []
    for query, distance_G in enumerate(distance_QG):
        is_match = gallery_ids == query_ids[query]
        kept = ~(is_match & (gallery_cameras == query_cameras[query]))
        is_match, distance = is_match[kept], distance_G[kept]
        if not is_match.any():
            precisions.append(float("nan"))
            continue
        precisions.append(float(average_precision_score(is_match, -distance)))
        ranked = is_match[np.lexsort((is_match, distance))]
        match_ranks = np.flatnonzero(ranked) + 1
        first_ranks.append(match_ranks[0])
        penalties.append(len(match_ranks) / match_ranks[-1])
    return LiteralRanking(
        mAP=float(np.nanmean(precisions)),
        mINP=float(np.mean(penalties)),
        cmc=[float(np.mean([first <= rank for first in first_ranks])) for rank in range(1, max_rank + 1)],
        average_precision=precisions,
    )
