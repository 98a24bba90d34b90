"""One center per identity: features are drawn to their own, and the centers follow the features."""

import torch
from torch import Tensor, nn

from passreid_ray.distributed import all_gather, all_reduce_mean
from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError
from passreid_ray.losses.checks import check_ids


class ClassCenters(nn.Module):
    """Centers ``(C, D)``, a loss that reads them and an update that writes them; no parameters.

    A Discriminative Feature Learning Approach for Deep Face Recognition (Wen et al., ECCV 2016).
    ``momentum`` is the fraction of its way that a center does not go: the paper's alpha is ``1 - momentum``. Centers
    start at 0 and are therefore equal on every rank. Ids are integers 0..C-1; their range is checked on the CPU only,
    since a look at values on a GPU would make every step wait for it.
    """

    centers_CD: Tensor

    def __init__(self, num_classes: int, width: int, momentum: float = 0.5) -> None:
        super().__init__()
        if num_classes < 1 or width < 1:
            raise UserError(f"ClassCenters: {num_classes} classes of width {width}; give at least 1 of both")
        if not 0 <= momentum < 1:
            raise UserError(f"ClassCenters momentum: {momentum}; give the fraction to keep, from 0 to below 1")
        self.register_buffer("centers_CD", torch.zeros(num_classes, width))
        self.momentum = momentum

    def loss(self, features_ND: Tensor, ids_N: Tensor) -> Tensor:
        """Squared distance of a feature to its own center, the mean over the rows of all ranks; a scalar.

        Twice the paper's, which halves it, and equal to that of common re-identification code. In float32 at least; the
        gradient reaches the features only. Every rank must call this with as many rows; after DDP has averaged
        gradients they are those of one process.
        """
        self._check(features_ND, ids_N)
        with torch.autocast(features_ND.device.type, enabled=False):
            difference_ND = at_least_float32(features_ND) - self.centers_CD[ids_N.long()]
            return all_reduce_mean(difference_ND.square().sum(dim=1).mean())

    @torch.no_grad()
    def update(self, features_ND: Tensor, ids_N: Tensor) -> None:
        """Move the centers to the batch of all ranks: ``c <- c - (1 - momentum) sum(c - f) / (1 + n)``.

        The sum is over the n features of the center's identity; a center without any stays. Every rank must call this,
        with as many rows, after the backward pass of ``loss``: centers change in place, equally on every rank.
        """
        self._check(features_ND, ids_N)
        features_ND, ids_N = all_gather(features_ND.to(self.centers_CD.dtype)), all_gather(ids_N.long())
        present_I, identity_N = ids_N.unique(return_inverse=True)
        with torch.autocast(features_ND.device.type, enabled=False):
            # A product and not index_add_, whose order on a GPU is open: centers would drift apart between ranks.
            member_IN = (torch.arange(len(present_I), device=ids_N.device)[:, None] == identity_N).to(features_ND.dtype)
            pull_ID = member_IN @ (features_ND - self.centers_CD[ids_N])
            self.centers_CD[present_I] += (1 - self.momentum) * pull_ID / (1 + member_IN.sum(dim=1, keepdim=True))

    def extra_repr(self) -> str:
        """Sizes and settings."""
        num_classes, width = self.centers_CD.shape
        return f"{num_classes} x {width}, momentum={self.momentum}"

    def _check(self, features_ND: Tensor, ids_N: Tensor) -> None:
        num_classes, width = self.centers_CD.shape
        if features_ND.ndim != 2 or features_ND.shape[1] != width or len(features_ND) == 0:
            raise UserError(
                f"ClassCenters: features of shape {tuple(features_ND.shape)}; centers have width {width}, "
                f"give (N, {width}), N above 0"
            )
        check_ids("ClassCenters", ids_N, len(features_ND), num_classes)
