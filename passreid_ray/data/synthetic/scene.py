"""Backgrounds: one wide picture per camera, of which every image shows another stretch."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from passreid_ray.data.synthetic.brush import shaded
from passreid_ray.data.synthetic.people import Colour
from passreid_ray.data.synthetic.randomness import Stream, generator

_WIDTHS = 6
"""Width of a scene in widths of the canvas."""


def background(
    seed: int, camera: int, elevation: float, size: tuple[int, int], rng: np.random.Generator
) -> Image.Image:
    """A stretch of the camera's scene, ``size`` = width and height, as a new RGB image."""
    width, height = size
    scene = _scene(seed, camera, elevation, size)
    left = int(rng.integers(0, scene.width - width + 1))
    top = int(rng.integers(0, scene.height - height + 1))
    return scene.crop((left, top, left + width, top + height))


@lru_cache(maxsize=64)
def _scene(seed: int, camera: int, elevation: float, size: tuple[int, int]) -> Image.Image:
    rng = generator(seed, Stream.SCENE, camera)
    width, height = size[0] * _WIDTHS, int(size[1] * 1.15)
    horizon = int(height * (0.55 - 0.6 * elevation))
    image = Image.new("RGB", (width, height), _colour(rng, 60, 190))
    draw = ImageDraw.Draw(image)
    _draw_ground(draw, rng, horizon, width, height)
    scenes: list[Callable[[ImageDraw.ImageDraw, np.random.Generator, int, int, int], None]] = [
        _draw_facade, _draw_trees, _draw_cars, _draw_columns,
    ]  # fmt: skip
    scenes[int(rng.integers(len(scenes)))](draw, rng, max(horizon, int(height * 0.12)), width, height)
    image = image.filter(ImageFilter.GaussianBlur(height / 220))
    grain_HW = rng.normal(0, 6, (height // 3, width // 3)).repeat(3, 0).repeat(3, 1)
    pixels_HWC = np.asarray(image)[: grain_HW.shape[0], : grain_HW.shape[1]] + grain_HW[..., None]
    image.paste(Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)))
    return image


def _draw_ground(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int, width: int, height: int) -> None:
    ground = _colour(rng, 80, 180)
    draw.rectangle((0, horizon, width, height), fill=ground)
    line = shaded(ground, rng.uniform(0.75, 1.2))
    match int(rng.integers(3)):
        case 0:  # paving stones
            for x in range(0, 2 * width, max(height // 9, 4)):
                draw.line((x, horizon, x - int(0.8 * (height - horizon)), height), fill=line, width=2)
            y, step = float(horizon), height / 40
            while y < height:
                draw.line((0, y, width, y), fill=line, width=2)
                y, step = y + step, step * 1.25
        case 1:  # a kerb and a crossing
            kerb = horizon + int((height - horizon) * rng.uniform(0.2, 0.6))
            draw.rectangle((0, kerb, width, kerb + height // 50), fill=_colour(rng, 150, 220))
            for x in range(0, width, height // 2):
                draw.polygon(
                    [(x, kerb), (x + height // 5, kerb), (x + height // 9, height), (x - height // 9, height)],
                    fill=line,
                )
        case _:  # patches
            for _ in range(60):
                x, y = int(rng.integers(0, width)), int(rng.integers(horizon, height + 1))
                radius_x, radius_y = height * rng.uniform(0.05, 0.2), height * rng.uniform(0.01, 0.04)
                draw.ellipse((x - radius_x, y - radius_y, x + radius_x, y + radius_y), fill=line)


def _draw_facade(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int, width: int, height: int) -> None:
    draw.rectangle((0, 0, width, horizon), fill=_colour(rng, 70, 200))
    step, glass = int(height * rng.uniform(0.18, 0.4)), _colour(rng, 30, 110)
    for x in range(0, width, step):
        draw.rectangle((x, horizon * 0.1, x + step * 0.6, horizon * rng.uniform(0.6, 1.0)), fill=glass)
        draw.rectangle((x, horizon * 0.1, x + step * 0.6, horizon * 0.16), fill=_colour(rng, 60, 220))


def _draw_trees(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int, width: int, height: int) -> None:
    for _ in range(90):
        x, y = int(rng.integers(0, width)), int(rng.integers(-height // 10, horizon + 1))
        radius = int(rng.integers(height // 30, height // 8))
        shade = rng.uniform(0.5, 1.0)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shaded((96, 116, 84), shade))
    for x in rng.integers(0, width, 7).tolist():
        draw.rectangle((x, 0, x + height // 40, horizon + height // 20), fill=(74, 58, 46))


def _draw_cars(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int, width: int, height: int) -> None:
    x = -int(rng.integers(0, height // 2))
    while x < width:
        length, top, colour = int(height * rng.uniform(0.45, 0.7)), horizon - height // 9, _colour(rng, 30, 220)
        draw.rounded_rectangle((x, top, x + length, top + height // 6), height // 30, fill=colour)
        draw.rounded_rectangle(
            (x + length // 5, top - height // 10, x + length * 4 // 5, top + 4), height // 30, fill=colour
        )
        draw.rectangle((x + length // 4, top - height // 14, x + length * 3 // 4, top), fill=(58, 66, 76))
        for wheel in (0.2, 0.8):
            centre, radius = x + length * wheel, height // 26
            draw.ellipse(
                (centre - radius, top + height // 6 - radius, centre + radius, top + height // 6 + radius),
                fill=(24, 24, 26),
            )
        x += length + int(rng.integers(height // 12, height // 3))


def _draw_columns(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int, width: int, height: int) -> None:
    wall, column = _colour(rng, 90, 210), _colour(rng, 60, 180)
    draw.rectangle((0, 0, width, horizon), fill=wall)
    for x in range(0, width, int(height * rng.uniform(0.3, 0.55))):
        draw.rectangle((x, 0, x + height // 12, horizon + height // 12), fill=column)
        if rng.random() < 0.5:
            poster = x + height // 8
            draw.rectangle((poster, horizon * 0.2, poster + height // 7, horizon * 0.7), fill=_colour(rng, 20, 235))


def _colour(rng: np.random.Generator, low: int, high: int) -> Colour:
    """A dull colour, as most of what is built."""
    grey = rng.uniform(low, high)
    warmth, tint = rng.normal(6, 14), rng.normal(0, 5)
    red, green, blue = np.clip((grey + warmth, grey + tint, grey - warmth), 0, 255)
    return int(red), int(green), int(blue)
