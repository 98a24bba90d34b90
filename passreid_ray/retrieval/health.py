"""Whether a clustering can be learnt from, and how far it is from another one."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from passreid_ray.retrieval.dbscan import OUTLIER


@dataclass(frozen=True)
class ClusterHealth:
    """Numbers to judge pseudo-labels by."""

    num_clusters: int
    num_outliers: int
    outlier_share: float
    """Outliers as a fraction of all rows."""
    largest_share: float
    """The largest cluster as a fraction of all rows."""
    mean_size: float
    """Rows per cluster."""
    nmi_to_last: float | None = None
    """Normalised mutual information with the last round's labels, outliers each on their own; None in the first."""
    ari: float | None = None
    """Adjusted Rand index with the identities, outliers each on their own; None where identities are unknown."""
    nmi: float | None = None
    """Normalised mutual information with the identities, likewise."""

    def as_metrics(self) -> dict[str, float]:
        """What is known, by name."""
        return {name: float(value) for name, value in asdict(self).items() if value is not None}


def cluster_health(
    labels_N: NDArray[np.int64], last_N: NDArray[np.int64] | None = None, persons_N: NDArray[np.object_] | None = None
) -> ClusterHealth:
    """Health of ``labels_N`` (-1 = outlier), compared with the last labels and with identities where there are any.

    ``persons_N``: identities, None where unknown; only known rows count.
    """
    sizes = np.bincount(labels_N[labels_N != OUTLIER]) if (labels_N != OUTLIER).any() else np.zeros(0, int)
    num_outliers = int((labels_N == OUTLIER).sum())
    alone_N = _each_on_its_own(labels_N)
    ari = nmi = None
    known = np.zeros(0, int) if persons_N is None else np.flatnonzero([person is not None for person in persons_N])
    if persons_N is not None and len(known):
        persons = persons_N[known].astype(str)
        ari = float(adjusted_rand_score(persons, alone_N[known]))
        nmi = float(normalized_mutual_info_score(persons, alone_N[known]))
    return ClusterHealth(
        num_clusters=len(sizes),
        num_outliers=num_outliers,
        outlier_share=num_outliers / len(labels_N),
        largest_share=float(sizes.max(initial=0)) / len(labels_N),
        mean_size=float(sizes.mean()) if len(sizes) else 0.0,
        nmi_to_last=None if last_N is None else float(normalized_mutual_info_score(_each_on_its_own(last_N), alone_N)),
        ari=ari,
        nmi=nmi,
    )


def _each_on_its_own(labels_N: NDArray[np.int64]) -> NDArray[np.int64]:
    alone_N = labels_N.copy()
    outliers = np.flatnonzero(labels_N == OUTLIER)
    alone_N[outliers] = labels_N.max(initial=-1) + 1 + np.arange(len(outliers))
    return alone_N
