import json
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from passreid_ray.errors import UserError
from passreid_ray.models import PartViT
from tests.models.golden_models import (
    FORWARD_FILES,
    GOLDEN,
    TOKENS,
    Golden,
    golden_head,
    golden_vit,
    largest_difference,
    tiny_vit,
)


@pytest.mark.parametrize("name", FORWARD_FILES)
def test_teacher_logits_equal_the_reference(name: str) -> None:
    golden = Golden(name)
    tokens_BTD = golden_vit(golden, "teacher_sd/")(golden.global_views())
    logits = golden_head(golden, "teacher_sd/")(tokens_BTD.unbind(1))
    for token, logits_BK in zip(TOKENS, logits, strict=True):
        assert largest_difference(logits_BK, golden[f"teacher_out/{token}"]) < 5e-6


@pytest.mark.parametrize("name", FORWARD_FILES)
def test_student_logits_of_global_and_local_views_equal_the_reference(name: str) -> None:
    golden = Golden(name)
    model, head = golden_vit(golden, "student_sd/"), golden_head(golden, "student_sd/")
    tokens_BTD = model(golden.global_views())
    for token, logits_BK in zip(TOKENS, head(tokens_BTD.unbind(1)), strict=True):
        assert largest_difference(logits_BK, golden[f"student_out/g_{token}"]) < 5e-6
    for part, views_BCHW in enumerate(golden.local_views()):
        local_B2D = model(views_BCHW, torch.full((len(views_BCHW),), part))
        inputs = [local_B2D.new_empty(0, model.width) for _ in TOKENS]
        inputs[0], inputs[1 + part] = local_B2D.unbind(1)
        logits = head(inputs)
        assert largest_difference(logits[0], golden[f"student_out/p{part + 1}_cls"]) < 5e-6
        assert largest_difference(logits[1 + part], golden[f"student_out/p{part + 1}_pt"]) < 5e-6


