"""Which of the training identities is this: cross-entropy of a linear classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError
from passreid_ray.losses.checks import check_ids, check_matrix


def identity_loss(logits_NC: Tensor, ids_N: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the rows, a scalar: ``-sum_c q_c log softmax(logits)_c``.

    ``q`` is ``1 - label_smoothing`` on the row's id, and ``label_smoothing / C`` more on every class. Float32 even
    under autocast (float64 is kept). Shapes that do not fit are UserErrors, and so is, on the CPU, an id outside
    0..C-1. Label smoothing: Inception-v3 (arXiv:1512.00567, section 7); in ReID: Bag of Tricks (arXiv:1903.07071).
    """
    if not 0 <= label_smoothing <= 1:
        raise UserError(f"identity_loss label_smoothing: {label_smoothing}; give a number from 0 to 1")
    check_matrix("identity classifier", "logits", logits_NC, "(N, C)")
    check_ids("identity classifier", ids_N, *logits_NC.shape)
    with torch.autocast(logits_NC.device.type, enabled=False):
        return F.cross_entropy(at_least_float32(logits_NC), ids_N.long(), label_smoothing=label_smoothing)
