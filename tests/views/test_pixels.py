import numpy as np
import pytest
import torch

from passreid_ray.views import PixelStatistics, ViewsConfig, normalize
from tests.reference.official_views import official_normalize

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_every_pixel_value_of_every_channel_equals_torchvisions(device: str) -> None:
    values = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 1, 3))
    pixels = torch.from_numpy(values.copy()).permute(2, 0, 1)
    found = normalize(pixels.to(device), ViewsConfig())
    assert torch.equal(found.cpu(), official_normalize(values.copy()))


def test_leading_dimensions_are_kept_and_the_input_is_not_changed() -> None:
    pixels = torch.randint(0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8)
    before = pixels.clone()
    found = normalize(pixels, PixelStatistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    torch.testing.assert_close(found, pixels / 127.5 - 1)
    assert torch.equal(pixels, before)
