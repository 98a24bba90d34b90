"""From features to pseudo-labels, with row blocks spread over Ray: neighbours, Jaccard distance, DBSCAN.

The steps themselves are pure functions in ``retrieval``. Here they are cut into blocks, run as Ray tasks, restarted
when a process dies, and put together again; how they were cut changes nothing in the labels.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import Field, model_validator

from passreid_ray.config import Section
from passreid_ray.engines.progress import PhaseProgress
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.row_blocks import RowBlocks
from passreid_ray.errors import UserError
from passreid_ray.models import NeighbourRefiner, refine_features
from passreid_ray.retrieval.dbscan import OUTLIER, attach_border, core_links, count_within, merge_links
from passreid_ray.retrieval.device_search import DeviceIndex
from passreid_ray.retrieval.health import ClusterHealth, cluster_health
from passreid_ray.retrieval.jaccard import (
    CameraSizes,
    camera_neighbourhood,
    check_sizes,
    plain_neighbourhood,
    unit_weighting,
)
from passreid_ray.retrieval.k_reciprocal import Neighbourhood, encode, expand, overlap_distance, reciprocal_half
from passreid_ray.retrieval.neighbours import IndexKind, NeighbourIndex, build_index, sampled_recall, unit_features

EXACT_UP_TO_ROWS = 100_000
"""Beyond, 8-bit search is so much faster that "auto" takes it."""
QUANTILE_ROWS = 2048


class CameraConfig(Section):
    """Neighbours balanced over cameras (CA-Jaccard), which brings images of different cameras together."""

    enabled: bool = False
    """Use the sizes below instead of k1 and k2; every image then needs a camera."""
    k1_same: int = Field(default=5, ge=1)
    """Neighbours within the camera of an image, itself not counted."""
    k1_other: int = Field(default=20, ge=1)
    """Neighbours in all other cameras."""
    k2_same: int = Field(default=2, ge=1)
    """Neighbours within the camera whose codes are averaged, the image itself included."""
    k2_other: int = Field(default=4, ge=0)
    """Neighbours in other cameras whose codes are averaged."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for averaged, found in (("k2_same", "k1_same"), ("k2_other", "k1_other")):
            if getattr(self, averaged) > getattr(self, found):
                raise ValueError(f"{averaged}: at most {found}={getattr(self, found)}, got {getattr(self, averaged)}")
        return self


