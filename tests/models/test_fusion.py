import pytest
import torch
from torch.nn import functional as F

from passreid_ray.models.fusion import Fusion, fuse_tokens

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
    got = fuse_tokens(TOKENS_B4D, fusion)
    torch.testing.assert_close(got, expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("fusion", ["cls", "parts", "mean", "cat"])
def test_without_part_tokens_every_feature_is_cls(fusion: Fusion) -> None:
    torch.testing.assert_close(fuse_tokens(TOKENS_B4D[:, :1], fusion), F.normalize(CLS_BD, dim=1))


def test_features_are_fp32_whatever_the_model_computes_in() -> None:
    assert fuse_tokens(TOKENS_B4D.to(torch.bfloat16), "cat").dtype == torch.float32
