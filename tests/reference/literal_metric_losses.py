"""Metric losses written out pair by pair; tensors only so that their gradient can be had."""

import torch
from torch import Tensor


def _sum(terms: list[Tensor]) -> Tensor:
    return sum(terms, torch.zeros(()))


def _value(distance: Tensor) -> float:
    return distance.item()


def literal_triplet(features_ND: Tensor, ids: list[int], margin: float | None, normalize: bool, cosine: bool) -> Tensor:
    """Batch-hard triplet loss; for ids of more than one identity."""
    features = list(features_ND)
    if normalize or cosine:
        features = [feature / feature.norm() for feature in features]

    def distance(a: int, b: int) -> Tensor:
        return 2 - 2 * (features[a] @ features[b]) if cosine else (features[a] - features[b]).norm()

    losses = []
    for anchor, person in enumerate(ids):
        farthest = max((distance(anchor, row) for row in range(len(ids)) if ids[row] == person), key=_value)
        nearest = min((distance(anchor, row) for row in range(len(ids)) if ids[row] != person), key=_value)
        excess = farthest - nearest
        losses.append(torch.log(1 + excess.exp()) if margin is None else (margin + excess).clamp(min=0))
    return torch.stack(losses).mean()


def literal_sparse_pairwise(features_ND: Tensor, ids: list[int], positive: str, temp: float) -> Tensor:
    """Adaptive sparse pairwise loss in plain exponentials; for float64 and temperatures that do not overflow."""
    features = [feature / feature.norm() for feature in features_ND]
    total = features_ND.new_zeros(())
    for person in set(ids):
        own = [row for row, other in enumerate(ids) if other == person]
        rest = [row for row, other in enumerate(ids) if other != person]
        of_anchors = [_sum([torch.exp(-(features[a] @ features[b]) / temp) for b in own]) for a in own]
        hard = -temp * _sum(of_anchors).log()
        least_hard = temp * _sum([1 / value for value in of_anchors]).log()
        match positive:
            case "hard":
                alpha = 1.0
            case "least_hard":
                alpha = 0.0
            case _:
                alpha = 0.0 if hard < 0 else (2 * hard * least_hard / (hard + least_hard)).item()
        similarity = alpha * hard + (1 - alpha) * least_hard
        negatives = _sum([torch.exp(features[a] @ features[b] / temp) for a in own for b in rest])
        own_term = torch.exp(similarity / temp)
        total = total - torch.log(own_term / (own_term + negatives))
    return total / len(set(ids))