class ClusterConfig(Section):
    """Pseudo-labels: k-reciprocal neighbours, Jaccard distance, DBSCAN; the defaults are Cluster Contrast's."""

    k1: int = Field(default=30, ge=1)
    """Size of the neighbour sets, the image itself included."""
    k2: int = Field(default=6, ge=1)
    """Neighbours whose codes are averaged (local query expansion); 1: none."""
    cameras: CameraConfig = CameraConfig()
    index: IndexKind | Literal["auto"] = "auto"
    """Neighbour search: exact, int8 (8-bit codes, then exact distances), ivf (cells of k-means); auto: exact up to
    100,000 images, int8 beyond."""
    eps: float = Field(default=0.6, gt=0, le=1)
    """Jaccard distance up to which two images are neighbours for DBSCAN."""
    eps_quantile: float | None = Field(default=None, gt=0, lt=1)
    """Take eps from the data: this quantile, over images, of the distance to the min_samples-th nearest image."""
    min_samples: int = Field(default=4, ge=1)
    """Images within eps, itself included, that make an image the core of a cluster."""
    max_outlier_share: float = Field(default=0.9, gt=0, le=1)
    """With more outliers than this share, eps is raised."""
    max_cluster_share: float = Field(default=0.5, gt=0, le=1)
    """When one cluster holds more than this share, eps is lowered."""
    eps_step: float = Field(default=0.05, gt=0, lt=1)
    """By how much eps is raised or lowered."""
    max_eps_steps: int = Field(default=4, ge=0)
    """How often; then the last round's labels are kept, if there are any."""
    block_rows: int | None = Field(default=None, ge=1)
    """Rows of a Ray task; none: so that all CPUs have a few blocks, and small data is clustered in one process."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.k2 > self.k1:
            raise ValueError(f"k2: the query expansion averages 1 to k1={self.k1} neighbours, got {self.k2}")
        return self


@dataclass(frozen=True)
class PseudoLabels:
    """What a clustering gives."""

    labels_N: NDArray[np.int64]
    """Cluster of every row, -1 for outliers."""
    eps: float
    """Where the ladder stopped."""
    health: ClusterHealth
    recall: float | None
    """Share of the true neighbours that approximate search found on a sample; None for exact search."""
    notes: tuple[str, ...]
    """What a reader should know: steps of the ladder, labels kept."""


def cluster_features(
    features_ND: NDArray[np.float32],
    config: ClusterConfig,
    progress: PhaseProgress,
    *,
    cameras_N: NDArray[np.object_] | None = None,
    persons_N: NDArray[np.object_] | None = None,
    last_N: NDArray[np.int64] | None = None,
    refiner: NeighbourRefiner | None = None,
    refiner_neighbours: int = 8,
    overwrite: bool = False,
    workers: WorkersConfig | None = None,
) -> PseudoLabels:
    """Pseudo-labels of all rows.

    ``cameras_N`` is needed when ``config.cameras`` is enabled. ``persons_N`` (None where unknown) only enter the health
    figures. ``last_N``: labels that are kept when the ladder finds no usable ones. ``refiner`` moves features towards
    their ``refiner_neighbours`` nearest before anything else. ``overwrite``: features may be changed, which saves the
    memory of a second matrix. ``workers``: those who train meanwhile, if any; tasks leave them their CPUs. Raises
    ``UserError`` for features that are not finite or all zero, for sizes that do not fit, and when no usable clusters
    are found.
    """
    features_ND = unit_features(features_ND, overwrite=overwrite)
    spread = RowBlocks(len(features_ND), config.block_rows, progress, workers)
    if refiner is not None:
        features_ND = _refined(features_ND, refiner, refiner_neighbours, config, spread)
    neighbourhood, found_recall = _neighbourhood(features_ND, config, cameras_N, spread)
    graph = _Graph(features_ND, neighbourhood, spread)
    eps = config.eps if config.eps_quantile is None else _quantile_eps(graph, config)
    labels_N, eps, notes = _climb(graph, config, eps, last_N)
    return PseudoLabels(labels_N, eps, cluster_health(labels_N, last_N, persons_N), found_recall, notes)


def object_store_bytes(num_rows: int, width: int) -> int:
    """Shared memory that clustering so many features needs at its peak, roughly."""
    return num_rows * (6 * width + 3000)


def _neighbourhood(
    features_ND: NDArray[np.float32], config: ClusterConfig, cameras_N: NDArray[np.object_] | None, spread: RowBlocks
) -> tuple[Neighbourhood, float | None]:
    kind = _kind(config, len(features_ND))
    if config.cameras.enabled:
        if cameras_N is None or any(camera is None for camera in cameras_N):
            raise UserError("cluster.cameras.enabled: not every image has a camera_id; give them, or switch it off")
        spread.progress("neighbours", 0, len(features_ND))
        sizes = CameraSizes(**config.cameras.model_dump(exclude={"enabled"}))
        neighbourhood = camera_neighbourhood(features_ND, cameras_N.astype(str), sizes, kind)
        spread.progress("neighbours", len(features_ND), len(features_ND))
        return neighbourhood, None
    check_sizes(config.k1, config.k2, len(features_ND))
    rows_NK = _nearest(features_ND, config.k1, kind, spread)
    found_recall = None if kind == "exact" else sampled_recall(features_ND, rows_NK)
    return plain_neighbourhood(rows_NK, config.k2), found_recall


def _nearest(features_ND: NDArray[np.float32], k: int, kind: IndexKind, spread: RowBlocks) -> NDArray[np.int32]:
    index = build_index(features_ND, kind)
    if isinstance(index, DeviceIndex):  # this process has a GPU, and faster it will not get
        spread.progress("neighbours", 0, len(features_ND))
        rows_NK = index.search_rows(slice(0, len(features_ND)), k)[1]
        spread.progress("neighbours", len(features_ND), len(features_ND))
        return rows_NK
    return np.concatenate(spread.collect("neighbours", _search_block, index, k))


def _refined(
    features_ND: NDArray[np.float32], refiner: NeighbourRefiner, k: int, config: ClusterConfig, spread: RowBlocks
) -> NDArray[np.float32]:
    neighbours_NK = _nearest(features_ND, min(k + 1, len(features_ND)), _kind(config, len(features_ND)), spread)
    refiner = deepcopy(refiner).cpu().eval()  # the one that is given is being trained, perhaps on a GPU
    for layer in range(len(refiner.layers)):
        blocks = spread.collect("refinement", _refine_block, refiner, features_ND, neighbours_NK, layer)
        features_ND = np.concatenate(blocks)
    return features_ND


def _kind(config: ClusterConfig, num_rows: int) -> IndexKind:
    if config.index != "auto":
        return config.index
    return "exact" if num_rows <= EXACT_UP_TO_ROWS else "int8"


class _Graph:
    """Expanded codes of all rows, and from them the pairs within a distance, as blocks that stay where they are."""

    def __init__(self, features_ND: NDArray[np.float32], neighbourhood: Neighbourhood, spread: RowBlocks) -> None:
        self._spread = spread
        self.num_rows = spread.num_rows
        mutual_NK = reciprocal_half(neighbourhood)
        codes = spread.collect("codes", _encode_block, neighbourhood, mutual_NK, features_ND)
        codes_NN = sp.csr_array(sp.vstack(codes, "csr"))
        del codes
        expanded = spread.collect("expansion", _expand_block, codes_NN, neighbourhood)
        del codes_NN
        self._expanded_NN = spread.share(sp.csr_array(sp.vstack(expanded, "csr")))
        del expanded
        self._columns_NN = spread.share(sp.csc_array(spread.read(self._expanded_NN).tocsc()))
        self._blocks: list[Any] = []
        self._reach = 0.0

    def nearest_distances(self, rows: NDArray[np.int64], rank: int) -> NDArray[np.float32]:
        """Distance of some rows to their ``rank``-th nearest row, itself included; 1 where there are fewer."""
        expanded_NN, columns_NN = self._spread.read(self._expanded_NN), self._spread.read(self._columns_NN)
        near = overlap_distance(sp.csr_array(expanded_NN[rows]), columns_NN, 1.0)
        found = np.ones(len(rows), np.float32)
        for row in range(len(rows)):
            own = np.sort(near.data[near.indptr[row] : near.indptr[row + 1]])
            if len(own) >= rank:
                found[row] = own[rank - 1]
        return found

    def labels(self, eps: float, min_samples: int) -> NDArray[np.int64]:
        """DBSCAN's labels."""
        spread = self._spread
        if eps > self._reach:
            self._blocks = []  # frees the ones of a smaller eps first
            self._blocks = spread.leave("distances", _overlap_block, self._expanded_NN, self._columns_NN, eps)
            self._reach = eps
        is_core_N = np.concatenate(spread.follow(_count_block, self._blocks, eps)) >= min_samples
        core = spread.share(is_core_N)
        cluster_N = merge_links(spread.follow(_links_block, self._blocks, eps, core), is_core_N)
        return np.concatenate(spread.follow(_border_block, self._blocks, eps, spread.share(cluster_N)))


