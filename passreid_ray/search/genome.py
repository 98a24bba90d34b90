"""Genes to loss weights of a constant sum: else the size of the loss, and so the learning rate, would evolve too."""

# Shape letters: D genes, one of each weight.

from typing import Any

import numpy as np

from passreid_ray.errors import UserError


class WeightSpace:
    """The weights that an evolution may choose: one gene in [0, 1] of each name, the weights' sum always ``total``.

    Genes are scaled to the sum, so only their ratios evolve; a gene of 0 switches its loss off. ``total`` is one per
    name when it is not given, so that equal genes are weights of 1.

    Raises ``UserError`` for no names or a name twice, and for a ``total`` that is not above 0. Normalised weights in
    place of free ones: the loss of ELo (arXiv:2002.12177, section 3) has free weights in [0, 1].
    """

    def __init__(self, names: tuple[str, ...], total: float | None = None) -> None:
        self.names = tuple(names)
        self.total = float(len(names) if total is None else total)
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"evolved weights: expected one or more names, each once, got {list(self.names)}")
        if not 0 < self.total < np.inf:
            raise UserError(f"evolved weights: expected a sum above 0, got {total}")

    @property
    def dimension(self) -> int:
        """Number of genes."""
        return len(self.names)

    def to_weights(self, genes_D: Any) -> dict[str, float]:
        """Weight of every name, of sum ``total`` up to rounding.

        Where all genes are 0 there is no ratio to keep: every weight is then the same, ``total / D``. Raises
        ``UserError`` unless there are D genes in [0, 1].
        """
        genes_D = np.asarray(genes_D, np.float64)
        if genes_D.shape != (self.dimension,) or not ((genes_D >= 0) & (genes_D <= 1)).all():
            raise UserError(f"evolved weights: expected {self.dimension} genes in [0, 1], got {genes_D.tolist()}")
        largest = genes_D.max()
        # Divided by the largest first: the inverse of the sum of tiny ones would overflow.
        share_D = genes_D / largest if largest > 0 else np.ones(self.dimension)
        share_D /= share_D.sum()
        return dict(zip(self.names, (self.total * share_D).tolist(), strict=True))
