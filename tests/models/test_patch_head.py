"""The patch head, and what a backbone makes of hidden patches."""

from typing import Any

import pytest
import torch
from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.models.config import HeadConfig, ModelConfig, build_pass_model
from passreid_ray.models.part_vit import Stem
from passreid_ray.models.pass_model import PassModel
from tests.models.golden_models import tiny_vit

# Shape letters: B images, L patches, D width, M chosen patches, T prefix tokens.

HEAD = HeadConfig(num_prototypes=8, hidden_dim=16, bottleneck_dim=4, batch_norm=True)
CHOSEN = torch.tensor([0, 3, 11, 12, 15])
"""Patches of three images of eight patches; the second image's are 8 to 15."""


def model(patch_prototypes: int | None = 12, stem: Stem = "patch", **changes: Any) -> PassModel:
    torch.manual_seed(0)
    settings = {"trunk": "vit_tiny_patch16_224", "embed_dim": 24, "depth": 2, "num_heads": 2, "stem": stem, **changes}
    built = build_pass_model(ModelConfig(**settings), HEAD, (64, 32), 3, patch_prototypes=patch_prototypes)
    if built.patches is not None:
        torch.nn.init.normal_(built.patches.mask_token)
    return built.double()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 64, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_without_a_patch_head_the_state_is_the_same_as_before_and_so_are_the_weights() -> None:
    plain, with_head = model(None).state_dict(), model().state_dict()
    assert all(name.startswith(("backbone.", "head.")) for name in plain)
    added = with_head.keys() - plain.keys()
    assert added == {name for name in with_head if name.startswith("patches.")}
    assert {"patches.mask_token", "patches.head.last_layer_cls.weight_v"} <= added
    assert all(torch.equal(value, with_head[name]) for name, value in plain.items())


def test_the_patch_head_has_its_own_prototypes_and_no_batch_norm() -> None:
    patches = model().patches
    assert patches is not None
    bottlenecks_ME = patches.bottlenecks(torch.randn(5, 24, dtype=torch.float64))
    torch.testing.assert_close(bottlenecks_ME.norm(dim=-1), torch.ones(5, dtype=torch.float64))
    assert patches.prototypes()(bottlenecks_ME).shape == (5, 12)
    assert patches.bottlenecks(torch.zeros(0, 24, dtype=torch.float64)).shape == (0, 4)
    assert not list(patches.buffers())


def test_all_prototypes_are_in_the_last_layer() -> None:
    own = model()
    names = {id(parameter): name for name, parameter in own.named_parameters()}
    found = {names[id(parameter)] for parameter in own.last_layer_parameters()}
    assert found == {name for name in names.values() if "last_layer" in name}
    assert sum(name.startswith("patches.") for name in found) == 2


@pytest.mark.parametrize("checkpoints", [False, True])
def test_patches_that_are_asked_for_are_those_of_the_plain_trunk(checkpoints: bool) -> None:
    backbone = tiny_vit(24, num_heads=2).double()
    backbone.use_activation_checkpointing(checkpoints)
    rows_MD = backbone(images(), patches_M=CHOSEN)
    prefix_MD, patches_MD = rows_MD.split([3 * 4, len(CHOSEN)])
    torch.testing.assert_close(prefix_MD.unflatten(0, (3, 4)), backbone(images()), rtol=1e-10, atol=1e-12)
    tokens_BND = backbone._tokens(images(), None)
    for block in backbone.blocks:
        tokens_BND = block(tokens_BND)
    expected_BLD = backbone.norm(tokens_BND)[:, 4:]
    torch.testing.assert_close(patches_MD, expected_BLD.flatten(0, 1)[CHOSEN], rtol=1e-10, atol=1e-12)


def test_stochastic_depth_is_that_of_the_patches_image() -> None:
    backbone = tiny_vit(24, num_heads=2, drop_path=0.5).double().train()
    noise_L2B = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(2))
    rows_MD = backbone(images(), drop_path_noise=noise_L2B, patches_M=CHOSEN)
    second_MD = backbone(images()[1:2], drop_path_noise=noise_L2B[..., 1:2], patches_M=torch.tensor([3, 4, 7]))
    torch.testing.assert_close(rows_MD[4:8], second_MD[:4], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rows_MD[-3:], second_MD[4:], rtol=1e-10, atol=1e-12)


def pixels_of(patches: Tensor, batch: int = 3) -> Tensor:
    """True in the pixels of these patches, ``(B, 1, H, W)``."""
    hidden = torch.zeros(batch * 8, dtype=torch.bool)
    hidden[patches] = True
    return hidden.view(batch, 1, 4, 2).repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)


@pytest.mark.parametrize("stem", ["patch", "ics"])
def test_pixels_of_hidden_patches_change_nothing_and_others_do(stem: Stem) -> None:
    own = model(stem=stem).eval()
    others = torch.tensor([patch for patch in range(24) if patch not in CHOSEN])
    noise = 10 * torch.randn(images().shape, dtype=torch.float64)

    def outputs(views_BCHW: Tensor, hides: bool) -> list[Tensor]:
        bottlenecks, features_GBTD, patches_ME = own.bottlenecks(
            views_BCHW[None], patches_N=CHOSEN, hides_patches=hides
        )
        assert patches_ME is not None
        return [*bottlenecks, features_GBTD, patches_ME]

    hidden, seen = pixels_of(CHOSEN), pixels_of(others)
    before = outputs(images(), hides=True)
    unseen = outputs(images().where(~hidden, noise), hides=True)
    assert all(torch.equal(one, other) for one, other in zip(before, unseen, strict=True))
    for changed in (outputs(images().where(~seen, noise), hides=True), outputs(images(), hides=False)):
        assert not any(torch.equal(one, other) for one, other in zip(before, changed, strict=True))


def test_a_hidden_patch_is_the_mask_token_at_its_own_position() -> None:
    own = model()
    assert own.patches is not None
    backbone = own.backbone
    tokens_BND = backbone._tokens(images(), None, CHOSEN, own.patches.mask_token)
    positions_LD = backbone.positions((4, 2))[0]
    plain_BND = backbone._tokens(images(), None)
    for number in range(24):
        image, patch = divmod(number, 8)
        expected = own.patches.mask_token[0] + positions_LD[patch] if number in CHOSEN else plain_BND[image, 4 + patch]
        torch.testing.assert_close(tokens_BND[image, 4 + patch], expected)


def test_with_no_patch_chosen_every_parameter_still_gets_a_gradient() -> None:
    own = model()
    bottlenecks, _, patches_ME = own.bottlenecks(
        images()[None], patches_N=torch.zeros(0, dtype=torch.long), hides_patches=True
    )
    assert own.patches is not None
    assert patches_ME is not None
    loss = sum(token.sum() for token in bottlenecks) + own.patches.prototypes()(patches_ME).sum()
    assert isinstance(loss, Tensor)
    loss.backward()
    for name, parameter in own.patches.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and not parameter.grad.any()), name


def test_views_may_have_other_sizes_than_the_table() -> None:
    rows_MD = model().backbone(torch.randn(1, 3, 32, 32).double(), patches_M=torch.tensor([3]))
    assert rows_MD.shape == (4 + 1, 24)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="leave out grids_B2"):
        model().backbone(images(), grids_B2=torch.tensor([[4, 2]] * 3), patches_M=CHOSEN)
    with pytest.raises(ValueError, match="no patch head"):
        model(None).bottlenecks(images()[None], patches_N=CHOSEN)