def _quantile_eps(graph: _Graph, config: ClusterConfig) -> float:
    rows = np.linspace(0, graph.num_rows - 1, min(QUANTILE_ROWS, graph.num_rows), dtype=np.int64)
    assert config.eps_quantile is not None
    eps = float(np.quantile(graph.nearest_distances(rows, config.min_samples), config.eps_quantile))
    return min(max(eps, 1e-3), 1.0)


def _climb(
    graph: _Graph, config: ClusterConfig, eps: float, last_N: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], float, tuple[str, ...]]:
    """Labels at ``eps``, or at the nearest step of the ladder where they are usable, or the last ones."""
    notes: list[str] = []
    direction = 0
    while True:
        labels_N = graph.labels(eps, config.min_samples)
        trouble, wanted = _trouble(labels_N, config)
        if not wanted:
            return labels_N, eps, tuple(notes)
        notes.append(f"eps {eps:.3g}: {trouble}")
        following = round(eps + wanted * config.eps_step, 6)
        # When it has to turn round there is nothing between too many outliers and one cluster.
        if wanted == -direction or not 0 < following <= 1 or len(notes) > config.max_eps_steps:
            break
        direction, eps = wanted, following
    if last_N is not None:
        return last_N, eps, (*notes, "the last round's labels are kept")
    raise UserError(
        f"cluster: no usable clusters among {len(labels_N)} images ({'; '.join(notes)}). Start from weights that tell "
        "people apart better, or set cluster.eps, cluster.min_samples or cluster.max_outlier_share"
    )


