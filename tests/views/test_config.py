from typing import Any

import pytest

from passreid_ray.config import build
from passreid_ray.errors import UserError
from passreid_ray.views import ViewsConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_parts": 0}, "num_parts"),
        ({"local_views_per_part": 0}, "local_views_per_part"),
        ({"global_size_px": [0, 128]}, "global_size_px"),
        ({"part_height": 0}, "part_height"),
        ({"part_height": 1.5}, "part_height"),
        ({"num_parts": 3, "part_height": 0.3}, "part_height: 3 bands of 0.3 leave gaps"),
        ({"global_scale": [0.5, 0.4]}, "global_scale: expected .low, high. with 0 < low <= high <= 1"),
        ({"local_scale": [0, 0.4]}, "local_scale"),
        ({"local_scale": [0.1, 1.1]}, "local_scale"),
        ({"person_global_aspect": [0.7, 0.35]}, "person_global_aspect: expected .low, high. with 0 < low <= high"),
        ({"aspect": "square"}, "aspect"),
        ({"flip_probability": 1.1}, "flip_probability"),
        ({"global_blur_probability": [1.0, -0.1]}, "global_blur_probability"),
        ({"hue": 0.6}, "hue"),
        ({"brightness": -0.1}, "brightness"),
        ({"blur_radius_px": [2, 1]}, "blur_radius_px: expected .low, high."),
        ({"std": [0.2, 0, 0.2]}, "std: expected three numbers above 0"),
        ({"local_view": 3}, "local_view.* did you mean"),
    ],
)
def test_nonsense_is_refused_with_the_name_of_the_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(ViewsConfig, values)


def test_bands_that_just_meet_are_allowed() -> None:
    assert ViewsConfig(num_parts=3, part_height=1 / 3).part_height == 1 / 3
    assert ViewsConfig(num_parts=10, part_height=0.1).num_parts == 10


def test_official_aspect_is_torchvisions_default_for_every_view() -> None:
    config = ViewsConfig(aspect="official")
    assert config.global_aspect == config.local_aspect == (3 / 4, 4 / 3)
