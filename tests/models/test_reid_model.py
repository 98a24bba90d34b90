import json
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from passreid_ray.errors import UserError
from passreid_ray.models import ReidModel, load_backbone
from passreid_ray.models.config import NeckConfig
from passreid_ray.models.reid_model import Neck, NeckFusion
from tests.models.golden_models import Golden, largest_difference, tiny_vit
from tests.ranks import run_on_ranks

VARIANTS: list[tuple[NeckFusion, Neck]] = [(f, n) for f in get_args(NeckFusion) for n in get_args(Neck)]
SHARDS = (3, 5)
"""Images of each rank; unequal on purpose."""


def golden_model(golden: Golden, fusion: NeckFusion, neck: Neck, image_size: tuple[int, int] = (64, 32)) -> ReidModel:
    backbone = tiny_vit(image_size=image_size)
    load_backbone(backbone, Golden("pass_forward_64x32").state("teacher_sd/"))
    model = ReidModel(backbone, fusion=fusion, neck=neck)
    for name in model.neck_names:
        norm = model.get_submodule(name)
        # Supervised tuning has other names for the necks of the parts.
        stored = golden.state(f"neck/{name}/") or golden.state(f"neck/{supervised_name(name)}/")
        assert stored
        for key, value in stored.items():
            # The file holds 2D values per neck; each neck has the first of them that fit it.
            norm.state_dict()[key].copy_(value[: len(norm.state_dict()[key])])
    return model


def supervised_name(name: str) -> str:
    """Ours to that of the reference's supervised tuning, for parameters and necks."""
    return name.replace("backbone.", "base.").replace("bottleneck_pt", "bottleneck_")


def as_input(images_u8: Tensor) -> Tensor:
    return (images_u8.float() / 255 - 0.5) / 0.5


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_features_statistics_and_what_is_trained_equal_the_reference(fusion: NeckFusion, neck: Neck) -> None:
    golden, variant = Golden("finetune_cluster_vit"), f"{fusion}_{neck}"
    model = golden_model(golden, fusion, neck)
    images_BCHW = as_input(golden["img_u8"])
    assert largest_difference(model.eval()(images_BCHW), golden[f"{variant}/eval"]) < 1e-5
    assert largest_difference(model.train()(images_BCHW), golden[f"{variant}/train"]) < 1e-5
    norm = model.get_submodule("bottleneck")
    for name in ("running_mean", "running_var"):
        assert largest_difference(norm.get_buffer(name), golden[f"{variant}/{name}_after"]) < 1e-5

    trained = [
        name.removeprefix("backbone.") for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    # The file leaves the blocks out of its list; nothing in the reference freezes them.
    assert [name for name in trained if not name.startswith("blocks.")] == golden.arrays[
        f"{variant}/trainable"
    ].tolist()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"{name}.bias" for name in model.neck_names]
    assert not any(model.get_parameter(name).any() for name in frozen)


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_supervised_features_class_scores_and_statistics_equal_the_reference(fusion: NeckFusion, neck: Neck) -> None:
    golden, variant = Golden("finetune_transreid"), f"{fusion}_{neck}"
    model = golden_model(golden, fusion, neck)
    images_BCHW = as_input(golden["img_u8"])
    features = model.eval().embed(images_BCHW)
    assert largest_difference(features.before_BD, golden[f"{variant}/eval_before"]) < 1e-5
    assert largest_difference(features.after_BD, golden[f"{variant}/eval_after"]) < 1e-5

    features = model.train().embed(images_BCHW)
    class_scores_BC = features.after_BD @ golden["classifier_weight_7x96"][:, : model.feature_width].T
    assert largest_difference(features.before_BD, golden[f"{variant}/train_feat"]) < 1e-5
    assert largest_difference(class_scores_BC, golden[f"{variant}/train_cls_score"]) < 1e-5
    variance = model.get_buffer("bottleneck.running_var")
    assert largest_difference(variance, golden[f"{variant}/running_var_after"]) < 1e-5


