"""Float32 matrix products on a CPU by oneDNN.

torch hands them to MKL, which uses no AVX-512 on an AMD processor: there oneDNN, which torch calls for bfloat16, does
230 GFLOP/s on a core where MKL does 105. Its operator has no public name; without it, and for all other types and
devices, products are torch's own.
"""

# Shape letters: N, M, R rows of matrices, D and E their columns: features in and out of a layer.

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product_with_transposed(left_NR: Tensor, right_MR: Tensor) -> Tensor:
    """``left_NR @ right_MR.T``, without gradient, by the faster library."""
    if _is_for_onednn(left_NR, right_MR):
        return _onednn(left_NR, right_MR, None)
    return left_NR @ right_MR.T


def linear(features_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """``F.linear``, with gradient, by the faster library; any number of leading dimensions."""
    # A compiler knows torch's own operators only, and so do autocast's casts.
    is_plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled(features_ND.device.type)
    if is_plain and _is_for_onednn(features_ND, weight_ED):
        return cast(Tensor, _Linear.apply(features_ND, weight_ED, bias_E))
    return F.linear(features_ND, weight_ED, bias_E)


class Linear(nn.Linear):
    """``nn.Linear`` by the faster library."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        return linear(input, self.weight, self.bias)


def use_in(module: nn.Module) -> None:
    """Make every plain linear layer of ``module`` a ``Linear``; weights and their names stay."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(features_ND, weight_ED)
        return _onednn(features_ND, weight_ED, bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        features_ND, weight_ED = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        rows_NE, rows_ND = grads[0].flatten(0, -2), features_ND.flatten(0, -2)
        wants_features, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _onednn(rows_NE, weight_ED.T, None).view_as(features_ND) if wants_features else None,
            _onednn(rows_NE.T, rows_ND.T, None) if wants_weight else None,
            rows_NE.sum(dim=0) if wants_bias else None,
        )


def _is_for_onednn(left: Tensor, right: Tensor) -> bool:
    is_float32_on_cpu = left.dtype == right.dtype == torch.float32 and left.device.type == right.device.type == "cpu"
    # Vectors, no rows, and shapes that do not fit, of which torch speaks more clearly, are left to torch.
    is_usual = left.ndim >= 2 and left.numel() > 0 and right.ndim == 2 and left.shape[-1] == right.shape[-1]
    return HAS_ONEDNN and is_float32_on_cpu and is_usual


def _onednn(left: Tensor, right_MR: Tensor, bias_M: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right_MR, bias_M, "none", [], "")
