"""The published structure of a step and ours are the same computation."""

import pytest
import torch

from benchmarks.literal_pass import (
    LiteralBlock,
    LiteralState,
    Sizes,
    clip_each,
    crops_of,
    largest_differences,
    literal_pair_loss,
    literal_state,
    literal_step,
    load_weights,
)
from passreid_ray.models.config import HeadConfig, ModelConfig, build_pass_model
from passreid_ray.train.pass_rates import PassRates
from passreid_ray.train.pass_state import PassState, new_state
from passreid_ray.train.pass_step import StepSettings, Views, train_step
from tests.reference.official_loss import literal_loss

NUM_PROTOTYPES = 32
SETTINGS = StepSettings()
CPU = torch.device("cpu")


def both_states(dtype: torch.dtype) -> tuple[PassState, LiteralState]:
    torch.manual_seed(0)
    model = ModelConfig(
        trunk="vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2, drop_path=0.0, official_pos_resize=True
    )
    head = HeadConfig(num_prototypes=NUM_PROTOTYPES, hidden_dim=32, bottleneck_dim=16)
    student, teacher = (build_pass_model(model, head, (64, 32), 3).to(dtype) for _ in range(2))
    state = new_state(student, teacher, NUM_PROTOTYPES, CPU, fp16=False)
    literal = literal_state(Sizes.of(student), CPU, dtype)
    load_weights(literal, state.student.state_dict(), state.teacher.state_dict())
    return state, literal


def views_of(seed: int, dtype: torch.dtype) -> Views:
    generator = torch.Generator().manual_seed(seed)
    global_BGCHW = torch.randn(2, 2, 3, 64, 32, generator=generator, dtype=torch.float64)
    local_BPLCHW = torch.randn(2, 3, 3, 3, 32, 16, generator=generator, dtype=torch.float64)
    return Views(global_BGCHW.to(dtype), local_BPLCHW.to(dtype))


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [(torch.float64, 2, 1e-9), (torch.float32, 1, 1e-5)])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_published_structure_and_ours_take_the_same_steps(
    dtype: torch.dtype, steps: int, tolerance: float, is_frozen: bool
) -> None:
    state, literal = both_states(dtype)
    before = state.student.backbone.pos_embed.clone()
    rates = PassRates(1e-3, 0.05, teacher_momentum=0.99, teacher_temp=0.05, is_last_layer_frozen=is_frozen)
    for step in range(steps):
        views = views_of(step, dtype)
        loss = float(train_step(state, views, rates, SETTINGS)["loss"])
        assert literal_step(literal, crops_of(views), rates) == pytest.approx(loss, rel=tolerance)
    differences = largest_differences(state, literal)
    assert not torch.equal(before, state.student.backbone.pos_embed)
    assert max(differences.values()) < tolerance, differences


def test_a_changed_weight_is_seen_as_a_difference() -> None:
    state, literal = both_states(torch.float64)
    rates = PassRates(1e-3, 0.05, teacher_momentum=0.99, teacher_temp=0.05, is_last_layer_frozen=False)
    train_step(state, views_of(0, torch.float64), rates, SETTINGS)
    literal_step(literal, crops_of(views_of(0, torch.float64)), rates)
    with torch.no_grad():
        literal.student.backbone.get_parameter("blocks.1.mlp.fc1.weight").mul_(1 + 1e-6)
    assert largest_differences(state, literal)["student"] == pytest.approx(1e-6, rel=1e-3)


def test_the_pair_loss_is_the_formula() -> None:
    _, literal = both_states(torch.float64)
    crops = crops_of(views_of(3, torch.float64))
    student, teacher = literal.student(crops), literal.teacher(crops[:2])[0]
    centers_TK = torch.randn(4, NUM_PROTOTYPES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, *of_parts = student
    views = [whole[0], *(cls_MK for cls_MK, _ in of_parts)]
    by_token = [torch.cat(views), *(torch.cat([whole[1 + part], own]) for part, (_, own) in enumerate(of_parts))]
    expected = literal_loss(
        [own.unflatten(0, (-1, 2)) for own in by_token], [own.unflatten(0, (2, 2)) for own in teacher], centers_TK, 0.1,
        0.05,
    )  # fmt: skip
    got = literal_pair_loss(student, teacher, [center_K[None] for center_K in centers_TK], 0.1, 0.05)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_each_group_of_views_is_one_call_and_each_token_of_a_group_one_head_call() -> None:
    _, literal = both_states(torch.float64)
    calls: list[str] = []
    for name, module in literal.student.named_modules():
        if name == "backbone" or name.startswith("head.last_layer_"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    literal.student(crops_of(views_of(0, torch.float64)))
    counts = {name: calls.count(name) for name in set(calls)}
    parts = {f"head.last_layer_pt{j}": 2 for j in (1, 2, 3)}
    assert counts == {"backbone": 4, "head.last_layer_cls": 4, **parts}


def test_stochastic_depth_drops_whole_branches_of_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = LiteralBlock(8, num_heads=2, drop_path=0.25)
    out_B = block._dropped(torch.ones(4000, 1, 1))[:, 0, 0]
    torch.testing.assert_close(out_B.unique(), torch.tensor([0, 1 / 0.75]))
    assert float(out_B.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(block.eval()._dropped(torch.ones(8, 1, 1)), torch.ones(8, 1, 1))


def test_gradients_longer_than_the_limit_are_shortened_to_it_and_others_left() -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([0.5])
    assert clip_each(model, 1.0) == [5.0, 0.5]
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))
    assert model.bias.grad.tolist() == [0.5]
