import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.losses import ClusterMemory, MemoryUpdate, Negatives
from tests.ranks import run_on_ranks
from tests.reference.literal_memory import literal_loss, literal_update

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "cluster_memory.npz", allow_pickle=False)
UPDATES: tuple[MemoryUpdate, ...] = get_args(MemoryUpdate)
NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)


def batch(seed: int, num_samples: int = 32, num_clusters: int = 7, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids, features half of which are near their own centroid, labels."""
    generator = torch.Generator().manual_seed(seed)
    centroids_KD = torch.randn(num_clusters, width, generator=generator)
    labels_N = torch.randint(num_clusters, (num_samples,), generator=generator)
    pull_N1 = torch.randint(2, (num_samples, 1), generator=generator)
    features_ND = torch.randn(num_samples, width, generator=generator) * 2 + pull_N1 * 1.5 * centroids_KD[labels_N]
    return centroids_KD, features_ND, labels_N


@pytest.mark.parametrize(("golden_name", "update"), [("mean", "plain"), ("hard", "hard")])
@pytest.mark.parametrize(("temp", "momentum"), [(0.05, 0.2), (0.05, 0.1), (0.07, 0.5)])
def test_two_steps_equal_the_reference_implementation(
    golden_name: str, update: MemoryUpdate, temp: float, momentum: float
) -> None:
    memory = ClusterMemory(torch.from_numpy(GOLDEN["mem0"]), temp, momentum, update)
    for step in range(2):
        expected = f"{golden_name}_T{temp}_m{momentum}/step{step}"
        features_ND = torch.from_numpy(GOLDEN[f"x{step}"]).requires_grad_()
        labels_N = torch.from_numpy(GOLDEN[f"t{step}"])
        loss = memory.loss(features_ND, labels_N)
        loss.backward()
        memory.update(features_ND.detach(), labels_N)
        assert features_ND.grad is not None
        np.testing.assert_allclose(loss.item(), GOLDEN[f"{expected}/loss"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(features_ND.grad.numpy(), GOLDEN[f"{expected}/grad_x"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(memory.centroids_KD.numpy(), GOLDEN[f"{expected}/memory_after"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("seed", range(12))
def test_an_update_equals_the_definition_sample_by_sample(seed: int, update: MemoryUpdate) -> None:
    centroids_KD, features_ND, labels_N = batch(seed)
    refined_ND = features_ND + torch.randn(features_ND.shape, generator=torch.Generator().manual_seed(seed))
    centroids, features = centroids_KD.double().numpy(), features_ND.double().numpy()
    for given_ND in (None, refined_ND):
        memory = ClusterMemory(centroids_KD, momentum=0.3, update=update)
        memory.update(features_ND, labels_N, refined_ND=given_ND)
        deciding_ND = (features_ND if given_ND is None else given_ND).double().numpy()
        expected = literal_update(centroids, features, labels_N.numpy(), 0.3, update, deciding_ND)
        np.testing.assert_allclose(memory.centroids_KD.numpy(), expected, rtol=0, atol=1e-6)


def test_refined_features_change_which_samples_are_reliable() -> None:
    centroids_KD, features_ND, labels_N = batch(0)
    by_features, by_refined = (ClusterMemory(centroids_KD, update="selective") for _ in range(2))
    by_features.update(features_ND, labels_N)
    by_refined.update(features_ND, labels_N, refined_ND=centroids_KD[labels_N])
    assert not torch.allclose(by_features.centroids_KD, by_refined.centroids_KD)
    hard = ClusterMemory(centroids_KD, update="hard")
    hard.update(features_ND, labels_N)
    torch.testing.assert_close(by_refined.centroids_KD, hard.centroids_KD)


def test_a_tenth_of_the_old_centroid_is_kept_before_normalising() -> None:
    memory = ClusterMemory(torch.tensor([[1.0, 0.0]]), momentum=0.1)
    memory.update(torch.tensor([[0.0, 5.0]]), torch.tensor([0]))
    np.testing.assert_allclose(memory.centroids_KD.numpy(), [[0.1104, 0.9939]], atol=5e-5)


@pytest.mark.parametrize("num_clusters", [3, 200])
def test_features_on_orthogonal_centroids_have_the_smallest_loss_there_is(num_clusters: int) -> None:
    memory = ClusterMemory(torch.eye(num_clusters, dtype=torch.float64))
    loss = memory.loss(3 * torch.eye(num_clusters, dtype=torch.float64), torch.arange(num_clusters))
    assert loss.item() == pytest.approx(math.log1p((num_clusters - 1) * math.exp(-20)), rel=1e-6)


def test_hard_takes_the_least_similar_sample_and_the_first_of_equals() -> None:
    features_ND = torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.0, -1.0], [0.5, 0.5]])
    memory = ClusterMemory(torch.tensor([[1.0, 0.0]]), momentum=0.0, update="hard")
    memory.update(features_ND, torch.zeros(4, dtype=torch.int64))
    assert memory.centroids_KD.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("update", UPDATES)
def test_clusters_that_are_not_in_the_batch_stay(update: MemoryUpdate) -> None:
    centroids_KD, features_ND, labels_N = batch(1)
    memory = ClusterMemory(centroids_KD, update=update)
    before_KD = memory.centroids_KD.clone()
    kept_N = labels_N != 3
    memory.update(features_ND[kept_N], labels_N[kept_N])
    changed_K = (memory.centroids_KD != before_KD).any(dim=1)
    assert not changed_K[3]
    assert changed_K.any()
    torch.testing.assert_close(memory.centroids_KD.norm(dim=1), torch.ones(7))
    memory.update(features_ND[:0], labels_N[:0])


def test_selective_leaves_a_cluster_without_a_reliable_sample() -> None:
    memory = ClusterMemory(torch.eye(3), update="selective")
    memory.update(torch.eye(3)[[1, 2]], torch.tensor([0, 0]))
    assert torch.equal(memory.centroids_KD, torch.eye(3))


@pytest.mark.parametrize(("negatives", "easy_weight"), [("all", 1.0), ("weighted", 0.5), ("hardest", 0.0)])
@pytest.mark.parametrize("num_hard", [1, 3, 50])
def test_the_loss_equals_its_formula_written_out(negatives: Negatives, easy_weight: float, num_hard: int) -> None:
    centroids_KD, features_ND, labels_N = batch(2)
    memory = ClusterMemory(centroids_KD, temp=0.2, negatives=negatives, num_hard_negatives=num_hard)
    centroids, features = centroids_KD.double().numpy(), features_ND.double().numpy()
    expected = literal_loss(centroids, features, labels_N.numpy(), 0.2, num_hard, easy_weight)
    assert memory.loss(features_ND, labels_N).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_the_gradient_is_that_of_finite_differences_and_reaches_features_only(negatives: Negatives) -> None:
    centroids_KD, features_ND, labels_N = (tensor[:5] for tensor in batch(3))
    memory = ClusterMemory(centroids_KD.double(), temp=0.2, negatives=negatives, num_hard_negatives=2)
    labels_N = labels_N % 5
    assert torch.autograd.gradcheck(
        lambda rows_ND: memory.loss(rows_ND, labels_N), features_ND.double().requires_grad_()
    )
    assert list(memory.parameters()) == []
    assert not memory.centroids_KD.requires_grad
    memory.update(features_ND.requires_grad_(), labels_N)
    assert not memory.centroids_KD.requires_grad


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_a_single_cluster_has_no_loss(negatives: Negatives) -> None:
    memory = ClusterMemory(torch.ones(1, 4), negatives=negatives)
    assert memory.loss(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)).item() == 0


def step_on_a_shard(
    centroids_KD: Tensor, features_ND: Tensor, labels_N: Tensor, update: MemoryUpdate, negatives: Negatives
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient as DDP averages them over ranks, and the memory, after one step."""
    memory = ClusterMemory(centroids_KD, update=update, negatives=negatives, num_hard_negatives=2)
    world_size, rank = distributed.world_size(), distributed.rank()
    rows_ND = features_ND.chunk(world_size)[rank].clone().requires_grad_()
    own_N = labels_N.chunk(world_size)[rank]
    loss = memory.loss(rows_ND, own_N)
    loss.backward()
    memory.update(rows_ND.detach(), own_N, refined_ND=rows_ND.detach().roll(1, dims=1) + 2 * rows_ND.detach())
    assert rows_ND.grad is not None
    gradient_ND = distributed.all_gather(rows_ND.grad) / world_size
    return distributed.all_reduce_mean(loss.detach()), gradient_ND, memory.centroids_KD


def steps_on_a_shard(centroids_KD: Tensor, features_ND: Tensor, labels_N: Tensor) -> list[tuple[Tensor, ...]]:
    return [
        step_on_a_shard(centroids_KD, features_ND, labels_N, update, negatives)
        for update, negatives in zip(UPDATES, NEGATIVES, strict=True)
    ]


def test_two_ranks_equal_one() -> None:
    centroids_KD, features_ND, labels_N = batch(4)
    expected = steps_on_a_shard(centroids_KD, features_ND, labels_N)
    for found in run_on_ranks(steps_on_a_shard, centroids_KD, features_ND, labels_N):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_loss_under_autocast_is_that_without() -> None:
    centroids_KD, features_ND, labels_N = batch(5)
    memory = ClusterMemory(centroids_KD, update="selective")
    half_ND = features_ND.bfloat16()
    expected = memory.loss(half_ND.float(), labels_N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = memory.loss(half_ND, labels_N)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    memory.update(half_ND, labels_N)
    assert memory.centroids_KD.dtype == torch.float32


def cosine_to_truth(update: MemoryUpdate, wrong_labels: float, seed: int) -> float:
    """Mean cosine of centroids to the true centres after 50 batches; 20 identities, noise twice the signal."""
    generator = torch.Generator().manual_seed(seed)
    true_KD = torch.nn.functional.normalize(torch.randn(20, 64, generator=generator), dim=1)
    person_N = torch.arange(20).repeat_interleave(12)
    features_ND = true_KD[person_N] + torch.randn(240, 64, generator=generator) * 2 / 8
    wrong_N = torch.rand(240, generator=generator) < wrong_labels
    labels_N = torch.where(wrong_N, torch.randint(20, (240,), generator=generator), person_N)
    means_KD = torch.stack([features_ND[labels_N == cluster].mean(0) for cluster in range(20)])
    memory = ClusterMemory(means_KD, update=update)
    for _ in range(50):
        chosen = torch.randperm(240, generator=generator)[:80]
        memory.update(features_ND[chosen], labels_N[chosen])
    return float((memory.centroids_KD * true_KD).sum(1).mean())


@pytest.mark.parametrize("wrong_labels", [0.2, 0.4])
def test_selective_stays_nearest_to_the_truth_among_wrong_labels_and_hard_farthest(wrong_labels: float) -> None:
    cosine_SU = np.array([[cosine_to_truth(update, wrong_labels, seed) for update in UPDATES] for seed in range(10)])
    plain_S, hard_S, selective_S = cosine_SU.T
    assert (selective_S > hard_S + 0.05).all()
    assert selective_S.mean() > plain_S.mean() + 0.05
    assert plain_S.mean() > hard_S.mean() + 0.03


def test_the_memory_is_saved_with_the_state() -> None:
    memory = ClusterMemory(torch.randn(3, 4))
    other = ClusterMemory(torch.randn(3, 4))
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.centroids_KD, memory.centroids_KD)


@pytest.mark.parametrize(
    ("features_ND", "labels_N", "message"),
    [
        (torch.ones(2, 5), torch.tensor([0, 1]), "centroids have width 4"),
        (torch.ones(2, 4), torch.tensor([0, 1, 2]), "one integer label per feature"),
        (torch.ones(2, 4), torch.tensor([0.0, 1.0]), "one integer label per feature"),
        (torch.ones(2, 4), torch.tensor([0, 3]), "label 3 with 3 centroids"),
        (torch.ones(2, 4), torch.tensor([0, -1]), "leave outliers"),
        (torch.tensor([[1.0, 2.0, math.nan, 0.0]]), torch.tensor([0]), "NaN or infinity"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_changes_nothing(
    features_ND: Tensor, labels_N: Tensor, message: str
) -> None:
    memory = ClusterMemory(torch.eye(3, 4))
    with pytest.raises(UserError, match=message):
        memory.loss(features_ND, labels_N)
    with pytest.raises(UserError, match=message):
        memory.update(features_ND, labels_N)
    assert torch.equal(memory.centroids_KD, torch.eye(3, 4))


def test_refined_features_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match="one refined row per feature"):
        ClusterMemory(torch.eye(3)).update(torch.eye(3), torch.arange(3), refined_ND=torch.eye(3)[:2])


def test_centroids_and_settings_without_meaning_are_refused() -> None:
    with pytest.raises(UserError, match="centroid 1 of 2 is zero"):
        ClusterMemory(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(UserError, match="centroid 0 of 1 is zero or not finite"):
        ClusterMemory(torch.tensor([[math.nan, 0.0]]))
    with pytest.raises(UserError, match="both above 0"):
        ClusterMemory(torch.ones(0, 3))
    with pytest.raises(UserError, match="temp"):
        ClusterMemory(torch.eye(2), temp=0)
    with pytest.raises(UserError, match="momentum"):
        ClusterMemory(torch.eye(2), momentum=1)
    with pytest.raises(UserError, match="choose one of plain, hard, selective"):
        ClusterMemory(torch.eye(2), update="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="choose one of all, weighted, hardest"):
        ClusterMemory(torch.eye(2), negatives="none")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="at least 1"):
        ClusterMemory(torch.eye(2), num_hard_negatives=0)