def batch_hard_soft_triplet(features_BD: Tensor, labels_B: Tensor) -> Tensor:
    """Mean over the anchors of log(1 + exp(farthest positive - nearest negative)), row by row."""
    terms = []
    for anchor_D, label in zip(features_BD, labels_B, strict=True):
        distances_B = (features_BD - anchor_D).square().sum(1).clamp(min=1e-12).sqrt()
        positive, negative = distances_B[labels_B == label].max(), distances_B[labels_B != label].min()
        terms.append(F.softplus(positive - negative))
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_supervised_loss_and_the_gradient_of_every_parameter_equal_the_reference(
    fusion: NeckFusion, neck: Neck
) -> None:
    golden, variant = Golden("finetune_transreid"), f"{fusion}_{neck}"
    model = golden_model(golden, fusion, neck).train()
    classifier_CD = golden["classifier_weight_7x96"][:, : model.feature_width].clone().requires_grad_()
    before_BD, after_BD = model.embed(as_input(golden["img_u8"]))
    labels_B = golden["labels"]
    loss = F.cross_entropy(after_BD @ classifier_CD.T, labels_B) + batch_hard_soft_triplet(before_BD, labels_B)
    loss.backward()
    assert loss.item() == pytest.approx(golden[f"{variant}/loss_ce_plus_softtriplet"].item(), rel=1e-5)

    gradients = {supervised_name(name): own.grad for name, own in model.named_parameters()}
    gradients["classifier.weight"] = classifier_CD.grad
    norms = {name: gradient.norm().item() for name, gradient in gradients.items() if gradient is not None}
    expected = json.loads(str(golden.arrays[f"{variant}/grad_norms"]))
    assert norms == pytest.approx(expected, rel=1e-5, abs=1e-5)
    without = {name for name, gradient in gradients.items() if gradient is None}
    assert without | {"base.fc.weight", "base.fc.bias"} == set(golden.arrays[f"{variant}/no_grad_params"].tolist())


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_features_of_images_of_several_sizes_in_one_batch_are_those_of_each_alone(
    fusion: NeckFusion, neck: Neck
) -> None:
    model = random_model(fusion, neck).eval()
    canvas_BCHW, grids_B2 = torch.randn(3, 3, 64, 32), torch.tensor([[4, 2], [3, 1], [2, 2]])
    alone = [
        image_CHW[None, :, : 16 * rows, : 16 * columns]
        for image_CHW, (rows, columns) in zip(canvas_BCHW, grids_B2.tolist(), strict=True)
    ]
    features_BD, embedded = model(canvas_BCHW, grids_B2=grids_B2), model.embed(canvas_BCHW, grids_B2=grids_B2)
    torch.testing.assert_close(features_BD, torch.cat([model(image) for image in alone]), rtol=0, atol=1e-5)
    for side in range(2):
        expected = torch.cat([model.embed(image)[side] for image in alone])
        torch.testing.assert_close(embedded[side], expected, rtol=0, atol=1e-5)


def test_features_at_another_size_equal_the_reference() -> None:
    golden = Golden("finetune_cluster_vit")
    backbone = golden_model(golden, "cat", "single", image_size=(96, 32)).backbone
    model = ReidModel(backbone, fusion="cat", neck="single").eval()  # the reference's necks were fresh here
    assert largest_difference(model(as_input(golden["img96_u8"])), golden["cat_single/eval_96x32"]) < 1e-5


@pytest.mark.parametrize("num_parts", [0, 1, 2])
@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_any_number_of_parts_is_fused_as_defined(fusion: NeckFusion, neck: Neck, num_parts: int) -> None:
    torch.manual_seed(0)
    backbone = tiny_vit(num_parts=num_parts).eval()
    model = ReidModel(backbone, fusion=fusion, neck=neck)
    images_BCHW = torch.randn(6, 3, 64, 32)
    tokens = backbone(images_BCHW).unbind(1)

    def standardised(x_BC: Tensor) -> Tensor:
        return (x_BC - x_BC.mean(0)) / (x_BC.var(0, unbiased=False) + 1e-5).sqrt()

    if neck == "multi":
        tokens = [F.normalize(standardised(token)) for token in tokens]
    cls_BD, *parts = tokens
    mean_part_BD = sum(parts, torch.zeros_like(cls_BD)) / max(num_parts, 1)
    expected = torch.cat([cls_BD, mean_part_BD], dim=1) if fusion == "cat" else 0.5 * cls_BD + 0.5 * mean_part_BD
    if num_parts == 0:
        expected = cls_BD
    if neck == "single":
        expected = F.normalize(standardised(expected))
    features_BD = model.train()(images_BCHW)
    assert features_BD.shape == (6, model.feature_width)
    torch.testing.assert_close(features_BD, expected, rtol=1e-4, atol=1e-5)
    assert model.feature_width == (96 if fusion == "cat" and num_parts else 48)


