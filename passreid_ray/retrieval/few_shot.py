"""Few-shot identification: how well a mean of a few images of each of a few persons tells them apart."""

# Shape letters: N rows, D width, W identities of an episode (way), S shots, M queries of an episode, E episodes.

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.neighbours import finite_features
from passreid_ray.retrieval.protocol import one_per_row


@dataclass(frozen=True, slots=True)
class FewShotResult:
    """Mean accuracy over episodes, and half its 95 % interval: 1.96 standard deviations / sqrt(episodes)."""

    mean: float
    half_width: float
    num_episodes: int


@dataclass(frozen=True, slots=True)
class EpisodePool:
    """The identities that episodes are drawn from: those with ``shot`` images and a query beside them."""

    rows_by_identity: list[NDArray[np.intp]]
    """Row numbers of the images of each eligible identity."""
    camera_N: NDArray[np.intp]
    """Camera of every row; without the camera rule each row has one of its own."""
    leaves_shots_N: NDArray[np.bool_]
    """Whether the row's identity has ``shot`` images of other cameras, so that the row can be a query."""
    shot: int
    num_identities: int
    """With those that are not eligible."""

    @property
    def num_eligible(self) -> int:
        """Identities that can be drawn."""
        return len(self.rows_by_identity)


@dataclass(frozen=True, slots=True)
class Episode:
    """Row numbers of the images of one episode."""

    shots_WS: NDArray[np.intp]
    queries_M: NDArray[np.intp]
    identity_M: NDArray[np.intp]
    """Which of the W identities a query shows."""


def few_shot_accuracies(
    features_ND: Any,
    person_ids: Any,
    cameras: Any,
    episodes: range,
    *,
    way: int = 5,
    shot: int = 1,
    num_queries: int = 5,
    cross_camera: bool = True,
    seed: int = 0,
    temperature: float = 1.0,
) -> NDArray[np.float64]:
    """Share of queries that are classified right, for every episode of ``episodes``, ``(E,)``.

    An episode draws ``way`` identities, and of each ``shot`` images and up to ``num_queries`` queries (see
    ``draw_episode``); a query goes to the identity with the nearest mean of its shots (prototypical networks, Snell et
    al., arXiv:1703.05175; protocol of arXiv:1911.06045). Features are taken as they are: normalise them first if that
    is how they are compared. ``temperature`` divides the logits and does not change the accuracy.

    Episode e is the same bits for any ``episodes`` that it is in, so a range may be divided among workers.

    Raises ``UserError`` when fewer than ``way`` identities are eligible, when ``cross_camera`` has no cameras, for
    numbers out of range, for features that are not finite and for shapes that do not fit.
    """
    features_ND = finite_features(features_ND)
    pool = episode_pool(person_ids, cameras, shot=shot, cross_camera=cross_camera)
    if len(features_ND) != len(pool.camera_N):
        raise UserError(f"person_ids: expected {len(features_ND)}, one per feature, got {len(pool.camera_N)}")
    if not 0 < temperature < np.inf:
        raise UserError(f"temperature: expected a positive number, got {temperature}")
    accuracies_E = np.empty(len(episodes))
    for position, episode in enumerate(episodes):
        drawn = draw_episode(pool, episode, way=way, num_queries=num_queries, seed=seed)
        prototypes_WD = features_ND[drawn.shots_WS].mean(axis=1, dtype=np.float64)
        logits_MW = prototype_logits(features_ND[drawn.queries_M], prototypes_WD, temperature)
        accuracies_E[position] = np.mean(logits_MW.argmax(axis=1) == drawn.identity_M)
    return accuracies_E


def few_shot_summary(accuracies_E: NDArray[np.float64]) -> FewShotResult:
    """Mean and 95 % interval of the accuracies of all episodes; ``UserError`` when there are none."""
    if len(accuracies_E) == 0:
        raise UserError("few-shot: no episodes to average; give at least 1")
    half_width = 1.96 * float(np.std(accuracies_E)) / np.sqrt(len(accuracies_E))
    return FewShotResult(float(np.mean(accuracies_E)), float(half_width), len(accuracies_E))


