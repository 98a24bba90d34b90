"""Genes to loss weights of a constant sum: else the size of the loss, and so the learning rate, would evolve too."""

# Shape letters: D genes, one of each weight.

from collections.abc import Mapping
from typing import Any

import numpy as np

from passreid_ray.errors import UserError

_ROUNDING = 1e-9
"""Weights that genes gave may miss the lower end by that much, as a fraction of the higher end."""


class WeightSpace:
    """The weights that an evolution may choose: one gene in [0, 1] of each name, the weights' sum always ``total``.

    A gene stands for a raw weight between ``low`` and ``high``; the raw weights are then scaled to the sum. So only
    their ratios evolve, and a weight may end above ``high`` or below ``low``. With ``low`` = 0 a gene of 0 switches its
    loss off; with ``low`` above 0 the largest weight is at most ``high / low`` times the smallest. ``total`` is one per
    name when it is not given, so that equal genes are weights of 1.

    Raises ``UserError`` for no names or a name twice, for a ``total`` that is not above 0, and unless
    0 <= ``low`` < ``high``. Normalised weights in place of free ones: the loss of ELo (arXiv:2002.12177, section 3)
    has free weights in [0, 1].
    """

    def __init__(self, names: tuple[str, ...], total: float | None = None, low: float = 0.0, high: float = 1.0) -> None:
        self.names = tuple(names)
        self.total = float(len(names) if total is None else total)
        self.low = float(low)
        self.high = float(high)
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"evolved weights: expected one or more names, each once, got {list(self.names)}")
        if not 0 < self.total < np.inf:
            raise UserError(f"evolved weights: expected a sum above 0, got {total}")
        if not 0 <= self.low < self.high < np.inf:
            raise UserError(f"evolved weights: expected 0 <= low < high, got low = {low} and high = {high}")

    @property
    def dimension(self) -> int:
        """Number of genes."""
        return len(self.names)

    def to_weights(self, genes_D: Any) -> dict[str, float]:
        """Weight of every name, of sum ``total`` up to rounding.

        Where all raw weights are 0 there is no ratio to keep: every weight is then the same, ``total / D``. Raises
        ``UserError`` unless there are D genes in [0, 1].
        """
        genes_D = np.asarray(genes_D, np.float64)
        if genes_D.shape != (self.dimension,) or not ((genes_D >= 0) & (genes_D <= 1)).all():
            raise UserError(f"evolved weights: expected {self.dimension} genes in [0, 1], got {genes_D.tolist()}")
        raw_D = self.low + (self.high - self.low) * genes_D
        largest = raw_D.max()
        # Divided by the largest first: neither the sum of huge ones nor the inverse of tiny ones overflows.
        share_D = raw_D / largest if largest > 0 else np.ones(self.dimension)
        share_D /= share_D.sum()
        return dict(zip(self.names, (self.total * share_D).tolist(), strict=True))

    def to_genes(self, weights: Mapping[str, float]) -> tuple[float, ...]:
        """Genes that give weights in the ratios of ``weights``: of all such genes, those whose largest is 1.

        Raises ``UserError`` for other names, for weights that are negative, not finite or all 0, and for a ratio above
        ``high / low``, which no genes give.
        """
        if set(weights) != set(self.names):
            raise UserError(f"evolved weights: expected weights of {list(self.names)}, got {list(weights)}")
        weights_D = np.array([weights[name] for name in self.names], np.float64)
        if not ((weights_D >= 0) & np.isfinite(weights_D)).all() or not weights_D.any():
            raise UserError(f"evolved weights: expected numbers >= 0 that are not all 0, got {dict(weights)}")
        raw_D = self.high * (weights_D / weights_D.max())
        if raw_D.min() < self.low - _ROUNDING * self.high:
            raise UserError(
                f"evolved weights: the largest may be {self.high / self.low:g} times the smallest, "
                f"got {dict(weights)}; set low lower"
            )
        return tuple(np.clip((raw_D - self.low) / (self.high - self.low), 0, 1).tolist())
