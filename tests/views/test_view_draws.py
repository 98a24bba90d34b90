import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passreid_ray.views import PartViews, ViewsConfig, view_rng
from passreid_ray.views.augment import Jitter, ViewDraw
from passreid_ray.views.boxes import Box
from passreid_ray.views.view_draws import ViewDraws, draw_views


def as_view_draw(draws: ViewDraws, n: int, v: int) -> ViewDraw:
    """One view's decisions in the words of ``PartViews.draw``."""
    order = tuple(draws.jitter_order_NV4[n, v].tolist())
    factors = [None if math.isnan(factor) else factor for factor in draws.jitter_NV4[n, v].tolist()]
    blur_radius = float(draws.blur_radius_NV[n, v])
    return ViewDraw(
        box=Box(*draws.boxes_NV4[n, v].tolist()),
        flip=bool(draws.flip_NV[n, v]),
        jitter=None if order == (-1, -1, -1, -1) else Jitter(order, *factors),
        grey=bool(draws.grey_NV[n, v]),
        blur_radius_px=None if math.isnan(blur_radius) else blur_radius,
        solarize=bool(draws.solarize_NV[n, v]),
    )


def state(rng: np.random.Generator) -> str:
    return repr(rng.bit_generator.state)


probabilities = st.sampled_from([0.0, 0.3, 0.8, 1.0])
ranges = st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(lambda pair: (min(pair), max(pair)))


@st.composite
def configs(draw: st.DrawFn) -> ViewsConfig:
    settings: dict[str, Any] = {
        "num_parts": draw(st.integers(1, 5)),
        "local_views_per_part": draw(st.integers(1, 4)),
        "part_height": draw(st.floats(0.5, 1)),
        "aspect": draw(st.sampled_from(["official", "person"])),
        "global_scale": draw(ranges),
        "local_scale": draw(ranges),
        "person_local_aspect": draw(ranges),
        "brightness": draw(st.sampled_from([0.0, 0.4, 1.5])),
        "contrast": draw(st.sampled_from([0.0, 0.4])),
        "saturation": draw(st.sampled_from([0.0, 0.2])),
        "hue": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "blur_radius_px": draw(st.sampled_from([(0.1, 2.0), (0.0, 0.0), (1.0, 9.0)])),
        "global_blur_probability": (draw(probabilities), draw(probabilities)),
        "global_solarize_probability": (draw(probabilities), draw(probabilities)),
    }
    for name in ("flip", "jitter", "grey", "local_blur", "local_solarize"):
        settings[f"{name}_probability"] = draw(probabilities)
    return ViewsConfig(**settings)


@settings(max_examples=60, deadline=None)
@given(
    config=configs(),
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 200)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_draws_and_generators_afterwards_equal_those_of_part_views(
    config: ViewsConfig, sizes: list[tuple[int, int]], seed: int
) -> None:
    ours = [view_rng(seed, n, "a.jpg") for n in range(len(sizes))]
    theirs = [view_rng(seed, n, "a.jpg") for n in range(len(sizes))]
    draws = draw_views(config, sizes, ours)
    assert draws.boxes_NV4.shape == (len(sizes), 2 + config.num_parts * config.local_views_per_part, 4)
    for n, (height, width) in enumerate(sizes):
        expected = list(PartViews(config).draw(height, width, theirs[n]))
        assert [as_view_draw(draws, n, v) for v in range(len(expected))] == expected
        assert state(ours[n]) == state(theirs[n])


@pytest.mark.parametrize("bit_generator", [np.random.PCG64, np.random.Philox, np.random.MT19937, np.random.SFC64])
def test_one_generator_of_any_kind_serves_several_images_in_turn(bit_generator: type) -> None:
    config = ViewsConfig()
    ours, theirs = np.random.Generator(bit_generator(3)), np.random.Generator(bit_generator(3))
    draws = draw_views(config, [(128, 64)] * 20, [ours] * 20)
    for n in range(20):
        expected = list(PartViews(config).draw(128, 64, theirs))
        assert [as_view_draw(draws, n, v) for v in range(len(expected))] == expected
    assert state(ours) == state(theirs)


def test_taken_draws_are_those_of_the_images_at_these_places() -> None:
    draws = draw_views(ViewsConfig(), [(128, 64)] * 4, [view_rng(0, n, "a.jpg") for n in range(4)])
    for indices in ([2, 0], np.array([True, False, False, True]), slice(1, 3)):
        taken = draws.take(indices)
        places = np.arange(4)[indices].tolist()
        assert len(taken) == len(places)
        for n, place in enumerate(places):
            assert [as_view_draw(taken, n, v) for v in range(11)] == [as_view_draw(draws, place, v) for v in range(11)]


def test_read_only_draws_share_memory_and_leave_the_others_writeable() -> None:
    draws = draw_views(ViewsConfig(), [(128, 64)], [view_rng(0, 0, "a.jpg")])
    locked = draws.read_only()
    assert np.shares_memory(locked.jitter_NV4, draws.jitter_NV4)
    with pytest.raises(ValueError, match="read-only"):
        locked.jitter_NV4[0] = 0
    draws.jitter_NV4[0] = 0


def test_an_image_without_a_generator_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        draw_views(ViewsConfig(), [(128, 64)] * 2, [view_rng(0, 0, "a.jpg")])


def test_no_images_give_no_draws() -> None:
    assert len(draw_views(ViewsConfig(), [], [])) == 0
