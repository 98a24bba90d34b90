"""Cameras: what all images of one camera share."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from passreid_ray.data.synthetic.randomness import Stream, generator


@dataclass(frozen=True)
class Camera:
    """One camera; angles in radians, lengths in heights of the crop."""

    facing: float
    """Mean angle at which people walk past: 0 towards the camera, pi away from it, +-pi/2 sideways."""
    facing_spread: float
    elevation: float
    """0 at eye level to 1 steeply from above, which shortens the legs."""
    colour_matrix: tuple[float, ...]
    """3x4 matrix of white balance and saturation, row by row."""
    gamma: float
    contrast: float
    brightness: float
    """Added to pixel values."""
    sharpness: float
    """Share of the resolution that survives the optics and the distance."""
    noise: float
    """Standard deviation in pixel values."""
    light_side: Literal[-1, 1]
    shadow: float
    """Opacity of the dark side of bodies."""
    misalignment: float
    """How badly the detector's boxes fit; standard deviation."""
    occlusion: float
    """Share of images with something in front of the person."""


@lru_cache(maxsize=256)
def camera_of(seed: int, camera: int) -> Camera:
    """Camera number ``camera`` of a seed; it depends on nothing else."""
    rng = generator(seed, Stream.CAMERA, camera)
    # Neighbouring cameras look from different sides, as they do along a street.
    facing = camera * np.pi / 2 + rng.uniform(-0.6, 0.6)
    gains = np.exp(rng.normal(0, 0.025, 3))
    return Camera(
        facing=float(facing),
        facing_spread=float(rng.uniform(0.25, 0.8)),
        elevation=float(rng.uniform(0.0, 1.0)),
        colour_matrix=_colour_matrix(gains / gains.mean(), saturation=float(rng.uniform(0.8, 1.15))),
        gamma=float(np.exp(rng.normal(0, 0.06))),
        contrast=float(rng.uniform(0.88, 1.08)),
        brightness=float(rng.uniform(-5, 5)),
        sharpness=float(rng.uniform(0.45, 1.0)),
        noise=float(rng.uniform(1.5, 6.0)),
        light_side=1 if rng.random() < 0.5 else -1,
        shadow=float(rng.uniform(0.15, 0.5)),
        misalignment=float(rng.uniform(0.015, 0.05)),
        occlusion=float(rng.uniform(0.05, 0.25)),
    )


def _colour_matrix(gains: np.ndarray, saturation: float) -> tuple[float, ...]:
    luma = np.array([0.299, 0.587, 0.114])
    matrix = gains[:, None] * (saturation * np.eye(3) + (1 - saturation) * luma)
    return tuple(float(value) for row in matrix for value in (*row, 0.0))
