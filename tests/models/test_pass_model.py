import torch
from torch import Tensor

from passreid_ray.models import PrototypeHead
from passreid_ray.models.pass_model import PassModel
from tests.models.golden_models import TOKENS, Golden, golden_head, golden_vit, largest_difference, tiny_vit

# Shape letters: B batch, G global views, P parts, L local views per part, K prototypes.


def small_model(*, drop_path: float = 0.0) -> PassModel:
    torch.manual_seed(0)
    return PassModel(tiny_vit(24, num_heads=2, drop_path=drop_path), PrototypeHead(24, 10, 16, 8, num_tokens=4))


def test_logits_of_all_views_equal_the_reference() -> None:
    golden = Golden("pass_forward_64x32")
    model = PassModel(golden_vit(golden, "student_sd/"), golden_head(golden, "student_sd/"))
    batch = golden["crop_u8/00"].shape[0]
    global_GBCHW = golden.global_views().unflatten(0, (2, batch))
    local_PLBCHW = torch.stack([views.unflatten(0, (3, batch)) for views in golden.local_views()])
    logits, _ = model(global_GBCHW, local_PLBCHW)
    parts = range(1, 4)
    for token, got_VBK in zip(TOKENS, logits, strict=True):
        own = [f"student_out/p{part}_cls" for part in parts] if token == "cls" else [f"student_out/p{token[2:]}_pt"]
        expected = torch.cat([golden[f"student_out/g_{token}"], *(golden[name] for name in own)])
        assert largest_difference(got_VBK.flatten(0, 1), expected) < 5e-6


def test_cls_sees_every_view_and_a_part_the_global_and_its_own_ones() -> None:
    logits, features_GBTD = small_model()(torch.randn(2, 3, 3, 64, 32), torch.randn(3, 5, 3, 3, 32, 16))
    assert [tuple(own.shape) for own in logits] == [(2 + 15, 3, 10), *[(2 + 5, 3, 10)] * 3]
    assert features_GBTD.shape == (2, 3, 4, 24)


def test_without_local_views_all_tokens_see_the_global_ones() -> None:
    model, global_GBCHW = small_model().eval(), torch.randn(2, 3, 3, 64, 32)
    logits, _ = model(global_GBCHW)
    empty, _ = model(global_GBCHW, torch.empty(3, 0, 3, 3, 32, 16))
    assert [tuple(own.shape) for own in logits] == [(2, 3, 10)] * 4
    assert all(torch.equal(one, other) for one, other in zip(logits, empty, strict=True))


def test_each_image_meets_its_own_stochastic_depth_in_each_view() -> None:
    model = small_model(drop_path=0.5).train()
    global_GBCHW, local_PLBCHW = torch.randn(2, 3, 3, 64, 32), torch.randn(3, 1, 3, 3, 32, 16)
    noise_L2MB = torch.rand(2, 2, 5, 3)
    both, _ = model(global_GBCHW, local_PLBCHW, drop_path_noise_L2MB=noise_L2MB)

    def alone(image: int) -> list[Tensor]:
        pick = slice(image, image + 1)
        noise = noise_L2MB[..., pick]
        return model(global_GBCHW[:, pick], local_PLBCHW[:, :, pick], drop_path_noise_L2MB=noise)[0]

    for image in range(3):
        for whole_VBK, own_V1K in zip(both, alone(image), strict=True):
            torch.testing.assert_close(whole_VBK[:, image], own_V1K[:, 0])