def _trouble(labels_N: NDArray[np.int64], config: ClusterConfig) -> tuple[str, int]:
    """(what is wrong with labels, +1 or -1: the way that eps should go; 0 when they are usable)."""
    health = cluster_health(labels_N)
    if health.num_clusters == 0 or health.outlier_share > config.max_outlier_share:
        return f"{health.num_clusters} clusters, {health.outlier_share:.0%} outliers", 1
    if health.largest_share > config.max_cluster_share and health.num_clusters >= 1:
        return f"one cluster holds {health.largest_share:.0%}", -1
    return "", 0


def _search_block(rows: slice, index: NeighbourIndex, k: int) -> NDArray[np.int32]:
    return index.search_rows(rows, k)[1]


def _refine_block(
    rows: slice, refiner: NeighbourRefiner, features_ND: NDArray[np.float32], rows_NK: NDArray[np.int32], layer: int
) -> NDArray[np.float32]:
    return refine_features(refiner, features_ND, rows_NK, rows, layer=layer)


def _encode_block(
    rows: slice, neighbourhood: Neighbourhood, mutual_NK: NDArray[np.bool_], features_ND: NDArray[np.float32]
) -> sp.csr_array:
    return encode(neighbourhood, mutual_NK, features_ND, unit_weighting(features_ND), rows)


def _expand_block(rows: slice, codes_NN: sp.csr_array, neighbourhood: Neighbourhood) -> sp.csr_array:
    return expand(codes_NN, neighbourhood, rows)


def _overlap_block(rows: slice, expanded_NN: sp.csr_array, columns_NN: sp.csc_array, eps: float) -> sp.csr_array:
    return overlap_distance(sp.csr_array(expanded_NN[rows]), columns_NN, eps)


def _count_block(rows: slice, distance_RN: sp.csr_array, eps: float) -> NDArray[np.int64]:
    return count_within(distance_RN, eps)


def _links_block(rows: slice, distance_RN: sp.csr_array, eps: float, is_core_N: NDArray[np.bool_]) -> NDArray[np.int32]:
    return core_links(distance_RN, eps, rows.start, is_core_N)


def _border_block(
    rows: slice, distance_RN: sp.csr_array, eps: float, cluster_N: NDArray[np.int64]
) -> NDArray[np.int64]:
    return attach_border(distance_RN, eps, rows.start, cluster_N)


def centroids(features_ND: NDArray[np.float32], labels_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """L2-normalised mean feature of every cluster, ``(K, D)``; outliers are left out."""
    kept = labels_N != OUTLIER
    num_clusters = int(labels_N.max(initial=-1)) + 1
    member_KN = sp.csr_array(
        (np.ones(int(kept.sum()), np.float32), (labels_N[kept], np.flatnonzero(kept))),
        shape=(num_clusters, len(labels_N)),
    )
    sums_KD = member_KN @ np.nan_to_num(features_ND)
    return (sums_KD / np.linalg.norm(sums_KD, axis=1, keepdims=True)).astype(np.float32)
