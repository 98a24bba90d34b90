"""Shortlists of persons: few for an easy query, many for an ambiguous one, K on average."""

# Shape letters: Q queries, R queries of a block, G gallery, M distinct features of it, I its identities.

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.distances import normalized
from passreid_ray.retrieval.distinct import distinct_unit_features
from passreid_ray.retrieval.protocol import one_per_row, read_labels

_BLOCK_BYTES = 32 * 2**20
"""Most bytes of similarities at once."""

ScoreOfIdentity = Literal["max", "mean"]


@dataclass(frozen=True, slots=True)
class CandidateSets:
    """How probable every identity is for every query, and the one threshold that makes the sets."""

    identities_I: NDArray[Any]
    """The person ids of the gallery, ascending."""
    log_probability_QI: NDArray[np.float32]
    """Minus infinity where every image of the identity is left out."""
    log_threshold: float
    """The smallest logarithm of a probability that is in a set; infinity when all sets are empty."""
    k: int

    @property
    def is_candidate_QI(self) -> NDArray[np.bool_]:
        """Whether the identity is in the query's set."""
        return self.log_probability_QI >= np.float32(self.log_threshold)

    @property
    def mean_size(self) -> float:
        """Identities per query; less than ``k`` where equal probabilities at the threshold are all left out."""
        return float(self.is_candidate_QI.sum(axis=1).mean())

    def of_query(self, query: int) -> NDArray[Any]:
        """The person ids in the set of one query, the most probable first."""
        log_probability_I = self.log_probability_QI[query]
        order_I = np.argsort(-log_probability_I, kind="stable")
        return self.identities_I[order_I[log_probability_I[order_I] >= np.float32(self.log_threshold)]]


@dataclass(frozen=True, slots=True)
class CandidateAccuracy:
    """Over the valid queries: those whose person has a gallery image that is not left out."""

    average_k: float
    """Share of queries whose person is in the set."""
    top_k: float
    """Share of queries whose person is among the ``k`` most probable; equal probabilities in random order, expected."""
    mean_size: float
    """Identities per valid query in the sets that ``average_k`` is about."""
    num_valid_queries: int


