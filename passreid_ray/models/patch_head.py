"""What only the masked-patch loss needs of a model: a token in the place of hidden patches, and a head for patches."""

# Shape letters: M patches, D width of the backbone, E bottleneck width.

import torch
from torch import Tensor, nn

from passreid_ray.models.prototype_head import PrototypeHead, Prototypes


class PatchHead(nn.Module):
    """Mask token and one prototype head for all patches; outside the backbone, whose state stays that of PASS.

    iBOT (arXiv:2111.07832); a head of its own, not that of CLS, as in DINOv2 (arXiv:2304.07193).

    Args:
        width: D.
        head: a prototype head of one token.
    """

    def __init__(self, width: int, head: PrototypeHead) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.head = head

    @property
    def num_prototypes(self) -> int:
        """K."""
        return self.head.num_prototypes

    def bottlenecks(self, patches_MD: Tensor) -> Tensor:
        """What is compared with the prototypes, ``(M, E)``, of length 1; M may be 0."""
        return self.head.bottlenecks([patches_MD])[0]

    def prototypes(self) -> Prototypes:
        """Those of the head."""
        return self.head.prototypes()[0]
