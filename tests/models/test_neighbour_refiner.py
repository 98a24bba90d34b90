import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.models.neighbour_refiner import NeighbourLayer, NeighbourRefiner, refine_features
from tests.ranks import run_on_ranks
from tests.reference.literal_memory import literal_refined


def people(sigma: float, num_ids: int = 20, images: int = 12, width: int = 64) -> tuple[Tensor, Tensor]:
    """Unit features around unit centres, noise of length about ``sigma``; and each row's true centre."""
    generator = torch.Generator().manual_seed(0)
    centres_ID = F.normalize(torch.randn(num_ids, width, generator=generator), dim=1)
    centres_ND = centres_ID.repeat_interleave(images, dim=0)
    noise_ND = torch.randn(centres_ND.shape, generator=generator) * sigma / width**0.5
    return F.normalize(centres_ND + noise_ND, dim=1), centres_ND


def nearest_others(features_ND: Tensor, k: int) -> Tensor:
    similarity_NN = features_ND @ features_ND.t()
    return similarity_NN.fill_diagonal_(-2).topk(k, dim=1).indices


def learnt_refiner(width: int, num_layers: int) -> NeighbourRefiner:
    refiner = NeighbourRefiner(width, num_layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in refiner.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return refiner


def own_matrices(layer: torch.nn.Module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert isinstance(layer, NeighbourLayer)
    query, key, value = (matrix.detach().double().numpy() for matrix in (layer.query_DD, layer.key_DD, layer.value_DD))
    return query, key, value


def test_untrained_it_equals_the_formula_with_identity_matrices() -> None:
    features_ND, _ = people(1.0, num_ids=4, images=5, width=12)
    neighbours_Nk = nearest_others(features_ND, 4)
    found_ND = NeighbourRefiner(12, temp=0.2, strength=0.7)(3 * features_ND, neighbours_Nk)
    expected = literal_refined(features_ND.double().numpy(), neighbours_Nk.tolist(), 0.2, 0.7)
    np.testing.assert_allclose(found_ND.detach().numpy(), expected, rtol=0, atol=1e-6)


def test_learnt_matrices_and_two_layers_equal_the_formula() -> None:
    features_ND, _ = people(1.0, num_ids=4, images=5, width=12)
    neighbours_Nk = nearest_others(features_ND, 4)
    refiner = learnt_refiner(12, 2)
    expected = features_ND.double().numpy()
    for layer in refiner.layers:
        expected = literal_refined(expected, neighbours_Nk.tolist(), 0.1, 1.0, own_matrices(layer))
    np.testing.assert_allclose(refiner(features_ND, neighbours_Nk).detach().numpy(), expected, rtol=0, atol=1e-6)


def test_missing_neighbours_and_the_row_itself_are_left_out() -> None:
    features_ND = F.normalize(torch.randn(5, 6), dim=1)
    neighbours_Nk = torch.tensor([[0, 3, 2], [-1, -1, -1], [4, -1, 0], [3, 3, 3], [1, 2, 3]])
    expected = literal_refined(features_ND.double().numpy(), [[3, 2], [], [4, 0], [], [1, 2, 3]], 0.1, 1.0)
    refiner = NeighbourRefiner(6)
    found_ND = refiner(features_ND, neighbours_Nk)
    np.testing.assert_allclose(found_ND.detach().numpy(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found_ND[[1, 3]], features_ND[[1, 3]])
    torch.testing.assert_close(refiner(features_ND, neighbours_Nk[:, :0]), features_ND)


def test_a_row_without_neighbours_has_finite_gradients() -> None:
    features_ND = torch.randn(3, 6).requires_grad_()
    refiner = NeighbourRefiner(6)
    refiner(features_ND, torch.full((3, 2), -1)).pow(3).sum().backward()
    for tensor in (features_ND, *refiner.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
def test_each_layer_brings_noisy_features_nearer_to_their_own_centre(sigma: float) -> None:
    features_ND, centres_ND = people(sigma)
    neighbours_Nk = nearest_others(features_ND, 8)
    cosines = [
        float((refined_ND.detach() * centres_ND).sum(1).mean())
        for refined_ND in (
            features_ND,
            NeighbourRefiner(64, 1)(features_ND, neighbours_Nk),
            NeighbourRefiner(64, 2)(features_ND, neighbours_Nk),
        )
    ]
    assert cosines[0] + 0.05 < cosines[1] < cosines[2]


def test_the_gradient_reaches_all_matrices_and_the_features() -> None:
    features_ND = people(1.0, num_ids=3, images=4, width=8)[0].requires_grad_()
    refiner = NeighbourRefiner(8, 2)
    refiner.refine_batch(features_ND, 3).pow(3).sum().backward()
    gradients = [tensor.grad for tensor in (features_ND, *refiner.parameters())]
    assert len(gradients) == 7
    assert all(gradient is not None and float(gradient.abs().max()) > 1e-5 for gradient in gradients)


def test_the_gradient_is_that_of_finite_differences() -> None:
    features_ND = people(1.0, num_ids=2, images=3, width=4)[0].double().requires_grad_()
    neighbours_Nk = torch.tensor([[1, 2], [0, -1], [4, 5], [3, 0], [-1, -1], [2, 1]])
    refiner = learnt_refiner(4, 1).double()
    inputs = (features_ND, *refiner.parameters())
    assert torch.autograd.gradcheck(lambda rows_ND, *_: refiner(rows_ND, neighbours_Nk), inputs)


def test_a_batch_is_refined_by_its_nearest_other_rows_capped_at_its_size() -> None:
    features_ND, _ = people(2.0, num_ids=3, images=4, width=16)
    refiner = learnt_refiner(16, 2)
    torch.testing.assert_close(
        refiner.refine_batch(5 * features_ND, 3), refiner(features_ND, nearest_others(features_ND, 3))
    )
    torch.testing.assert_close(
        refiner.refine_batch(features_ND, 50), refiner(features_ND, nearest_others(features_ND, 11))
    )
    torch.testing.assert_close(refiner.refine_batch(features_ND[:1], 8), features_ND[:1])


def refined_shard(features_ND: Tensor, refiner: NeighbourRefiner) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Refined rows and gradients of a mean loss, as DDP averages them, of the whole batch."""
    refiner = copy.deepcopy(refiner)
    world_size = distributed.world_size()
    own_ND = features_ND.chunk(world_size)[distributed.rank()].clone().requires_grad_()
    refined_ND = refiner.refine_batch(own_ND, 4)
    (refined_ND[:, 0] * refined_ND[:, 1].exp()).mean().backward()
    assert own_ND.grad is not None
    gradients = [distributed.all_reduce_mean(p.grad) for p in refiner.parameters() if p.grad is not None]
    assert len(gradients) == 3 * len(refiner.layers)
    return distributed.all_gather(refined_ND), distributed.all_gather(own_ND.grad) / world_size, gradients


@pytest.mark.parametrize("num_layers", [1, 2])
def test_two_ranks_refine_like_one_in_value_and_gradient(num_layers: int) -> None:
    features_ND, _ = people(2.0, num_ids=4, images=4, width=16)
    refiner = learnt_refiner(16, num_layers)
    expected = refined_shard(features_ND, refiner)
    assert float(expected[1].abs().max()) > 1e-4
    for found in run_on_ranks(refined_shard, features_ND, refiner):
        torch.testing.assert_close(found, (expected[0].detach(), *expected[1:]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_layer_after_layer_equal_the_whole_graph(block: int) -> None:
    features_ND, _ = people(2.0, num_ids=5, images=6, width=16)
    neighbours_Nk = nearest_others(features_ND, 5)
    neighbours_Nk[3] = -1
    refiner = learnt_refiner(16, 2)
    found = features_ND.numpy()
    for layer in range(2):
        found = np.concatenate(
            [
                refine_features(refiner, found, neighbours_Nk.numpy(), slice(start, start + block), layer=layer)
                for start in range(0, 30, block)
            ]
        )
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found), refiner(features_ND, neighbours_Nk).detach(), rtol=0, atol=1e-6)


def test_under_autocast_it_stays_in_float32() -> None:
    features_ND, _ = people(1.0, num_ids=3, images=4, width=16)
    refiner = learnt_refiner(16, 2)
    expected = refiner.refine_batch(features_ND, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = refiner.refine_batch(features_ND, 3)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_what_does_not_fit_is_refused() -> None:
    refiner = NeighbourRefiner(4)
    features_ND = torch.randn(3, 4)
    for neighbours_Nk, message in [
        (torch.zeros(2, 2, dtype=torch.int64), "give 3 rows of integer indices"),
        (torch.zeros(3, 2), "give 3 rows of integer indices"),
        (torch.tensor([[3], [0], [1]]), "0..3 among 3 features"),
        (torch.tensor([[-2], [0], [1]]), "-2..1 among 3 features"),
    ]:
        with pytest.raises(UserError, match=message):
            refiner(features_ND, neighbours_Nk)
    with pytest.raises(UserError, match="matrices have width 4"):
        refiner(torch.randn(3, 5), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="num_neighbours"):
        refiner.refine_batch(features_ND, 0)
    with pytest.raises(UserError, match="the refiner has 1"):
        refine_features(refiner, features_ND.numpy(), np.zeros((3, 1), np.int64), slice(0, 3), layer=1)
    with pytest.raises(UserError, match="2 rows of neighbours beside 3 features"):
        refine_features(refiner, features_ND.numpy(), np.zeros((2, 1), np.int64), slice(0, 2))
    with pytest.raises(UserError, match="among 3 features"):
        refine_features(refiner, features_ND.numpy(), np.full((3, 1), 3), slice(0, 3))
    with pytest.raises(UserError, match="at least 1 of each"):
        NeighbourRefiner(4, 0)
    with pytest.raises(UserError, match="temp"):
        NeighbourRefiner(4, temp=0)
