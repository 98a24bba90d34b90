import dataclasses

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare, kstest

from passreid_ray.views import ViewsConfig
from passreid_ray.views.augment import Jitter, ViewDraw, draw_view, global_kinds, local_kind, render_view
from passreid_ray.views.boxes import Box
from tests.reference.official_views import official_view
from tests.views.images import noisy_image

PLAIN = ViewDraw(Box(3, 2, 90, 40), flip=False, jitter=None, grey=False, blur_radius_px=None, solarize=False)
DRAWS = 4000


def draws_of(kind_index: int, config: ViewsConfig | None = None) -> list[ViewDraw]:
    config = config or ViewsConfig()
    kind = (*global_kinds(config), local_kind(config))[kind_index]
    rng = np.random.default_rng(kind_index)
    return [draw_view(Box(0, 0, 128, 48), kind, config, rng) for _ in range(DRAWS)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flip": True},
        {"jitter": Jitter((3, 1, 0, 2), 0.7, 1.3, 0.85, 0.07)},
        {"jitter": Jitter((2, 0, 3, 1), 1.4, 0.6, 1.2, -0.1)},
        {"grey": True},
        {"blur_radius_px": 0.1},
        {"blur_radius_px": 1.7},
        {"solarize": True},
        {
            "flip": True,
            "jitter": Jitter((0, 1, 2, 3), 1.1, 1.2, 0.9, 0.02),
            "grey": True,
            "blur_radius_px": 0.8,
            "solarize": True,
        },
    ],
)
def test_each_step_and_their_order_equal_the_references(changes: dict) -> None:
    image = Image.fromarray(noisy_image(128, 48))
    draw = dataclasses.replace(PLAIN, **changes)
    expected = official_view(
        image,
        box=draw.box,
        size=(256, 128),
        flip=draw.flip,
        jitter=dataclasses.astuple(draw.jitter) if draw.jitter else None,
        grey=draw.grey,
        blur_radius=draw.blur_radius_px,
        solarize=draw.solarize,
    )
    assert np.array_equal(np.asarray(render_view(image, draw, (256, 128))), np.asarray(expected))


def test_a_jitter_without_strengths_changes_nothing() -> None:
    image = Image.fromarray(noisy_image(128, 48))
    draw = dataclasses.replace(PLAIN, jitter=Jitter((0, 1, 2, 3), None, None, None, None))
    changed, unchanged = render_view(image, draw, (64, 32)), render_view(image, PLAIN, (64, 32))
    assert changed.tobytes() == unchanged.tobytes()


@pytest.mark.parametrize(("kind", "blur", "solarize"), [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)])
def test_each_kind_of_view_has_the_references_probabilities(kind: int, blur: float, solarize: float) -> None:
    draws = draws_of(kind)
    shares = {
        "flip": np.mean([draw.flip for draw in draws]),
        "jitter": np.mean([draw.jitter is not None for draw in draws]),
        "grey": np.mean([draw.grey for draw in draws]),
        "blur": np.mean([draw.blur_radius_px is not None for draw in draws]),
        "solarize": np.mean([draw.solarize for draw in draws]),
    }
    expected = {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": blur, "solarize": solarize}
    for name, share in shares.items():
        # Five standard deviations; a probability of 0 or 1 must be exact.
        assert abs(share - expected[name]) <= 5 * np.sqrt(expected[name] * (1 - expected[name]) / DRAWS), name


def test_factors_are_uniform_in_torchvisions_ranges_and_orders_are_equally_likely() -> None:
    jitters = [draw.jitter for draw in draws_of(0) if draw.jitter is not None]
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue_turns": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        values = [getattr(jitter, name) for jitter in jitters]
        assert kstest(values, "uniform", (low, high - low)).pvalue > 1e-3, name
    _, counts = np.unique([jitter.order for jitter in jitters], axis=0, return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 1e-3
    radii = [draw.blur_radius_px for draw in draws_of(0)]
    assert kstest(radii, "uniform", (0.1, 1.9)).pvalue > 1e-3


def test_a_strength_above_one_does_not_reach_below_zero() -> None:
    draws = draws_of(0, ViewsConfig(brightness=3.0))
    values = [draw.jitter.brightness for draw in draws if draw.jitter and draw.jitter.brightness is not None]
    assert 0 <= min(values) < 0.1
    assert 3.9 < max(values) <= 4