def candidate_sets(
    query_QD: Any,
    gallery_GD: Any,
    gallery_ids: Any,
    k: int,
    *,
    score: ScoreOfIdentity = "max",
    temperature: float = 0.05,
    query_ids: Any = None,
    query_cameras: Any = None,
    gallery_cameras: Any = None,
) -> CandidateSets:
    """For every query the gallery identities above one threshold, at most ``k`` on average over the queries.

    An identity scores the maximum or mean cosine similarity to its gallery features; a softmax over the identities, at
    ``temperature``, makes probabilities of the scores. One threshold for all queries lets the ``Q * k`` most probable
    pairs through (average-K classification, Lorieul et al., arXiv:2112.08851; here the classes are the gallery
    identities). Pairs that are exactly equal at the threshold are let through together or not at all, so that
    collapsed features get no candidates.

    With cameras (and then ``query_ids``) the gallery images of the query's person *and* camera are left out, as in
    ``evaluate_ranking``. Without them ids of queries need not be known. Features: numpy or tensors. Memory: one
    float32 per query and identity; similarities to the gallery are made in blocks of queries.

    Raises ``UserError`` for a ``k`` that is not in 1..I, a ``temperature`` that is not positive, cameras without ids or
    of one side only, for features that are not finite and for shapes that do not fit.
    """
    identities_I, person_G = np.unique(one_per_row(gallery_ids, "gallery ids"), return_inverse=True)
    if not 1 <= k <= len(identities_I):
        raise UserError(f"k: {k} candidates of {len(identities_I)} identities in the gallery; give 1 to their number")
    if not 0 < temperature < np.inf:
        raise UserError(f"temperature: expected a positive number, got {temperature}")
    if query_ids is None and (query_cameras is not None or gallery_cameras is not None):
        raise UserError("query_ids: None with cameras, whose rule is about the person; give the ids, or no cameras")
    labels = None if query_ids is None else read_labels(query_ids, gallery_ids, query_cameras, gallery_cameras)

    query_QD = normalized(query_QD, "query features")
    # One column for equal features, or they would get unequal similarities from a matrix product.
    distinct_MD, column_G = distinct_unit_features(gallery_GD, "gallery features", query_QD.dtype)
    num_queries = len(query_QD) if labels is None else len(labels.persons_Q)
    if (len(query_QD), len(column_G)) != (num_queries, len(person_G)) or not num_queries:
        raise UserError(
            f"features: {len(query_QD)} and {len(column_G)} rows do not fit {num_queries or 'no'} queries and "
            f"{len(person_G)} gallery ids"
        )
    if query_QD.shape[1] != distinct_MD.shape[1]:
        raise UserError(f"query is {query_QD.shape[1]} wide, gallery {distinct_MD.shape[1]}; they must be of one model")

    by_person = np.argsort(person_G, kind="stable")
    starts_I = np.searchsorted(person_G[by_person], np.arange(len(identities_I)))
    log_probability_QI = np.empty((num_queries, len(identities_I)), np.float32)
    block = max(1, _BLOCK_BYTES // (distinct_MD.itemsize * len(column_G)))
    for first in range(0, num_queries, block):
        own = slice(first, first + block)
        similarity_RG = (query_QD[own] @ distinct_MD.T)[:, column_G[by_person]]
        is_kept_RG = np.ones(similarity_RG.shape, np.bool_)
        if labels is not None:
            is_kept_RG = labels.persons_Q[own, None] != labels.persons_G[by_person]
            is_kept_RG |= labels.cameras_Q[own, None] != labels.cameras_G[by_person]
        score_RI = _scores(similarity_RG, is_kept_RG, starts_I, score)
        log_probability_QI[own] = _log_softmax(score_RI / temperature)
    return CandidateSets(identities_I, log_probability_QI, _threshold(log_probability_QI, k), k)


def candidate_accuracy(sets: CandidateSets, query_ids: Any) -> CandidateAccuracy:
    """How often the person of a query is in its set, and among the ``k`` most probable for comparison.

    Queries whose person has no gallery image, or only ones that are left out, do not count. Raises ``UserError`` when
    none counts and when the ids do not fit.
    """
    labels = read_labels(query_ids, sets.identities_I, None, None)
    query_codes, identity_codes = labels.persons_Q, labels.persons_G  # the latter ascending, as the ids are
    if len(query_codes) != len(sets.log_probability_QI):
        raise UserError(f"query ids: expected {len(sets.log_probability_QI)}, one per query, got {len(query_codes)}")
    person_Q = np.minimum(np.searchsorted(identity_codes, query_codes), len(identity_codes) - 1)
    own_Q1 = np.take_along_axis(sets.log_probability_QI, person_Q[:, None], 1)
    is_valid_Q = (identity_codes[person_Q] == query_codes) & np.isfinite(own_Q1[:, 0])
    if not is_valid_Q.any():
        raise UserError(
            f"none of {len(query_codes)} queries has a match among {len(identity_codes)} gallery identities; "
            "check the split, the ids and the cameras"
        )
    own_Q1, log_probability_QI = own_Q1[is_valid_Q], sets.log_probability_QI[is_valid_Q]
    num_better_Q, num_equal_Q = (log_probability_QI > own_Q1).sum(axis=1), (log_probability_QI == own_Q1).sum(axis=1)
    return CandidateAccuracy(
        average_k=float((own_Q1 >= np.float32(sets.log_threshold)).mean()),
        top_k=float(np.clip((sets.k - num_better_Q) / num_equal_Q, 0, 1).mean()),
        mean_size=float(sets.is_candidate_QI[is_valid_Q].sum(axis=1).mean()),
        num_valid_queries=int(is_valid_Q.sum()),
    )


def _scores(
    similarity_RG: NDArray[np.floating],
    is_kept_RG: NDArray[np.bool_],
    starts_I: NDArray[np.intp],
    score: ScoreOfIdentity,
) -> NDArray[np.float64]:
    """Of images in the order of their identities; minus infinity for an identity without an image that is kept."""
    match score:
        case "max":
            kept_RG = np.where(is_kept_RG, similarity_RG, -np.inf)
            return np.maximum.reduceat(kept_RG, starts_I, axis=1).astype(np.float64)
        case "mean":
            kept_RG = np.where(is_kept_RG, similarity_RG, 0)
            total_RI = np.add.reduceat(kept_RG, starts_I, axis=1, dtype=np.float64)
            num_kept_RI = np.add.reduceat(is_kept_RG, starts_I, axis=1, dtype=np.int64)
            return np.where(num_kept_RI > 0, total_RI / np.maximum(num_kept_RI, 1), -np.inf)


def _log_softmax(logits_RI: NDArray[np.float64]) -> NDArray[np.float64]:
    largest_R1 = logits_RI.max(axis=1, keepdims=True)
    # Nothing to subtract where every identity of the gallery is left out.
    shifted_RI = logits_RI - np.where(np.isfinite(largest_R1), largest_R1, 0)
    total_R1 = np.exp(shifted_RI).sum(axis=1, keepdims=True)
    return shifted_RI - np.log(np.where(total_R1 > 0, total_R1, 1))


def _threshold(log_probability_QI: NDArray[np.float32], k: int) -> float:
    """The smallest value that at most ``Q * k`` entries reach; infinity when there is none."""
    values = log_probability_QI[np.isfinite(log_probability_QI)]
    num_wanted = min(k * len(log_probability_QI), len(values))
    if num_wanted == 0:
        return np.inf
    lowest = np.partition(values, len(values) - num_wanted)[len(values) - num_wanted]
    if np.count_nonzero(values >= lowest) > num_wanted:
        return float(values[values > lowest].min(initial=np.inf))
    return float(lowest)