def prototype_logits(
    queries_MD: NDArray[np.floating], prototypes_WD: NDArray[np.float64], temperature: float
) -> NDArray[np.float64]:
    """``-|query - prototype|^2 / temperature`` of every pair, ``(M, W)``."""
    # From differences: of equal features exactly 0, which the expanded square is not.
    differences_MWD = queries_MD[:, None] - prototypes_WD
    return np.einsum("mwd,mwd->mw", differences_MWD, differences_MWD) / -temperature


def episode_pool(person_ids: Any, cameras: Any, *, shot: int, cross_camera: bool = True) -> EpisodePool:
    """The identities of which ``shot`` images and at least one query can be drawn.

    With ``cross_camera`` the query must be of a camera that no shot is of: an identity needs two cameras, and ``shot``
    images outside one of them. Raises ``UserError`` when ``cross_camera`` has no cameras and for labels that do not
    fit.
    """
    if shot < 1:
        raise UserError(f"shot: expected at least 1 image of each identity, got {shot}")
    labels_N = one_per_row(person_ids, "person_ids")
    if not cross_camera:
        camera_N = np.arange(len(labels_N))
    elif cameras is None:
        raise UserError("cameras: None with cross_camera; give one per row, or cross_camera=False")
    else:
        camera_N = np.unique(one_per_row(cameras, "cameras"), return_inverse=True)[1]
    if len(camera_N) != len(labels_N):
        raise UserError(f"cameras: expected {len(labels_N)}, one per person id, got {len(camera_N)}")

    _, person_N, count_I = np.unique(labels_N, return_inverse=True, return_counts=True)
    pairs_N2 = np.stack([person_N, camera_N], axis=1)
    _, pair_N, count_of_pair = np.unique(pairs_N2, axis=0, return_inverse=True, return_counts=True)
    leaves_shots_N = count_I[person_N] - count_of_pair[pair_N.reshape(-1)] >= shot
    rows_of_all = np.split(np.argsort(person_N, kind="stable"), np.cumsum(count_I)[:-1])
    eligible = [rows for rows in rows_of_all if leaves_shots_N[rows].any()]
    return EpisodePool(eligible, camera_N, leaves_shots_N, shot, len(count_I))


def draw_episode(pool: EpisodePool, episode: int, *, way: int = 5, num_queries: int = 5, seed: int = 0) -> Episode:
    """The images of episode number ``episode``, a function of ``(seed, episode)`` and the pool alone.

    Draws ``way`` eligible identities, and puts the images of each in random order. The first image that leaves enough
    images of other cameras keeps its camera for the queries; the first ``shot`` images of other cameras are the shots;
    the first ``num_queries`` images of cameras without a shot are the queries, or all of them where they are fewer.

    Raises ``UserError`` when fewer than ``way`` identities are eligible and for numbers out of range.
    """
    if way < 2 or num_queries < 1:
        raise UserError(f"expected a way of at least 2 and num_queries of at least 1, got {way} and {num_queries}")
    if seed < 0 or episode < 0:
        raise UserError(f"seed and episodes: expected numbers from 0 on, got {seed} and {episode}")
    if pool.num_eligible < way:
        raise UserError(
            f"way: {way} identities per episode, but {pool.num_eligible} of {pool.num_identities} are eligible (with "
            f"{pool.shot} images and a query of another camera if cross_camera); lower way or shot, or give more images"
        )
    rng = np.random.default_rng((seed, episode))
    shots, queries = [], []
    for identity in rng.choice(pool.num_eligible, way, replace=False):
        rows = rng.permutation(pool.rows_by_identity[identity])
        cameras = pool.camera_N[rows]
        kept_camera = cameras[np.argmax(pool.leaves_shots_N[rows])]
        is_shot = np.flatnonzero(cameras != kept_camera)[: pool.shot]
        has_shot = (cameras[:, None] == cameras[is_shot]).any(axis=1)
        shots.append(rows[is_shot])
        queries.append(rows[~has_shot][:num_queries])
    return Episode(np.stack(shots), np.concatenate(queries), np.repeat(np.arange(way), [len(rows) for rows in queries]))
