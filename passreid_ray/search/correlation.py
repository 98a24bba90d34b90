"""How far a fitness without labels agrees with a score that has them."""

# Shape letters: N individuals, P orders of them.

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import rankdata

from passreid_ray.errors import UserError

_ALL_ORDERS_UP_TO = 7
"""Pairs; 5040 orders."""
_NUM_DRAWN = 9999
_ROUNDING = 1e-9
_CHANCE = 0.05


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Spearman's rho of two scores over individuals, and how often chance alone gives one as far from 0."""

    rho: float
    """From -1 to 1; nan where it is not defined: fewer than 3 pairs, or all of one score the same."""
    p_value: float
    """Two-sided, of a permutation test; nan with rho."""
    num_pairs: int
    num_left_out: int
    """Individuals that lack one of the two scores, as those that failed."""

    def in_words(
        self, fitness: str = "label-free fitness", score: str = "mAP", mode: Literal["min", "max"] = "min"
    ) -> str:
        """One line for the report, good or bad; ``mode``: which end of the fitness is meant to be the better one."""
        left_out = f", {self.num_left_out} left out" if self.num_left_out else ""
        over = f"over {self.num_pairs} individuals{left_out}"
        if math.isnan(self.rho):
            return f"{fitness} and {score}: no rank correlation {over}; it needs 3 or more that differ in both"
        better, sign = ("lower", -1) if mode == "min" else ("higher", 1)
        if self.p_value >= _CHANCE:
            verdict = "chance alone may give that; more trials would tell"
        elif self.rho * sign > 0:
            verdict = f"a {better} {fitness} went with a higher {score}"
        else:
            verdict = f"a {better} {fitness} went with a LOWER {score}; do not select by it"
        return f"{fitness} and {score}: Spearman {self.rho:+.2f} (p = {self.p_value:.2g}) {over}: {verdict}"


def rank_correlation(fitness_N: Any, score_N: Any, *, seed: int = 0) -> RankCorrelation:
    """Spearman's rho between two scores of the same individuals; -1 where the lower fitness always scores higher.

    Pairs with a number that is not finite are left out. Equal numbers share the mean of their ranks. The p-value is of
    a permutation test, exact up to 7 pairs and with 9999 orders drawn from ``seed`` above: the usual one, of Student's
    t, says 0 for any perfect order, however few the pairs. Raises ``UserError`` for lists of unequal length.
    """
    fitness_N, score_N = np.asarray(fitness_N, np.float64), np.asarray(score_N, np.float64)
    if fitness_N.ndim != 1 or fitness_N.shape != score_N.shape:
        raise UserError(f"rank correlation: expected two lists of one length, got {fitness_N.shape}, {score_N.shape}")
    known = np.isfinite(fitness_N) & np.isfinite(score_N)
    num_pairs = int(known.sum())
    num_left_out = len(known) - num_pairs
    x_N, y_N = _centred_ranks(fitness_N[known]), _centred_ranks(score_N[known])
    if num_pairs < 3 or not x_N.any() or not y_N.any():
        return RankCorrelation(math.nan, math.nan, num_pairs, num_left_out)
    scale = math.sqrt(float(x_N @ x_N) * float(y_N @ y_N))
    rho = float(x_N @ y_N) / scale
    if num_pairs <= _ALL_ORDERS_UP_TO:
        orders_PN = np.array(list(itertools.permutations(x_N)))
    else:
        drawn_PN = np.random.default_rng(seed).permuted(np.tile(x_N, (_NUM_DRAWN, 1)), axis=1)
        orders_PN = np.vstack([x_N, drawn_PN])  # the order found is one of those that chance gives
    as_far_P = np.abs(orders_PN @ y_N) / scale >= abs(rho) - _ROUNDING
    return RankCorrelation(rho, float(as_far_P.mean()), num_pairs, num_left_out)


def _centred_ranks(numbers_N: np.ndarray) -> np.ndarray:
    return rankdata(numbers_N) - (len(numbers_N) + 1) / 2
