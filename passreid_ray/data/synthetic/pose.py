"""Where the joints of a walking person are in the image."""

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np

Point = tuple[float, float]


@dataclass(frozen=True)
class Pose:
    """How a person stands in one image; angles in radians."""

    angle: float
    """0 faces the camera, pi/2 walks to the right of the image, pi shows the back."""
    phase: float
    """Of the walking cycle, 0..2 pi."""
    stride: float
    """Largest angle of a leg from the vertical."""
    elbow: float
    """Bend of the arms."""

    @property
    def front(self) -> float:
        """1 from the front, -1 from behind."""
        return cos(self.angle)

    @property
    def side(self) -> float:
        """1 walking to the right of the image, -1 to the left."""
        return sin(self.angle)


@dataclass(frozen=True)
class Place:
    """Where a person stands in the canvas: maps body coordinates to pixels.

    Body coordinates count from the middle of the body to the right and from the top of the head down to the feet, both
    in body heights.
    """

    centre_px: float
    top_px: float
    height_px: float
    elevation: float

    def __call__(self, point: Point) -> Point:
        x, y = point
        # From above, what is nearer to the camera (the head) grows and the legs shrink.
        bend = 0.16 * self.elevation
        y = y * (1 - bend * y) / (1 - bend)
        return self.centre_px + 1.2 * x * self.height_px, self.top_px + y * self.height_px


@dataclass(frozen=True)
class Limb:
    """Three joints of an arm or a leg, from the body outwards, and whether the body hides its root."""

    joints: tuple[Point, Point, Point]
    is_far: bool


def legs(pose: Pose, hip_half_width: float) -> tuple[Limb, Limb]:
    """Left and right leg: hip, knee and ankle."""
    return _leg(pose, 1, hip_half_width), _leg(pose, -1, hip_half_width)


def arms(pose: Pose, shoulder_half_width: float) -> tuple[Limb, Limb]:
    """Left and right arm: shoulder, elbow and wrist."""
    return _arm(pose, 1, shoulder_half_width), _arm(pose, -1, shoulder_half_width)


def sample_pose(rng: np.random.Generator, facing: float, spread: float) -> Pose:
    """A random moment of somebody walking past a camera."""
    towards = facing + (pi if rng.random() < 0.2 else 0.0)
    return Pose(
        angle=float(rng.normal(towards, spread)),
        phase=float(rng.uniform(0, 2 * pi)),
        stride=float(rng.uniform(0.1, 0.5)),
        elbow=float(rng.uniform(0.05, 0.7)),
    )


def _leg(pose: Pose, body_side: int, half_width: float) -> Limb:
    # Facing the camera, a person's left (body_side 1) is at the right of the image.
    swing = pose.stride * sin(pose.phase) * body_side
    bend = max(0.0, pose.stride * 0.9 * cos(pose.phase) * body_side)
    hip = (body_side * half_width * pose.front, 0.50)
    thigh, shin = 0.24, 0.22
    knee = (hip[0] + thigh * sin(swing) * pose.side, hip[1] + thigh * cos(swing))
    lower = swing - bend
    depth = 0.02 * swing * pose.front  # a foot nearer to the camera is lower in the image
    ankle = (knee[0] + shin * sin(lower) * pose.side, knee[1] + shin * cos(lower) + depth)
    return Limb((hip, knee, ankle), is_far=body_side * pose.side > 0)


def _arm(pose: Pose, body_side: int, half_width: float) -> Limb:
    swing = -0.8 * pose.stride * sin(pose.phase) * body_side
    shoulder = (body_side * half_width * pose.front, 0.195)
    upper, fore = 0.165, 0.155
    outwards = 0.05 * body_side * pose.front
    elbow = (shoulder[0] + upper * sin(swing) * pose.side + outwards * 0.5, shoulder[1] + upper * cos(swing))
    lower = swing + pose.elbow
    wrist = (elbow[0] + fore * sin(lower) * pose.side - outwards * 0.3, elbow[1] + fore * cos(lower))
    return Limb((shoulder, elbow, wrist), is_far=body_side * pose.side > 0)
