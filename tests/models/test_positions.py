import pytest
import torch

from passreid_ray.models.positions import resize_positions, stored_grid
from tests.models.golden_models import Golden, largest_difference


def test_bilinear_resize_equals_the_reference_fine_tuning_loader() -> None:
    stored_1ND = Golden("pass_forward_64x32")["teacher_sd/backbone.pos_embed"]
    resized_1ND = resize_positions(stored_1ND, (4, 2), (6, 2), "bilinear")
    assert largest_difference(resized_1ND, Golden("finetune_cluster_vit")["pos_embed_resized_96x32"]) < 1e-6


def test_rows_and_columns_of_a_linear_ramp_stay_in_place() -> None:
    ramp = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(2.0), indexing="ij"), dim=-1).reshape(1, 8, 2)
    resized = resize_positions(ramp, (4, 2), (8, 2), "bilinear").reshape(8, 2, 2)
    assert (resized[1:, :, 0] >= resized[:-1, :, 0]).all()
    torch.testing.assert_close(resized[:, :, 1], torch.tensor([[0.0, 1.0]]).expand(8, 2))


@pytest.mark.parametrize(
    ("count", "like", "grid"),
    [
        (128, (16, 8), (16, 8)),
        (128, (24, 8), (16, 8)),
        (192, (24, 8), (24, 8)),
        (196, (16, 8), (14, 14)),
        (48, (24, 8), (12, 4)),
        (127, (16, 8), None),
        (0, (16, 8), None),
    ],
)
def test_a_stored_grid_is_recognised(count: int, like: tuple[int, int], grid: tuple[int, int] | None) -> None:
    assert stored_grid(count, like) == grid
