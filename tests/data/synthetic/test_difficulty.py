"""The default people are neither trivial nor hopeless: a colour histogram finds some of them."""

import numpy as np
from PIL import Image

from passreid_ray.data.synthetic import SyntheticSource, synthetic_rows


def _colour_histogram(image_HWC: np.ndarray) -> np.ndarray:
    """8 x 8 x 8 bins of hue, saturation and value, summing to 1."""
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(image_HWC).convert("HSV")) // 32, -1, 0).astype(int)
    return np.bincount((hue * 64 + saturation * 8 + value).ravel(), minlength=512) / hue.size


def _market_map(similarity_QG: np.ndarray, is_match_QG: np.ndarray, is_ignored_QG: np.ndarray) -> float:
    """Mean average precision by the Market-1501 protocol, one query at a time."""
    precisions = []
    for similarity_G, is_match_G, is_ignored_G in zip(similarity_QG, is_match_QG, is_ignored_QG, strict=True):
        order = np.argsort(-similarity_G, kind="stable")
        matches = is_match_G[order][~is_ignored_G[order]]
        ranks = np.flatnonzero(matches) + 1
        precisions.append((np.arange(1, len(ranks) + 1) / ranks).mean())
    return float(np.mean(precisions))


def test_a_colour_histogram_is_well_above_chance_and_far_from_perfect() -> None:
    rows = synthetic_rows(SyntheticSource())
    query, gallery = rows.with_split("query"), rows.with_split("gallery")
    histograms_Q = np.stack([_colour_histogram(query.image(index)) for index in range(len(query))])
    histograms_G = np.stack([_colour_histogram(gallery.image(index)) for index in range(len(gallery))])
    intersection_QG = np.stack([np.minimum(histogram, histograms_G).sum(1) for histogram in histograms_Q])
    same_person_QG = query.person_ids[:, None] == gallery.person_ids
    same_camera_QG = query.camera_ids[:, None] == gallery.camera_ids
    ignored_QG = same_person_QG & same_camera_QG
    chance = _market_map(np.random.default_rng(0).random(intersection_QG.shape), same_person_QG, ignored_QG)
    histogram = _market_map(intersection_QG, same_person_QG, ignored_QG)
    assert chance < 0.05
    assert 3 * chance < histogram < 0.6
