"""True accept rates by trying every threshold."""

import numpy as np
from numpy.typing import NDArray


def literal_accept_rate(
    distance_QG: NDArray[np.floating],
    query_ids: NDArray,
    gallery_ids: NDArray,
    query_cameras: NDArray,
    gallery_cameras: NDArray,
    false_accept_rate: float,
) -> float:
    """The largest share of matches at a threshold that accepts no larger share of non-matches than the rate."""
    same_person = query_ids[:, None] == gallery_ids[None, :]
    same_camera = query_cameras[:, None] == gallery_cameras[None, :]
    matches, others = distance_QG[same_person & ~same_camera], distance_QG[~same_person]
    if len(matches) == 0 or len(others) == 0:
        return float("nan")
    rates = [0.0]
    for threshold in np.unique(distance_QG):
        if np.mean(others <= threshold) <= false_accept_rate:
            rates.append(float(np.mean(matches <= threshold)))
    return max(rates)
