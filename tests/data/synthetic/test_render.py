import pickle
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from passreid_ray.data.synthetic import SyntheticSource, SyntheticStore, synthetic_rows
from passreid_ray.data.synthetic.render import render


def test_a_crop_depends_only_on_the_seed_and_its_own_numbers() -> None:
    small, large = SyntheticSource(num_people=2), SyntheticSource(num_people=500, images_per_person=40)
    backwards = {image: render(large, 2, image, 1) for image in (3, 2, 1)}
    for image in (1, 2, 3):
        np.testing.assert_array_equal(render(small, 2, image, 1), backwards[image])


@pytest.mark.parametrize(("height", "width"), [(128, 64), (256, 128), (64, 32), (32, 16), (96, 96)])
def test_crops_have_the_size_asked_for(height: int, width: int) -> None:
    source = SyntheticSource(height_px=height, width_px=width)
    for person in range(1, 20):
        crop = render(source, person, 1, 1 + person % 6)
        assert crop.shape == (height, width, 3)
        assert crop.dtype == np.uint8
        assert crop.std() > 5


def test_seed_person_image_and_camera_all_change_the_crop() -> None:
    crops = [
        render(SyntheticSource(), 1, 1, 1),
        render(SyntheticSource(seed=1), 1, 1, 1),
        render(SyntheticSource(), 2, 1, 1),
        render(SyntheticSource(), 1, 2, 1),
        render(SyntheticSource(), 1, 1, 2),
    ]
    assert len({crop.tobytes() for crop in crops}) == 5


def test_bytes_are_the_same_crop_as_jpeg() -> None:
    rows = synthetic_rows(SyntheticSource(num_people=2))
    with Image.open(BytesIO(rows.image_bytes(3))) as image:
        assert image.format == "JPEG"
        difference = np.abs(np.asarray(image).astype(int) - rows.image(3))
    assert difference.mean() < 4


def test_the_store_travels_by_pickle() -> None:
    store = SyntheticStore(SyntheticSource())
    assert pickle.loads(pickle.dumps(store)).read("3:1:2") == store.read("3:1:2")


def test_the_fingerprint_tells_what_changes_pixels() -> None:
    sources = [
        SyntheticSource(num_people=4),
        SyntheticSource(num_people=5),
        SyntheticSource(num_people=4, seed=1),
        SyntheticSource(num_people=4, width_px=48),
    ]
    assert len({synthetic_rows(source).fingerprint() for source in sources}) == 4
