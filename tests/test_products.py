from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from passreid_ray import products
from passreid_ray.products import Linear, linear, product_with_transposed, use_in

needs_onednn = pytest.mark.skipif(not products.HAS_ONEDNN, reason="this torch has no oneDNN")


class Operators(TorchDispatchMode):
    """Names of the operators that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN204 torch's own signature
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def has_onednn(self) -> bool:
        return any("mkldnn" in name for name in self.names)


def random_layer(*leading: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return leaf(*leading, 24), leaf(40, 24), leaf(40)


def outcome(out: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradients of a nonlinear function of it."""
    return [out, *torch.autograd.grad(out.cos().sum(), leaves)]


@pytest.mark.parametrize("has_onednn", [False, pytest.param(True, marks=needs_onednn)])
@pytest.mark.parametrize("leading", [(7,), (3, 5)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_values_and_gradients_are_those_of_float64(has_onednn: bool, leading: tuple[int, ...], has_bias: bool) -> None:
    leaves = random_layer(*leading)[: 2 + has_bias]
    with patch.object(products, "HAS_ONEDNN", has_onednn), Operators() as called:
        found = outcome(linear(*leaves), leaves)
    assert called.has_onednn == has_onednn
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    for own, expected in zip(found, outcome(F.linear(*exact), exact), strict=True):
        assert own.shape == expected.shape
        assert (own.double() - expected).norm() < 1e-6 * expected.norm()


@needs_onednn
def test_gradients_that_nobody_wants_are_not_computed() -> None:
    features_ND, weight_ED, _ = random_layer(7)
    out_NE = linear(features_ND.detach(), weight_ED)
    with Operators() as called:
        out_NE.sum().backward()
    assert sum("mkldnn" in name for name in called.names) == 1
    assert features_ND.grad is None
    assert weight_ED.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(dtype: torch.dtype) -> None:
    leaves = random_layer(7, dtype=dtype)
    with Operators() as called:
        found = linear(*leaves)
    assert not called.has_onednn
    torch.testing.assert_close(found, F.linear(*leaves), rtol=0, atol=0)


def test_a_vector_gives_a_vector_and_wrong_shapes_the_message_of_torch() -> None:
    features_ND, weight_ED, bias_E = random_layer(7)
    torch.testing.assert_close(linear(features_ND[0], weight_ED, bias_E), linear(features_ND, weight_ED, bias_E)[0])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(features_ND[:, 1:], weight_ED)


def test_autocast_rules_the_type() -> None:
    leaves = random_layer(7)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*leaves).dtype == torch.bfloat16


def test_no_rows_give_no_rows_and_gradients_of_zero() -> None:
    leaves = random_layer(0)
    out, *gradients = outcome(linear(*leaves), leaves)
    assert out.shape == (0, 40)
    assert [tuple(own.shape) for own in gradients] == [(0, 24), (40, 24), (40,)]
    assert not any(own.any() for own in gradients)


def test_a_product_is_that_with_the_transposed() -> None:
    left_NR, right_MR, _ = random_layer(7)
    expected = left_NR.double() @ right_MR.double().T
    assert (product_with_transposed(left_NR.detach(), right_MR.detach()) - expected).norm() < 1e-6 * expected.norm()


def test_layers_of_a_module_change_and_their_names_and_weights_stay() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2, bias=False)))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    use_in(module)
    assert [type(layer) for layer in module.modules() if isinstance(layer, nn.Linear)] == [Linear, Linear]
    assert all(map(torch.equal, before.values(), module.state_dict().values()))
    assert before.keys() == module.state_dict().keys()
