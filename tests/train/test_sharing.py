import pytest
import torch

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.train.pass_step import StepSettings, train_step
from passreid_ray.train.sharing import SharingConfig, Strategy, average_gradients, check_sharing
from tests.ranks import run_on_ranks
from tests.train.pass_fixtures import RATES, random_views, rank_slice, tiny_state

SETTINGS = StepSettings()


def numbers_held(strategy: Strategy) -> tuple[int, int]:
    """How many numbers of the prototypes, and of the rest of the student, this rank holds."""
    student = tiny_state(strategy=strategy).student
    prototypes = sum(distributed.local_part(own).numel() for own in student.head.last_layer_parameters())
    return prototypes, sum(distributed.local_part(own).numel() for own in student.parameters()) - prototypes


def test_a_rank_holds_its_share_only() -> None:
    prototypes, rest = numbers_held("copies")
    assert run_on_ranks(numbers_held, "sharded_prototypes", world_size=2) == [(prototypes // 2, rest)] * 2
    held = run_on_ranks(numbers_held, "fsdp", world_size=2)
    assert [own for own, _ in held] == [prototypes // 2] * 2
    assert sum(own for _, own in held) == rest
    assert max(own for _, own in held) < 0.6 * rest


def metrics_of_a_step(sharing: SharingConfig) -> dict[str, float]:
    state = tiny_state(strategy=sharing.strategy)
    state.forward = average_gradients(state.forward, sharing)
    views = rank_slice(random_views(8, seed=0), distributed.rank(), distributed.world_size())
    return {name: float(value) for name, value in train_step(state, views, RATES, SETTINGS, diagnose=True).items()}


@pytest.mark.parametrize("strategy", ["copies", "sharded_prototypes", "fsdp"])
def test_the_metrics_of_a_step_do_not_depend_on_how_weights_are_shared(strategy: Strategy) -> None:
    expected = metrics_of_a_step(SharingConfig())
    for metrics in run_on_ranks(metrics_of_a_step, SharingConfig(strategy=strategy, bucket_mb=0.01)):
        assert metrics == pytest.approx(expected, rel=1e-6)  # spreads of features are float32


def losses_in_bf16(strategy: Strategy) -> list[float]:
    state = tiny_state(dtype=torch.float32, strategy=strategy)
    state.forward, losses = average_gradients(state.forward), []
    for step in range(3):
        views = rank_slice(random_views(8, step, torch.float32), distributed.rank(), distributed.world_size())
        losses.append(float(train_step(state, views, RATES, StepSettings(precision="bf16"))["loss"]))
    return losses


def test_pieces_in_bf16_follow_the_losses_of_copies() -> None:
    expected = losses_in_bf16("copies")
    for losses in run_on_ranks(losses_in_bf16, "sharded_prototypes"):
        assert losses == pytest.approx(expected, rel=0.02)


def test_compressed_gradients_are_the_gradients_rounded() -> None:
    expected = metrics_of_a_step(SharingConfig())["grad_norm"]
    for metrics in run_on_ranks(metrics_of_a_step, SharingConfig(compress_gradients=True)):
        assert metrics["grad_norm"] != pytest.approx(expected, rel=1e-7)
        assert metrics["grad_norm"] == pytest.approx(expected, rel=2**-7)


def test_prototypes_that_cannot_be_shared_out_equally_are_told() -> None:
    with pytest.raises(UserError, match="num_prototypes: 100 cannot be shared out equally over 3 workers"):
        check_sharing("fsdp", 100, 3, "fp32")
    check_sharing("copies", 100, 3, "fp32")
    check_sharing("fsdp", 100, 1, "fp32")


def test_pieces_of_all_weights_and_a_patch_head_do_not_go_together() -> None:
    with pytest.raises(UserError, match=r"does not go with masked_patch\.weight > 0"):
        check_sharing("fsdp", 128, 2, "fp32", hides_patches=True)
    check_sharing("sharded_prototypes", 128, 2, "fp32", hides_patches=True)
    check_sharing("fsdp", 128, 1, "fp32", hides_patches=True)


@pytest.mark.parametrize("strategy", ["sharded_prototypes", "fsdp"])
def test_pieces_and_a_loss_scale_do_not_go_together(strategy: Strategy) -> None:
    with pytest.raises(UserError, match=r'does not go with precision = "fp16".*take precision = "bf16"'):
        check_sharing(strategy, 128, 2, "fp16")
