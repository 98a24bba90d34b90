from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.config import build
from passreid_ray.errors import UserError
from passreid_ray.train.patch_masks import MaskedPatchConfig, PatchMasks, draw_patch_masks
from tests.ranks import run_on_ranks

GRID, NUM_PATCHES = (16, 8), 128
ON = MaskedPatchConfig(weight=1)


def drawn(batch: int = 8, config: MaskedPatchConfig = ON, **changes: Any) -> PatchMasks:
    arguments = {"seed": 3, "step": 5, "num_global": 2, "num_micro_batches": 1, "device": torch.device("cpu")}
    return draw_patch_masks(config, GRID, batch=batch, **{**arguments, **changes})


def masks_of(masks: PatchMasks, batch: int) -> Tensor:
    """``(2, B, L)``, true where hidden."""
    parts = []
    for own in masks.micro_batches:
        views = 2 * batch // len(masks.micro_batches)
        hidden = torch.zeros(views * NUM_PATCHES, dtype=torch.bool)
        hidden[own.patches_M] = True
        parts.append(hidden.view(2, -1, NUM_PATCHES))
    return torch.cat(parts, dim=1)


def all_views(masks: PatchMasks, batch: int = 8) -> Tensor:
    return masks_of(masks, batch).flatten(0, 1)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_the_given_share_of_views_is_masked_and_at_least_one(share: float) -> None:
    masked = all_views(drawn(config=MaskedPatchConfig(weight=1, share=share))).any(dim=1)
    assert int(masked.sum()) == max(1, round(share * 16))


def test_ratios_are_in_their_range_and_spread_over_it() -> None:
    views_NL = all_views(drawn(256), 256)
    ratios = torch.sort(views_NL[views_NL.any(dim=1)].double().mean(dim=1)).values
    half_a_patch = 0.5 / NUM_PATCHES
    assert 0.1 - half_a_patch <= ratios[0] < ratios[-1] <= 0.5 + half_a_patch
    even = torch.linspace(0.1, 0.5, len(ratios), dtype=torch.float64)
    assert float((ratios - even).abs().max()) < 0.01


def test_a_tiny_ratio_still_hides_a_patch() -> None:
    masks = drawn(config=MaskedPatchConfig(weight=1, ratio=(0.0001, 0.0001)))
    assert masks.total == 8


def test_weights_make_the_mean_over_views_of_the_mean_over_patches() -> None:
    masks = drawn()
    (own,) = masks.micro_batches
    values_M = torch.randn(masks.total, dtype=torch.float64)
    by_view: dict[int, list[float]] = {}
    for patch, value in zip(own.patches_M.tolist(), values_M.tolist(), strict=True):
        by_view.setdefault(patch // NUM_PATCHES, []).append(value)
    assert len(by_view) == 8
    assert float(own.weights_M @ values_M) == pytest.approx(float(np.mean([np.mean(own) for own in by_view.values()])))


def test_masks_are_a_function_of_seed_and_step() -> None:
    again = [drawn(), drawn(step=6), drawn(seed=4)]
    first = all_views(drawn())
    assert [torch.equal(first, all_views(own)) for own in again] == [True, False, False]


def test_micro_batches_are_the_parts_of_the_batch_and_average_to_its_weights() -> None:
    whole, parts = drawn(), drawn(num_micro_batches=4)
    assert torch.equal(masks_of(whole, 8), masks_of(parts, 8))
    assert parts.total == whole.total == sum(len(own) for own in parts.micro_batches)
    weights = [own.weights_M.sum() / 4 for own in parts.micro_batches]
    assert float(torch.stack(weights).sum()) == pytest.approx(1)


def of_a_rank(batch: int) -> tuple[Tensor, int, float]:
    masks = drawn(batch)
    return masks_of(masks, batch), masks.total, float(masks.micro_batches[0].weights_M.sum())


@pytest.mark.parametrize("batch", [1, 4])
def test_two_workers_draw_the_masks_of_one(batch: int) -> None:
    masks, totals, weights = zip(*run_on_ranks(of_a_rank, batch), strict=True)
    whole = drawn(2 * batch)
    assert torch.equal(torch.cat(masks, dim=1), masks_of(whole, 2 * batch))
    assert totals == (whole.total, whole.total)
    assert sum(weights) / 2 == pytest.approx(1)
    assert distributed.world_size() == 1


def test_a_worker_or_micro_batch_may_have_no_mask() -> None:
    config = MaskedPatchConfig(weight=1, share=0.1)
    masks = drawn(4, config, num_micro_batches=4)
    assert sorted(len(own) > 0 for own in masks.micro_batches) == [False, False, False, True]


def test_a_ratio_whose_ends_are_swapped_is_told() -> None:
    with pytest.raises(UserError, match="low <= high"):
        build(MaskedPatchConfig, {"ratio": (0.5, 0.1)})


def test_only_with_a_weight_there_is_a_head() -> None:
    assert (MaskedPatchConfig().head_prototypes, ON.head_prototypes) == (None, 8192)
