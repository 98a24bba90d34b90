"""A step of unsupervised tuning: two workers equal one, refused steps change nothing, and it learns."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from passreid_ray import distributed
from passreid_ray.losses import ClusterMemory, MemoryUpdate
from passreid_ray.models import NeighbourRefiner, PartViT
from passreid_ray.models.config import NeckConfig
from passreid_ray.train.tuning_optimizer import TuningOptimizerConfig
from passreid_ray.train.usl_state import USLNetwork, USLState
from passreid_ray.train.usl_step import USLStepSettings, usl_step
from tests.ranks import run_on_ranks

BATCH, CLUSTERS = 8, 4
WIDTH = 48


def new_state(
    *, refine: bool = False, update: MemoryUpdate = "hard", kind: str = "sgd", drop_path: float = 0.3
) -> USLState:
    torch.manual_seed(0)
    backbone = PartViT(
        "vit_tiny_patch16_224", image_size=(64, 32), embed_dim=24, depth=2, num_heads=2, drop_path=drop_path
    )
    network = USLNetwork(NeckConfig().build(backbone), NeighbourRefiner(WIDTH) if refine else None, 3)
    network.double()  # so that rounding hides nothing
    optimizer = TuningOptimizerConfig.model_validate({"kind": kind, "lr": 0.01}).build(network)
    state = USLState(network, network, optimizer, GradScaler("cpu", enabled=False))
    centroids = torch.randn(CLUSTERS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state.memory = ClusterMemory(centroids, update=update)
    return state


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    labels_B = torch.arange(BATCH) // 2
    images_BCHW = torch.randn(BATCH, 3, 64, 32, dtype=torch.float64, generator=generator)
    return images_BCHW + labels_B[:, None, None, None], labels_B


def steps(num: int, options: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final tensors of a few steps on this rank's share of the batches."""
    state = new_state(**options)
    state.network.train()
    if distributed.is_active():
        state.forward = DistributedDataParallel(state.network, forward_sync_buffers=False)
    share = BATCH // distributed.world_size()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    losses = []
    for step in range(num):
        images_BCHW, labels_B = batch(step)
        metrics = usl_step(state, images_BCHW[own], labels_B[own], 0.01, USLStepSettings())
        losses.append(float(metrics["loss"]))
    return losses, state.tensors()


@pytest.mark.parametrize(
    "options",
    # Not AdamW: a bias before a batch norm has no gradient but rounding, and AdamW blows that up to whole steps.
    [{}, {"update": "plain"}, {"update": "selective", "refine": True}],
    ids=["hard", "plain", "selective-refined"],
)
def test_two_workers_equal_one(options: dict[str, Any]) -> None:
    losses, tensors = steps(4, options)
    for shared_losses, shared in run_on_ranks(steps, 4, options):
        torch.testing.assert_close(shared_losses, losses, rtol=1e-10, atol=1e-10)
        assert shared.keys() == tensors.keys()
        for name, value in tensors.items():
            torch.testing.assert_close(
                shared[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_it_learns_and_the_memory_follows() -> None:
    state = new_state(drop_path=0.0)
    assert state.memory is not None
    before = state.memory.centroids_KD.clone()
    images_BCHW, labels_B = batch(0)
    losses = [float(usl_step(state, images_BCHW, labels_B, 0.01, USLStepSettings())["loss"]) for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(state.memory.centroids_KD, before)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    state = new_state()
    images_BCHW, labels_B = batch(0)
    usl_step(state, images_BCHW, labels_B, 0.01, USLStepSettings())
    before = {name: value.clone() for name, value in state.tensors().items()}
    assert state.memory is not None
    with monkeypatch.context() as patch:
        patch.setattr(state.memory, "loss", lambda features, labels: features.sum() * torch.inf)
        metrics = usl_step(state, images_BCHW, labels_B, 0.01, USLStepSettings())
    assert not torch.isfinite(metrics["loss"])
    assert (state.step, state.refused_in_a_row, state.refused_steps) == (2, 1, 1)
    for name, value in state.tensors().items():
        assert torch.equal(value, before[name]), name


def test_a_saved_state_goes_on_to_the_bit() -> None:
    whole = new_state(refine=True)
    for step in range(2):
        usl_step(whole, *batch(step), 0.01, USLStepSettings())
    tensors = {name: value.clone() for name, value in whole.tensors().items()}
    again = new_state(refine=True)
    again.load(tensors, whole.meta(), "here")
    centroids_KD = tensors["memory.centroids"]
    again.memory = ClusterMemory(centroids_KD, update="hard")
    again.memory.centroids_KD.copy_(centroids_KD)
    assert again.step == 2
    for step in range(2, 4):
        for state in (whole, again):
            usl_step(state, *batch(step), 0.01, USLStepSettings())
    for name, value in whole.tensors().items():
        torch.testing.assert_close(again.tensors()[name], value, rtol=0, atol=0)
