import pytest
import torch
from torch.nn import functional as F

from passreid_ray.models.fusion import Fusion, combine_tokens, fuse_tokens, fused_width

TOKENS_B4D = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
CLS_BD, PARTS_BD = TOKENS_B4D[:, 0], (TOKENS_B4D[:, 1] + TOKENS_B4D[:, 2] + TOKENS_B4D[:, 3]) / 3


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        ("cls", CLS_BD),
        ("parts", PARTS_BD),
        ("mean", 0.5 * CLS_BD + 0.5 * PARTS_BD),
        ("cat", torch.tensor([[*cls, *parts] for cls, parts in zip(CLS_BD, PARTS_BD, strict=True)])),
    ],
)
def test_a_feature_is_the_normalised_combination_of_cls_and_the_mean_part(
    fusion: Fusion, expected: torch.Tensor
) -> None:
    torch.testing.assert_close(combine_tokens(TOKENS_B4D, fusion), expected)
    torch.testing.assert_close(fuse_tokens(TOKENS_B4D, fusion), expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("fusion", ["cls", "parts", "mean", "cat"])
def test_without_part_tokens_every_feature_is_cls(fusion: Fusion) -> None:
    assert torch.equal(combine_tokens(TOKENS_B4D[:, :1], fusion), CLS_BD)
    torch.testing.assert_close(fuse_tokens(TOKENS_B4D[:, :1], fusion), F.normalize(CLS_BD, dim=1))


@pytest.mark.parametrize("fusion", ["cls", "parts", "mean", "cat"])
@pytest.mark.parametrize("num_parts", [0, 1, 3])
def test_the_width_is_that_of_the_features(fusion: Fusion, num_parts: int) -> None:
    features_BD = combine_tokens(TOKENS_B4D[:, : 1 + num_parts], fusion)
    assert features_BD.shape == (5, fused_width(6, num_parts, fusion))


def test_features_are_fp32_whatever_the_model_computes_in() -> None:
    assert fuse_tokens(TOKENS_B4D.to(torch.bfloat16), "cat").dtype == torch.float32
