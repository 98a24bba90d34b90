import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from passreid_ray.views import PixelStatistics, evaluation_pixels, evaluation_view
from tests.reference.official_views import official_normalize
from tests.views.images import noisy_image


def test_the_evaluation_view_is_the_references_resize_and_normalise() -> None:
    image = noisy_image(131, 57)
    resized = transforms.Resize((256, 128), interpolation=transforms.InterpolationMode.BICUBIC)(Image.fromarray(image))
    assert np.array_equal(evaluation_pixels(image, (256, 128)), np.asarray(resized).transpose(2, 0, 1))
    assert torch.equal(evaluation_view(image, (256, 128), PixelStatistics()), official_normalize(resized))


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    image = noisy_image(64, 32)
    assert np.array_equal(evaluation_pixels(image, (64, 32)).transpose(1, 2, 0), image)
