"""One centroid per pseudo-identity: features are drawn to their own, and the centroids follow the features."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passreid_ray.distributed import all_gather
from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError
from passreid_ray.losses.checks import check_choice, check_matrix

MemoryUpdate = Literal["plain", "hard", "selective"]
Negatives = Literal["all", "weighted", "hardest"]

EASY_NEGATIVE_WEIGHT = 0.5


class ClusterMemory(nn.Module):
    """Normalised centroids ``(K, D)``, a loss that reads them and an update that writes them; no parameters.

    Cluster Contrast (arXiv:2103.11568). ``momentum`` is the fraction of the old centroid that an update keeps.

    ``update``, how a batch moves the centroids:

    - ``plain``: sample after sample in batch order, ``phi_y <- normalize(momentum phi_y + (1 - momentum) f)``.
    - ``hard``: once per cluster in the batch, with the sample least similar to the centroid (the first of equals).
    - ``selective``: like ``hard``, among reliable samples only: those whose most similar centroid is their own label's.
      A cluster without a reliable sample stays as it is.

    ``negatives``, which other centroids the loss of a sample with label y counts, where ``s_c = f phi_c / temp`` and
    ``H`` are the ``num_hard_negatives`` other centroids with the largest ``s_c``:

    - ``all``: ``-s_y + log sum_c exp(s_c)``, the softmax of Cluster Contrast.
    - ``weighted``: ``-s_y + log(exp(s_y) + sum_{c in H} exp(s_c) + 0.5 sum_{c not in H, c != y} exp(s_c))``.
    - ``hardest``: ``-s_y + log(exp(s_y) + sum_{c in H} exp(s_c))``.

    ``selective``, ``weighted`` and ``hardest`` are named after the selective contrastive learning of "Mind Your Clever
    Neighbours" (arXiv:2112.01839). Only that paper's abstract was to be had: the formulas are our own definition.

    Labels are integers 0..K-1. What can be told from shapes is checked everywhere; label range and finite features are
    checked on the CPU only, since a look at values on a GPU would make every step wait for it.
    """

    centroids_KD: Tensor

    def __init__(
        self,
        centroids_KD: Tensor,
        temp: float = 0.05,
        momentum: float = 0.2,
        update: MemoryUpdate = "plain",
        *,
        negatives: Negatives = "all",
        num_hard_negatives: int = 50,
    ) -> None:
        super().__init__()
        if temp <= 0:
            raise UserError(f"ClusterMemory temp: {temp}; give a number above 0")
        if not 0 <= momentum < 1:
            raise UserError(f"ClusterMemory momentum: {momentum}; give the fraction to keep, from 0 to below 1")
        check_choice("ClusterMemory update", update, MemoryUpdate)
        check_choice("ClusterMemory negatives", negatives, Negatives)
        if num_hard_negatives < 1:
            raise UserError(f"ClusterMemory num_hard_negatives: {num_hard_negatives}; give at least 1")
        self.register_buffer("centroids_KD", _normalised_centroids(centroids_KD))
        self.temp = temp
        self.momentum = momentum
        self.update_rule: MemoryUpdate = update
        self.negatives: Negatives = negatives
        self.num_hard_negatives = num_hard_negatives

    def loss(self, features_ND: Tensor, labels_N: Tensor) -> Tensor:
        """Mean loss of this rank's samples, a scalar; its gradient reaches the features only.

        Features are L2-normalised here, and everything is in float32 even under autocast. Averaged over ranks with
        equal batches, value and gradient are those of the whole batch.
        """
        self._check_shapes(features_ND, labels_N)
        self._check_values(features_ND, labels_N)
        labels_N = labels_N.long()
        with torch.autocast(features_ND.device.type, enabled=False):
            logits_NK = self._normalised(features_ND) @ self.centroids_KD.t() / self.temp
            return F.cross_entropy(logits_NK + self._log_weights(logits_NK.detach(), labels_N), labels_N)

    @torch.no_grad()
    def update(self, features_ND: Tensor, labels_N: Tensor, *, refined_ND: Tensor | None = None) -> None:
        """Move the centroids to the batch of all ranks, taken in rank order; the memory is then equal on every rank.

        Every rank must call this, with as many samples, after the backward pass of ``loss``: centroids change in place.
        ``refined_ND``, features refined by their neighbours, decide which samples are ``selective``'s reliable ones;
        without them the features do. The other two rules make no use of them.
        """
        self._check_shapes(features_ND, labels_N)
        if refined_ND is not None and refined_ND.shape != features_ND.shape:
            raise UserError(
                f"ClusterMemory: refined features {tuple(refined_ND.shape)} beside features "
                f"{tuple(features_ND.shape)}; give one refined row per feature"
            )
        labels_N = all_gather(labels_N.long())
        features_ND = all_gather(self._normalised(features_ND))
        if len(labels_N) == 0:
            return
        self._check_values(features_ND, labels_N)
        clusters_C, cluster_N = labels_N.unique(return_inverse=True)
        match self.update_rule:
            case "plain":
                rows_CO = _rows_in_order(cluster_N, len(clusters_C))
            case "hard":
                rows_CO = self._hardest_rows(features_ND, labels_N, cluster_N, len(clusters_C))
            case "selective":
                deciding_ND = features_ND if refined_ND is None else all_gather(self._normalised(refined_ND))
                with torch.autocast(deciding_ND.device.type, enabled=False):
                    reliable_N = (deciding_ND @ self.centroids_KD.t()).argmax(dim=1) == labels_N
                rows_CO = self._hardest_rows(features_ND, labels_N, cluster_N, len(clusters_C), reliable_N)
        moved_CD = self.centroids_KD[clusters_C]
        for row_C in rows_CO.unbind(dim=1):
            mixed_CD = self.momentum * moved_CD + (1 - self.momentum) * features_ND[row_C.clamp(min=0)]
            moved_CD = torch.where(row_C[:, None] >= 0, F.normalize(mixed_CD, dim=1), moved_CD)
        self.centroids_KD[clusters_C] = moved_CD

    def extra_repr(self) -> str:
        """Sizes and settings."""
        num_clusters, width = self.centroids_KD.shape
        return (
            f"{num_clusters} x {width}, temp={self.temp}, momentum={self.momentum}, update={self.update_rule!r}, "
            f"negatives={self.negatives!r}, num_hard_negatives={self.num_hard_negatives}"
        )

    def _normalised(self, features_ND: Tensor) -> Tensor:
        return F.normalize(features_ND.to(self.centroids_KD.dtype), dim=1)

    def _log_weights(self, logits_NK: Tensor, labels_N: Tensor) -> Tensor:
        """What is added to each logit so that the softmax counts it with its weight."""
        if self.negatives == "all":
            return logits_NK.new_zeros(())
        easy_log_weight = math.log(EASY_NEGATIVE_WEIGHT) if self.negatives == "weighted" else -math.inf
        others_NK = logits_NK.scatter(1, labels_N[:, None], -math.inf)
        hardest_NR = others_NK.topk(min(self.num_hard_negatives, logits_NK.shape[1] - 1), dim=1).indices
        log_weights_NK = torch.full_like(logits_NK, easy_log_weight).scatter(1, hardest_NR, 0.0)
        return log_weights_NK.scatter(1, labels_N[:, None], 0.0)

    def _hardest_rows(
        self,
        features_ND: Tensor,
        labels_N: Tensor,
        cluster_N: Tensor,
        num_present: int,
        eligible_N: Tensor | None = None,
    ) -> Tensor:
        """Per cluster in the batch the first of its least similar rows ``(C, 1)``; -1 where none is eligible."""
        similarity_N = (features_ND * self.centroids_KD[labels_N]).sum(dim=1)
        if eligible_N is not None:
            similarity_N = similarity_N.masked_fill(~eligible_N, math.inf)
        least_C = similarity_N.new_full((num_present,), math.inf).scatter_reduce(0, cluster_N, similarity_N, "amin")
        is_least_N = (similarity_N == least_C[cluster_N]) & similarity_N.isfinite()
        num_rows = len(cluster_N)
        row_N = torch.arange(num_rows, device=cluster_N.device).masked_fill(~is_least_N, num_rows)
        first_C = row_N.new_full((num_present,), num_rows).scatter_reduce(0, cluster_N, row_N, "amin")
        return first_C.masked_fill(first_C == num_rows, -1)[:, None]

    def _check_shapes(self, features_ND: Tensor, labels_N: Tensor) -> None:
        width = self.centroids_KD.shape[1]
        if features_ND.ndim != 2 or features_ND.shape[1] != width:
            raise UserError(
                f"ClusterMemory: features of shape {tuple(features_ND.shape)}; centroids have width {width}, "
                f"give (N, {width})"
            )
        if labels_N.shape != features_ND.shape[:1] or labels_N.is_floating_point() or labels_N.is_complex():
            raise UserError(
                f"ClusterMemory: labels of shape {tuple(labels_N.shape)} and {labels_N.dtype} beside "
                f"{len(features_ND)} features; give one integer label per feature"
            )

    def _check_values(self, features_ND: Tensor, labels_N: Tensor) -> None:
        num_clusters = len(self.centroids_KD)
        if labels_N.device.type == "cpu":
            outside = labels_N[(labels_N < 0) | (labels_N >= num_clusters)]
            if len(outside):
                raise UserError(
                    f"ClusterMemory: label {int(outside[0])} with {num_clusters} centroids; labels are "
                    f"0..{num_clusters - 1}, leave outliers (-1) out of the batches"
                )
        if features_ND.device.type == "cpu" and not bool(features_ND.isfinite().all()):
            raise UserError(
                "ClusterMemory: features hold NaN or infinity; lower the learning rate or look at the input"
            )


def _normalised_centroids(centroids_KD: Tensor) -> Tensor:
    check_matrix("ClusterMemory", "centroids", centroids_KD, "(K, D)")
    normalised_KD = F.normalize(at_least_float32(centroids_KD.detach()), dim=1)
    norm_K = normalised_KD.norm(dim=1)
    bad_K = ~((norm_K - 1).abs() < 1e-3)  # NaN is bad too
    if bool(bad_K.any()):
        raise UserError(
            f"ClusterMemory: centroid {int(bad_K.nonzero()[0])} of {len(bad_K)} is zero or not finite; "
            "give the mean feature of each cluster"
        )
    return normalised_KD


def _rows_in_order(cluster_N: Tensor, num_present: int) -> Tensor:
    """Rows of each cluster in batch order ``(C, O)``, filled up with -1; O is the size of the largest one."""
    count_C = torch.bincount(cluster_N, minlength=num_present)
    row_N = cluster_N.argsort(stable=True)
    occurrence_N = torch.arange(len(row_N), device=row_N.device) - (count_C.cumsum(0) - count_C)[cluster_N[row_N]]
    rows_CO = row_N.new_full((num_present, int(count_C.max())), -1)
    rows_CO[cluster_N[row_N], occurrence_N] = row_N
    return rows_CO
