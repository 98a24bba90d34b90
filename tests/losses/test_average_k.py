import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.losses.average_k import average_k_labels, average_k_loss, average_k_threshold
from tests.ranks import run_on_ranks

PROBABILITIES_NC = torch.tensor(
    [[0.9, 0.05, 0.03, 0.02], [0.4, 0.35, 0.2, 0.05], [0.3, 0.3, 0.25, 0.15]], dtype=torch.float64
)


def literal_labels(scores_NC: Tensor, ids: list[int], k: int) -> Tensor:
    """The definition step by step: the N k largest, then own classes in and for each the smallest chosen one out."""
    num_classes = scores_NC.shape[1]
    ranking = sorted(
        ((-score, row, column) for row, scores in enumerate(scores_NC.tolist()) for column, score in enumerate(scores))
    )
    chosen = [(row, column) for _, row, column in ranking[: len(ids) * k]]
    own = set(enumerate(ids))
    for place in sorted(own - set(chosen)):
        chosen.remove([other for other in chosen if other not in own][-1])
        chosen.append(place)
    label_NC = torch.zeros(len(ids), num_classes, dtype=torch.bool)
    for place in chosen:
        label_NC[place] = True
    return label_NC


def literal_loss(
    logits_NC: Tensor, set_logits_NC: Tensor, ids: list[int], k: int, set_weight: float, negative_weight: float
) -> Tensor:
    label_NC = literal_labels(logits_NC.softmax(dim=1), ids, k)
    total = logits_NC.new_zeros(())
    for row, own in enumerate(ids):
        total = total - logits_NC[row].softmax(dim=0)[own].log()
        for column in range(logits_NC.shape[1]):
            probability = set_logits_NC[row, column].sigmoid()
            if label_NC[row, column]:
                total = total - set_weight * probability.log()
            else:
                total = total - set_weight * negative_weight * (1 - probability).log()
    return total / len(ids)


def test_the_threshold_is_the_midpoint_around_k_per_row() -> None:
    threshold = average_k_threshold(PROBABILITIES_NC, 2)
    assert threshold.item() == pytest.approx(0.225)
    assert (threshold <= PROBABILITIES_NC).sum(dim=1).tolist() == [1, 2, 3]
    assert average_k_labels(PROBABILITIES_NC, torch.tensor([0, 1, 2]), 2).sum(dim=1).tolist() == [1, 2, 3]


def test_average_2_beats_top_2_where_half_the_rows_are_certain_and_half_are_open_among_three() -> None:
    certain_NC = F.one_hot(torch.tensor([0, 1, 2]), 4).double()
    open_NC = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0]], dtype=torch.float64).repeat(3, 1)
    probabilities_NC, ids_N = torch.cat([certain_NC, open_NC]), torch.tensor([0, 1, 2, 0, 1, 2])
    set_NC = probabilities_NC >= average_k_threshold(probabilities_NC, 2)
    top_2_NC = torch.zeros_like(set_NC).scatter(1, probabilities_NC.topk(2, dim=1).indices, True)

    def accuracy(set_NC: Tensor) -> float:
        return set_NC[torch.arange(6), ids_N].double().mean().item()

    assert set_NC.double().sum(dim=1).mean().item() == 2
    assert accuracy(set_NC) == 1
    assert accuracy(top_2_NC) == pytest.approx(0.8333, abs=5e-5)


@pytest.mark.parametrize("k", [1, 2, 5, 6])
@pytest.mark.parametrize("seed", range(8))
def test_labels_equal_the_definition_step_by_step(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_N = torch.randint(7, (9,), generator=generator)
    logits_NC = torch.randn(9, 7, generator=generator) * 2
    probabilities_NC = logits_NC.softmax(dim=1)
    coarse_NC = (probabilities_NC * 5).round()  # many ties
    for scores_NC in (probabilities_NC, coarse_NC, torch.zeros(9, 7)):
        label_NC = average_k_labels(scores_NC, ids_N, k)
        assert torch.equal(label_NC, literal_labels(scores_NC, ids_N.tolist(), k))
        assert int(label_NC.sum()) == 9 * k
        assert bool(label_NC[torch.arange(9), ids_N].all())


def test_the_own_class_takes_the_place_of_the_smallest_chosen_one() -> None:
    label_NC = average_k_labels(PROBABILITIES_NC, torch.tensor([3, 1, 2]), 2)
    # 0.25 is row 2's own class and stays; of the two 0.3 the second one goes.
    assert label_NC.int().tolist() == [[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 1, 0]]


@pytest.mark.parametrize(("set_weight", "negative_weight"), [(1.0, 1.0), (0.3, 1.0), (1.0, 0.1)])
@pytest.mark.parametrize("k", [1, 3])
def test_value_and_gradients_equal_the_formula_written_out(k: int, set_weight: float, negative_weight: float) -> None:
    logits_NC, set_logits_NC = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids_N = torch.randint(6, (5,))
    loss = average_k_loss(logits_NC, set_logits_NC, ids_N, k, set_weight=set_weight, negative_weight=negative_weight)
    expected = literal_loss(logits_NC, set_logits_NC, ids_N.tolist(), k, set_weight, negative_weight)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (logits_NC, set_logits_NC)),
        torch.autograd.grad(expected, (logits_NC, set_logits_NC)),
        rtol=1e-9,
        atol=1e-12,
    )