@pytest.mark.parametrize("name", ["pass_forward_64x32", "pass_forward_256x128"])
def test_backbone_tokens_and_resampled_positions_equal_the_reference(name: str) -> None:
    golden = Golden(name)
    model = golden_vit(golden, "student_sd/")
    rows, columns = model.grid
    assert largest_difference(model.positions((rows, columns)), golden["pos_embed_interp_global"]) < 1e-6
    assert largest_difference(model.positions((rows // 2, columns // 2)), golden["pos_embed_interp_local"]) < 1e-6
    tokens_BTD = model(golden.global_views())
    for index, token in enumerate(TOKENS):
        assert largest_difference(tokens_BTD[:, index], golden[f"student_backbone_tokens_global/{token}"]) < 5e-6


def test_without_official_resize_native_size_tokens_equal_the_fine_tuning_reference() -> None:
    golden = Golden("finetune_cluster_vit")
    model = tiny_vit()
    model.load_state_dict(Golden("pass_forward_64x32").state("teacher_sd/backbone."))
    images_BCHW = (golden["img_u8"].float() / 255 - 0.5) / 0.5
    assert largest_difference(model.eval()(images_BCHW).transpose(0, 1), golden["tokens_eval"]) < 1e-5


def test_native_size_adds_raw_positions_and_other_sizes_get_their_exact_grid() -> None:
    model = tiny_vit()
    torch.testing.assert_close(model.positions((4, 2)), model.pos_embed, rtol=0, atol=0)
    for grid in [(2, 1), (3, 5), (8, 4)]:
        assert model.positions(grid).shape == (1, grid[0] * grid[1], 48)
    constant = tiny_vit()
    nn.init.constant_(constant.pos_embed, 0.25)
    torch.testing.assert_close(constant.positions((3, 5)), torch.full((1, 15, 48), 0.25))


def test_keys_shapes_and_size_of_vit_small_are_the_released_ones() -> None:
    keys = json.loads((GOLDEN / "pass_vits_wrapper_statedict_keys_outdim64.json").read_text())
    expected = [(key.removeprefix("backbone."), shape) for key, shape in keys if key.startswith("backbone.")]
    model = PartViT()
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == expected
    assert len(expected) == 157
    assert sum(parameter.numel() for parameter in model.parameters()) == 21_641_856
    assert (model.num_tokens, model.num_parts, model.width, model.depth) == (4, 3, 384, 12)


def test_initial_weights_and_drop_path_rates_are_distributed_as_in_the_reference() -> None:
    stats = json.loads((GOLDEN / "pass_init_stats.json").read_text())
    torch.manual_seed(0)
    model = PartViT(drop_path=0.1)
    weights = model.state_dict()
    compared = 0
    for name, value in stats.items():
        if name.startswith("backbone."):
            shape, mean, std, _ = value
            ours = weights[name.removeprefix("backbone.")]
            assert list(ours.shape) == shape
            spread = 6 / ours.numel() ** 0.5
            assert abs(ours.mean().item() - mean) <= spread * std
            assert abs(ours.std().item() - std) <= (spread + 1e-3) * std
            compared += 1
    assert compared == 25
    assert model.drop_path_rates == pytest.approx(stats["drop_path_rates"], abs=1e-8)


@pytest.mark.parametrize("trunk", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_clip_224"])
def test_without_parts_it_is_the_timm_vit(trunk: str) -> None:
    sizes: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3, "no_embed_class": False}
    vit = timm.create_model(trunk, num_classes=0, img_size=(64, 32), **sizes).eval()
    assert isinstance(vit, VisionTransformer)
    model = PartViT(trunk, image_size=(64, 32), num_parts=0, **sizes).eval()
    state = vit.state_dict()
    state["cls_pos"], state["pos_embed"] = state["pos_embed"].split([1, 8], dim=1)
    model.load_state_dict(state)
    images_BCHW = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(model(images_BCHW)[:, 0], vit(images_BCHW))


def test_a_local_view_reads_cls_and_its_own_part_only() -> None:
    model = tiny_vit()
    images_BCHW = torch.randn(3, 3, 32, 16)
    model(images_BCHW, torch.tensor([1, 1, 1])).sum().backward()
    for part, used in [(1, False), (2, True), (3, False)]:
        for name in (f"part_token{part}", f"part{part}_pos"):
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            assert bool(gradient.abs().sum() > 0) is used

    one_part = tiny_vit(num_parts=1)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("part")}
    own = {"part_token1": model.get_parameter("part_token2"), "part1_pos": model.get_parameter("part2_pos")}
    one_part.load_state_dict(state | own)
    torch.testing.assert_close(model(images_BCHW, torch.tensor([1, 1, 1])), one_part(images_BCHW))


def test_local_views_of_several_parts_in_one_batch_equal_separate_batches() -> None:
    model = tiny_vit().double()
    images_BCHW = torch.randn(5, 3, 32, 16, dtype=torch.float64)
    part_B = torch.tensor([2, 0, 1, 0, 2])
    together = model(images_BCHW, part_B)
    alone = [model(image[None], part[None]) for image, part in zip(images_BCHW, part_B, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.shape == (5, 2, 48)
    assert together.dtype == torch.float64


def _with_fixed_branch_scales(block: Block, scales_2B: Tensor) -> Callable[[Tensor], Tensor]:
    """timm's own block, its two DropPath modules replaced by the given draws."""
    for index, name in enumerate(("drop_path1", "drop_path2")):
        draws = nn.Identity()
        scales_B11 = scales_2B[index].view(-1, 1, 1)
        draws.register_forward_hook(lambda _module, _inputs, output, scales_B11=scales_B11: output * scales_B11)
        setattr(block, name, draws)
    return partial(Block.forward, block)


def test_stochastic_depth_drops_branches_where_noise_is_below_the_linear_rate() -> None:
    model = tiny_vit(depth=3, drop_path=0.5).double()
    images_BCHW = torch.randn(6, 3, 64, 32, dtype=torch.float64)
    noise_L2B = torch.rand(3, 2, 6, dtype=torch.float64)
    got = model(images_BCHW, drop_path_noise=noise_L2B)

    prefix = torch.cat([model.cls_token, *(model.get_parameter(f"part_token{j}") for j in (1, 2, 3))], dim=1)
    prefix = prefix + torch.cat([model.cls_pos, *(model.get_parameter(f"part{j}_pos") for j in (1, 2, 3))], dim=1)
    patches = cast(Tensor, model.patch_embed(images_BCHW)).flatten(1, 2) + model.pos_embed
    tokens = torch.cat([prefix.expand(6, -1, -1), patches], dim=1)
    dropped = 0
    for index, rate in enumerate((0.0, 0.25, 0.5)):
        scales_2B = torch.where(noise_L2B[index] < rate, 0.0, 1 / (1 - rate))
        dropped += int((scales_2B == 0).sum())
        block = model.blocks[index]
        assert isinstance(block, Block)
        tokens = _with_fixed_branch_scales(block, scales_2B)(tokens)
    torch.testing.assert_close(got, model.norm(tokens)[:, :4])
    assert 0 < dropped < 36


def test_a_sample_with_its_own_noise_does_not_depend_on_its_batch() -> None:
    model = tiny_vit(drop_path=0.6).double()
    images_BCHW, noise_L2B = torch.randn(4, 3, 64, 32, dtype=torch.float64), torch.rand(2, 2, 4)
    whole = model(images_BCHW, drop_path_noise=noise_L2B)
    halves = [model(images_BCHW[part], drop_path_noise=noise_L2B[..., part]) for part in (slice(2), slice(2, 4))]
    torch.testing.assert_close(whole, torch.cat(halves))


def test_stochastic_depth_draws_from_the_default_generator_in_training_only() -> None:
    model = tiny_vit(drop_path=0.6)
    images_BCHW = torch.randn(8, 3, 64, 32)
    torch.manual_seed(3)
    drawn = model(images_BCHW)
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, model(images_BCHW, drop_path_noise=torch.rand(2, 2, 8)))
    assert not torch.equal(drawn, model(images_BCHW))
    model.eval()
    before = torch.get_rng_state()
    torch.testing.assert_close(model(images_BCHW), model(images_BCHW, drop_path_noise=torch.zeros(2, 2, 8)))
    assert torch.equal(before, torch.get_rng_state())


def test_attention_maps_are_the_last_softmax_on_the_patches() -> None:
    model = tiny_vit(64, num_heads=4).eval()
    last = model.blocks[1]
    assert isinstance(last, Block)
    attention = cast(Any, last.attn)
    attention.fused_attn = False
    seen: list[Tensor] = []
    attention.attn_drop.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    images_BCHW = torch.randn(2, 3, 96, 32)
    model(images_BCHW)
    maps = model.attention_maps(images_BCHW)
    assert maps.shape == (2, 4, 4, 6, 2)
    torch.testing.assert_close(maps.flatten(3), seen[0][:, :, :4, 4:])


def test_every_parameter_learns_from_a_global_view() -> None:
    model = tiny_vit(drop_path=0.1)
    model(torch.randn(2, 3, 64, 32), drop_path_noise=torch.ones(2, 2, 2) * 0.99)[..., :7].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_recomputed_activations_give_the_same_tokens_and_gradients() -> None:
    model, noise_L2B = tiny_vit(drop_path=0.5).double(), torch.rand(2, 2, 6)
    images_BCHW, weights_BTD = torch.randn(6, 3, 64, 32).double(), torch.randn(6, 4, 48).double()
    kept = model(images_BCHW, drop_path_noise=noise_L2B)
    expected = _gradients(model, kept, weights_BTD)
    calls: list[object] = []
    # A block's first layer: what comes after the last tensor that backward needs is not computed again.
    model.blocks[0].get_submodule("norm1").register_forward_hook(lambda *call: calls.append(call))
    model.use_activation_checkpointing(True)
    recomputed = model(images_BCHW, drop_path_noise=noise_L2B)
    assert torch.equal(recomputed, kept)
    gradients = _gradients(model, recomputed, weights_BTD)
    assert len(calls) == 2
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def test_nothing_is_recomputed_without_gradients() -> None:
    model, calls = tiny_vit(), []
    model.use_activation_checkpointing(True)
    model.blocks[0].get_submodule("norm1").register_forward_hook(lambda *call: calls.append(call))
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 32))
    assert len(calls) == 1


def test_user_mistakes_are_named() -> None:
    model = tiny_vit(drop_path=0.1)
    images_BCHW = torch.randn(2, 3, 64, 32)
    with pytest.raises(UserError, match="70x32 px is not a multiple of the patch, 16x16"):
        model(torch.randn(2, 3, 70, 32))
    with pytest.raises(UserError, match="60x32 px"):
        tiny_vit(image_size=(60, 32))
    with pytest.raises(UserError, match="part_B: expected 2 integers"):
        model(images_BCHW, torch.tensor([1]))
    with pytest.raises(UserError, match="part_B: expected 2 integers"):
        model(images_BCHW, torch.tensor([1.0, 2.0]))
    with pytest.raises(UserError, match=r"drop_path_noise: expected \(2, 2, 2\)"):
        model(images_BCHW, drop_path_noise=torch.rand(2, 2, 3))
    with pytest.raises(UserError, match="num_parts=0"):
        tiny_vit(num_parts=0)(images_BCHW, torch.tensor([0, 0]))
    with pytest.raises(UserError, match="stem: expected 'patch' or 'ics', found 'conv'"):
        tiny_vit(stem="conv")
    with pytest.raises(UserError, match="drop_path"):
        tiny_vit(drop_path=1.0)


def test_plain_attention_equals_the_fused_one() -> None:
    model, images = tiny_vit(), torch.randn(2, 3, 64, 32)
    fused = model(images)
    model.use_fused_attention(False)
    assert largest_difference(model(images), fused) < 1e-6


GRIDS: list[tuple[int, int]] = [(13, 7), (16, 8), (1, 1), (13, 7), (10, 8)]
"""Of images on a canvas of 256x128 px; 13x7 patches are 208x112 px."""


def _canvas_with(images: list[Tensor], padding: float) -> Tensor:
    canvas_BCHW = torch.full((len(images), 3, 256, 128), padding)
    for image_CHW, canvas_CHW in zip(images, canvas_BCHW, strict=True):
        canvas_CHW[:, : image_CHW.shape[1], : image_CHW.shape[2]] = image_CHW
    return canvas_BCHW


def _images_of(grids: list[tuple[int, int]]) -> list[Tensor]:
    return [torch.randn(3, 16 * rows, 16 * columns) for rows, columns in grids]


def _gradients(model: PartViT, tokens_BTD: Tensor, weights_BTD: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (tokens_BTD * weights_BTD).sum().backward()
    return {name: own.grad for name, own in model.named_parameters() if own.grad is not None}


@pytest.mark.parametrize("padding", [0.0, 1e4, float("nan"), float("inf")])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fused_attention", [False, True])
def test_padded_images_of_several_sizes_give_the_tokens_and_gradients_of_each_alone(
    padding: float, training: bool, fused_attention: bool
) -> None:
    torch.manual_seed(0)
    model = tiny_vit(image_size=(256, 128), depth=3, drop_path=0.4).train(training)
    nn.init.normal_(model.pos_embed)
    model.use_fused_attention(fused_attention)
    images, noise_L2B, weights_BTD = _images_of(GRIDS), torch.rand(3, 2, len(GRIDS)), torch.randn(len(GRIDS), 4, 48)
    alone = [
        model(image_CHW[None], drop_path_noise=noise_L2B[..., index : index + 1])
        for index, image_CHW in enumerate(images)
    ]
    expected = _gradients(model, torch.cat(alone), weights_BTD)
    got = model(_canvas_with(images, padding), drop_path_noise=noise_L2B, grids_B2=torch.tensor(GRIDS))
    assert largest_difference(got, torch.cat(alone)) < 1e-5
    gradients = _gradients(model, got, weights_BTD)
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * largest, msg=name)


def test_an_image_in_its_own_grid_differs_from_the_image_with_its_padding() -> None:
    torch.manual_seed(0)
    model = tiny_vit(image_size=(256, 128)).eval()
    canvas_BCHW = _canvas_with(_images_of([(13, 7)]), 0.0)
    assert largest_difference(model(canvas_BCHW, grids_B2=torch.tensor([[13, 7]])), model(canvas_BCHW)) > 1e-3


@pytest.mark.parametrize("official_pos_resize", [False, True])
def test_a_grid_as_large_as_the_canvas_changes_nothing(official_pos_resize: bool) -> None:
    torch.manual_seed(0)
    model = tiny_vit(official_pos_resize=official_pos_resize).eval()
    images_BCHW = torch.randn(2, 3, 96, 32)
    got = model(images_BCHW, grids_B2=torch.tensor([[6, 2], [6, 2]]))
    assert largest_difference(got, model(images_BCHW)) < 1e-6


def test_local_views_of_several_sizes_read_cls_and_their_part_in_their_own_grid() -> None:
    torch.manual_seed(0)
    model = tiny_vit(image_size=(256, 128)).eval()
    images, part_B = _images_of(GRIDS), torch.tensor([2, 0, 1, 0, 2])
    got = model(_canvas_with(images, 5.0), part_B, grids_B2=torch.tensor(GRIDS))
    alone = [model(image_CHW[None], part_B[index, None]) for index, image_CHW in enumerate(images)]
    assert largest_difference(got, torch.cat(alone)) < 1e-5


def test_images_of_several_sizes_train_in_bf16() -> None:
    torch.manual_seed(0)
    model = tiny_vit(image_size=(256, 128))
    images = _images_of(GRIDS)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(_canvas_with(images, float("nan")), grids_B2=torch.tensor(GRIDS))
        alone = torch.cat([model(image_CHW[None]) for image_CHW in images])
    assert largest_difference(got, alone) < 0.1
    gradients = _gradients(model, got, torch.randn(len(GRIDS), 4, 48))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[4, 2], [5, 2]], "image 1 has 5x2 patches, the canvas 4x2"),
        ([[4, 3], [4, 2]], "image 0 has 4x3 patches"),
        ([[0, 2], [4, 2]], "image 0 has 0x2 patches"),
        ([[4, -1], [4, 2]], "image 0 has 4x-1 patches"),
        ([[4, 2]], r"expected integers \(2, 2\), .*; found torch.int64 \(1, 2\)"),
        ([[4.0, 2.0], [4.0, 2.0]], r"found torch.float32 \(2, 2\)"),
        ([[True, True], [True, True]], "found torch.bool"),
    ],
)
def test_grids_that_do_not_fit_the_canvas_are_refused(grids: list[list[float]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_vit()(torch.randn(2, 3, 64, 32), grids_B2=torch.tensor(grids))


def test_grids_are_refused_with_the_convolutional_stem() -> None:
    with pytest.raises(UserError, match="stem='ics' reads pixels beyond a patch"):
        tiny_vit(stem="ics", stem_channels=8)(torch.randn(1, 3, 64, 32), grids_B2=torch.tensor([[4, 2]]))