@pytest.mark.parametrize("neck", get_args(Neck))
def test_necks_and_features_are_fp32_under_autocast(neck: Neck) -> None:
    torch.manual_seed(0)
    model = ReidModel(tiny_vit(), fusion="cat", neck=neck)
    seen: list[Tensor] = []

    def note(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend([*inputs, output])

    for name in model.neck_names:
        model.get_submodule(name).register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        features_BD = model(torch.randn(4, 3, 64, 32))
    assert len(seen) == 2 * len(model.neck_names)
    assert {tensor.dtype for tensor in [features_BD, *seen]} == {torch.float32}


def test_stochastic_depth_follows_the_given_noise() -> None:
    torch.manual_seed(0)
    model = ReidModel(tiny_vit(drop_path=0.5), fusion="cat", neck="single")
    images_BCHW = torch.randn(4, 3, 64, 32)
    kept, dropped = torch.full((2, 2, 4), 0.99), torch.zeros(2, 2, 4)
    outputs = [model(images_BCHW, drop_path_noise=noise) for noise in (kept, kept, dropped)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_settings_build_the_model_and_their_default_is_the_reference_for_market() -> None:
    backbone = tiny_vit()
    default, other = NeckConfig().build(backbone), NeckConfig(fusion="mean", neck="multi").build(backbone)
    assert (default.fusion, default.neck, default.feature_width) == ("cat", "single", 96)
    assert (other.fusion, other.neck, other.feature_width) == ("mean", "multi", 48)
    assert default.backbone is backbone


@pytest.mark.parametrize("settings", [{"fusion": "cls", "neck": "single"}, {"fusion": "cat", "neck": "double"}])
def test_an_unknown_fusion_or_neck_is_told(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"expected '\w+' or '\w+', found '(cls|double)'"):
        ReidModel(tiny_vit(), **settings)


def trained_step(
    model: nn.Module, rows: slice, images_BCHW: Tensor, noise_L2B: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of some of the images and the gradient of their share of a loss."""
    features_BD = model(images_BCHW[rows], drop_path_noise=noise_L2B[:, :, rows])
    weights = torch.randn(len(images_BCHW), features_BD.shape[1], generator=torch.Generator().manual_seed(2))
    (features_BD * weights[rows]).sum().backward()
    gradients = {name: own.grad for name, own in model.named_parameters() if own.grad is not None}
    return features_BD.detach(), gradients


def random_model(fusion: NeckFusion, neck: Neck) -> ReidModel:
    torch.manual_seed(1)
    model = ReidModel(tiny_vit(drop_path=0.3), fusion=fusion, neck=neck)
    for name in model.neck_names:
        nn.init.uniform_(model.get_parameter(f"{name}.weight"), 0.5, 1.5)
    return model


def step_on_rank(images_BCHW: Tensor, noise_L2B: Tensor) -> list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    rank = dist.get_rank()
    rows = slice(sum(SHARDS[:rank]), sum(SHARDS[: rank + 1]))
    results = []
    for fusion, neck in VARIANTS:
        model = random_model(fusion, neck)
        output, gradients = trained_step(model, rows, images_BCHW, noise_L2B)
        for gradient in gradients.values():
            dist.all_reduce(gradient)
        results.append((output, gradients, dict(model.named_buffers())))
    return results


def test_two_ranks_equal_one_rank_with_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(sum(SHARDS), 3, 64, 32, generator=generator)
    noise_L2B = torch.rand(2, 2, sum(SHARDS), generator=generator)
    ranks = run_on_ranks(step_on_rank, images_BCHW, noise_L2B, world_size=len(SHARDS))
    for (fusion, neck), *results in zip(VARIANTS, *ranks, strict=True):
        model = random_model(fusion, neck)
        output, gradients = trained_step(model, slice(None), images_BCHW, noise_L2B)
        torch.testing.assert_close(torch.cat([own for own, _, _ in results]), output, rtol=1e-5, atol=1e-6)
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        for _, own_gradients, own_buffers in results:
            assert own_gradients.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(own_gradients[name], gradient, rtol=0, atol=1e-5 * largest, msg=name)
            buffers = dict(model.named_buffers())
            assert own_buffers.keys() == buffers.keys()
            for name, buffer in buffers.items():
                torch.testing.assert_close(own_buffers[name], buffer, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_a_batch_computed_in_pieces_has_the_features_and_gradients_of_the_whole(drop_path: float) -> None:
    torch.manual_seed(0)
    backbone = tiny_vit(image_size=(64, 32), drop_path=drop_path).double()
    model = ReidModel(backbone, fusion="cat", neck="multi").double().train()
    images_BCHW = torch.rand(6, 3, 64, 32, dtype=torch.float64)
    noise_L2B = torch.rand(backbone.depth, 2, 6) if drop_path else None
    target_BD = torch.rand(6, model.feature_width, dtype=torch.float64)

    def features_and_gradients(num_pieces: int) -> list[Tensor]:
        model.zero_grad()
        model.compute_in_pieces(num_pieces)
        features = model.embed(images_BCHW, drop_path_noise=noise_L2B)
        (features.after_BD * target_BD).sum().backward()
        gradients = [own.grad for own in model.parameters() if own.grad is not None]
        return [*(own.detach() for own in features), *(own.clone() for own in gradients)]

    whole = features_and_gradients(1)
    for num in (2, 3, 6):
        torch.testing.assert_close(features_and_gradients(num), whole, rtol=1e-5, atol=1e-5)  # features are float32


def test_backward_through_pieces_keeps_the_activations_of_one_piece() -> None:
    model = ReidModel(tiny_vit(image_size=(64, 32)), fusion="cat", neck="single").train()
    images_BCHW = torch.rand(8, 3, 64, 32)

    def bytes_kept(num_pieces: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.compute_in_pieces(num_pieces)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(images_BCHW)
        return sum(kept.values())

    assert bytes_kept(8) < bytes_kept(1) / 2