def test_pseudo_labels_tell_apart_what_underflows_in_the_softmax() -> None:
    # Probabilities of classes 1 to 3 are 0 in float32; the likeliest of them is class 3.
    logits_NC, set_logits_NC = torch.tensor([[400.0, 0.0, 10.0, 20.0]]), torch.zeros(1, 4, requires_grad=True)
    average_k_loss(logits_NC, set_logits_NC, torch.tensor([0]), 2).backward()
    assert set_logits_NC.grad is not None
    assert set_logits_NC.grad.tolist() == [[-0.5, 0.5, 0.5, -0.5]]


def test_the_order_of_the_rows_does_not_matter() -> None:
    logits_NC, set_logits_NC, ids_N = torch.randn(8, 6).double(), torch.randn(8, 6).double(), torch.randint(6, (8,))
    order_N = torch.randperm(8)
    loss = average_k_loss(logits_NC, set_logits_NC, ids_N, 2)
    torch.testing.assert_close(average_k_loss(logits_NC[order_N], set_logits_NC[order_N], ids_N[order_N], 2), loss)


def loss_and_mean_gradient(inputs_ND: Tensor, weight_DC: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """Loss on this rank and the gradient that DDP would set."""
    world_size, rank = distributed.world_size(), distributed.rank()
    leaf_DC = weight_DC.clone().requires_grad_()
    logits_NC, set_logits_NC = (inputs_ND.chunk(world_size)[rank] @ leaf_DC).chunk(2, dim=1)
    loss = average_k_loss(logits_NC, set_logits_NC, ids_N.chunk(world_size)[rank], 3)
    loss.backward()
    assert leaf_DC.grad is not None
    return loss.detach(), distributed.all_reduce_mean(leaf_DC.grad)


def labels_and_threshold(scores_SNC: Tensor, ids_N: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of all ranks, for each of several scores and of k."""
    world_size, rank = distributed.world_size(), distributed.rank()
    found = []
    for scores_NC in scores_SNC:
        own_NC = scores_NC.chunk(world_size)[rank]
        for k in (1, 2, 5):
            label_NC = average_k_labels(own_NC, ids_N.chunk(world_size)[rank], k)
            found.append((distributed.all_gather(label_NC.int()), average_k_threshold(own_NC, k)))
    return found


def on_two_ranks(
    inputs_ND: Tensor, weight_DC: Tensor, scores_SNC: Tensor, ids_N: Tensor
) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
    return loss_and_mean_gradient(inputs_ND, weight_DC, ids_N), labels_and_threshold(scores_SNC, ids_N)


def test_two_ranks_that_share_identities_and_certainty_unevenly_equal_one() -> None:
    ids_N = torch.tensor([5, 0, 0, 2, 0, 2, 2, 0])
    inputs_ND, weight_DC = torch.randn(8, 5), torch.randn(5, 12)
    inputs_ND[:4] *= 10  # the first rank is certain: its share of the pseudo-labels is the smaller one
    scores_NC = torch.randn(8, 6)
    one_sided_NC = scores_NC + 100 * (torch.arange(8) >= 4)[:, None]
    scores_SNC = torch.stack([scores_NC, one_sided_NC, scores_NC.round(), torch.zeros(8, 6)])
    expected = on_two_ranks(inputs_ND, weight_DC, scores_SNC, ids_N)
    for found in run_on_ranks(on_two_ranks, inputs_ND, weight_DC, scores_SNC, ids_N):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_computed_in_float32_and_double_stays() -> None:
    logits_NC, set_logits_NC, ids_N = torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16(), torch.arange(4)
    expected = average_k_loss(logits_NC.float(), set_logits_NC.float(), ids_N, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = average_k_loss(logits_NC, set_logits_NC, ids_N, 2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert average_k_loss(logits_NC.double(), set_logits_NC.double(), ids_N, 2).dtype == torch.float64


def test_batches_and_settings_without_meaning_are_refused() -> None:
    logits_NC, ids_N = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"scores of shape \(6,\)"):
        average_k_threshold(logits_NC.flatten(), 1)
    with pytest.raises(UserError, match="both above 0"):
        average_k_loss(logits_NC[:0], logits_NC[:0], ids_N[:0], 1)
    with pytest.raises(UserError, match="one of each per row and class"):
        average_k_loss(logits_NC, logits_NC[:, :2], ids_N, 1)
    with pytest.raises(UserError, match="one integer id per row"):
        average_k_loss(logits_NC, logits_NC, torch.tensor([0, 1, 2]), 1)
    with pytest.raises(UserError, match="one integer id per row"):
        average_k_loss(logits_NC, logits_NC, torch.tensor([0.0, 1.0]), 1)
    with pytest.raises(UserError, match="id 3 with 3 classes"):
        average_k_loss(logits_NC, logits_NC, torch.tensor([0, 3]), 1)
    for k in (0, 3):
        with pytest.raises(UserError, match=f"k: {k} of 3 classes"):
            average_k_loss(logits_NC, logits_NC, ids_N, k)
    with pytest.raises(UserError, match="set_weight -1"):
        average_k_loss(logits_NC, logits_NC, ids_N, 1, set_weight=-1)
