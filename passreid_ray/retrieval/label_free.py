"""How good an embedding looks without any label: the fitness of an evolutionary search."""

# Shape letters: N rows, D width, k clusters, S starts of k-means.

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.cluster_prior import (
    Assignment,
    Prior,
    check_assignment,
    cluster_distribution,
    kl_divergence,
    prior_distribution,
    unit_centroids,
)
from passreid_ray.retrieval.neighbours import unit_features
from passreid_ray.retrieval.spread import alignment, effective_rank, uniformity


@dataclass(frozen=True, slots=True)
class LabelFreeScore:
    """Numbers of an embedding that need no person ids. None of them replaces mAP: log them beside it where ids exist.

    The divergence follows mAP best where images per person follow the prior.
    """

    kl_divergence: float
    """KL(found || prior) of the clusters' shares in nats, lower is better: 0 = the prior itself. Mean of all starts."""
    effective_rank: float
    """Directions that the features use, 1 = collapsed .. min(N, D)."""
    uniformity: float
    """0 = all features are one point, lower = more spread over the sphere."""
    alignment: float | None
    """Mean squared distance of two views of an image, 0 = the same feature; None without other views."""
    cluster_distribution_k: NDArray[np.float64]
    """Share of every cluster, largest first. Mean of all starts."""

    def as_metrics(self) -> dict[str, float]:
        """What is known, by name."""
        metrics = {
            "label_free/kl": self.kl_divergence,
            "label_free/effective_rank": self.effective_rank,
            "label_free/uniformity": self.uniformity,
        }
        return metrics if self.alignment is None else metrics | {"label_free/alignment": self.alignment}


def label_free_score(
    features_ND: Any,
    *,
    num_clusters: int,
    prior: Prior = "zipf",
    exponent: float = 1.0,
    empirical_counts: Any = None,
    assignment: Assignment = "soft",
    seed: int,
    num_starts: int = 1,
    positives_ND: Any = None,
) -> LabelFreeScore:
    """Divergence of the clusters' shares from a prior, effective rank, uniformity and alignment of an embedding.

    ELo (arXiv:2002.12177): k-means, the mean over the rows of the soft assignment, and KL(p || prior).
    Ours: rows and centroids are L2-normalised, since features are compared by cosine (and the fixed variance of the
    assignment makes the paper's score depend on their length); p is sorted, since k-means numbers clusters as it likes.
    With "soft", collapsed features give uniform shares, which a Zipfian prior punishes. "hard" spans a wider range, but
    follows mAP worse, above all where persons have equally many images.

    k-means ends in one of many local optima: with ``num_starts`` the divergence is the mean over so many of them. Where
    features differ little, as those of short runs, one start says less of the features than of itself.

    ``features_ND``, ``positives_ND`` (features of another view of each row): numpy or tensors, numpy out. ``prior``,
    ``exponent``, ``empirical_counts``: see ``prior_distribution``. The same features and ``seed`` give the same score.

    Raises ``UserError`` for fewer rows than clusters, for features that are not finite or are all zero, for positives
    of another shape, for an unknown assignment, for an unknown or incomplete prior, and for no start.
    """
    if num_starts < 1:
        raise UserError(f"num_starts: expected 1 or more, got {num_starts}")
    expected_k = prior_distribution(num_clusters, prior, exponent=exponent, empirical_counts=empirical_counts)
    features_ND = unit_features(features_ND)
    if positives_ND is not None:
        positives_ND = unit_features(positives_ND, "positives")
        if positives_ND.shape != features_ND.shape:
            raise UserError(
                f"positives: expected the shape {features_ND.shape} of the features, got {positives_ND.shape}; "
                "give the feature of another view of each row"
            )
    check_assignment(assignment)  # before k-means, which takes long
    seeds = [seed, *((seed + start) % 2**31 for start in range(1, num_starts))]
    found_Sk = np.array(
        [cluster_distribution(features_ND, unit_centroids(features_ND, num_clusters, own), assignment) for own in seeds]
    )
    return LabelFreeScore(
        kl_divergence=float(np.mean([kl_divergence(found_k, expected_k) for found_k in found_Sk])),
        effective_rank=effective_rank(features_ND),
        uniformity=uniformity(features_ND, seed),
        alignment=None if positives_ND is None else alignment(features_ND, positives_ND),
        cluster_distribution_k=found_Sk.mean(axis=0),
    )
