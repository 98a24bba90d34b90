"""Cluster memory and neighbour refinement written out sample by sample, in float64."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def unit(vector: Array) -> Array:
    return vector / np.linalg.norm(vector)


def literal_update(
    centroids_KD: Array,
    features_ND: Array,
    labels_N: NDArray[np.int64],
    momentum: float,
    update: str,
    refined_ND: Array,
) -> Array:
    """The memory after one batch; ``refined_ND`` decides which samples are reliable."""
    old = [unit(centroid) for centroid in centroids_KD]
    new = list(old)
    features = [unit(feature) for feature in features_ND]
    if update == "plain":
        for feature, label in zip(features, labels_N, strict=True):
            new[label] = unit(momentum * new[label] + (1 - momentum) * feature)
        return np.stack(new)
    for cluster in range(len(old)):
        hardest = None
        for sample, label in enumerate(labels_N):
            if label != cluster:
                continue
            if update == "selective":
                similarities = [float(unit(refined_ND[sample]) @ centroid) for centroid in old]
                if similarities.index(max(similarities)) != label:
                    continue
            if hardest is None or features[sample] @ old[cluster] < features[hardest] @ old[cluster]:
                hardest = sample
        if hardest is not None:
            new[cluster] = unit(momentum * old[cluster] + (1 - momentum) * features[hardest])
    return np.stack(new)


def literal_loss(
    centroids_KD: Array,
    features_ND: Array,
    labels_N: NDArray[np.int64],
    temp: float,
    num_hard: int,
    easy_weight: float,
) -> float:
    """Mean of -log(e^s_y / (e^s_y + sum over the hardest e^s_c + easy_weight * sum over the others e^s_c))."""
    total = 0.0
    for feature, label in zip(features_ND, labels_N, strict=True):
        scores = [float(unit(feature) @ unit(centroid)) / temp for centroid in centroids_KD]
        others = sorted((score for cluster, score in enumerate(scores) if cluster != label), reverse=True)
        denominator = math.exp(scores[label]) + sum(math.exp(score) for score in others[:num_hard])
        denominator += easy_weight * sum(math.exp(score) for score in others[num_hard:])
        total -= math.log(math.exp(scores[label]) / denominator)
    return total / len(labels_N)


def literal_refined(
    features_ND: Array,
    neighbours: list[list[int]],
    temp: float,
    strength: float,
    matrices: tuple[Array, Array, Array] | None = None,
) -> Array:
    """One layer: f_i + strength * sum_j softmax_j(cos(W_q f_i, W_k f_j) / temp) W_v f_j, normalised."""
    query_DD, key_DD, value_DD = matrices or (np.eye(features_ND.shape[1]),) * 3
    features = [unit(feature) for feature in features_ND]
    refined = []
    for feature, others in zip(features, neighbours, strict=True):
        scores = [math.exp(float(unit(query_DD @ feature) @ unit(key_DD @ features[j])) / temp) for j in others]
        moved = feature.copy()
        for score, j in zip(scores, others, strict=True):
            moved = moved + strength * score / sum(scores) * (value_DD @ features[j])
        refined.append(unit(moved))
    return np.stack(refined)
