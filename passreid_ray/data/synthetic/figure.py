"""Drawing one person, body part by body part; all lengths are in body heights."""

from PIL import Image

from passreid_ray.data.synthetic.brush import Brush, shaded
from passreid_ray.data.synthetic.people import Person
from passreid_ray.data.synthetic.pose import Limb, Place, Point, Pose, arms, legs

_FAR = 0.70
"""Brightness of the arm and the leg behind the body."""


def draw_person(canvas: Image.Image, person: Person, pose: Pose, place: Place) -> Image.Image:
    """Draw ``person`` onto an RGB ``canvas``, from the far side of the body to the near one; returns the silhouette."""
    brush = Brush(canvas, place)
    far_leg, near_leg = sorted(legs(pose, 0.052 * person.build), key=lambda limb: not limb.is_far)
    far_arm, near_arm = sorted(arms(pose, 0.112 * person.build), key=lambda limb: not limb.is_far)
    seen_from_side = abs(pose.side) > 0.35
    _hair_behind(brush, person, pose)
    if seen_from_side:
        _arm(brush, person, far_arm)
    _leg(brush, person, pose, far_leg)
    _leg(brush, person, pose, near_leg)
    if person.bag == "backpack" and pose.front > -0.35:
        _backpack(brush, person, pose)
    _torso(brush, person, pose)
    if person.bag == "backpack" and pose.front > 0.3:
        _backpack_straps(brush, person, pose)
    if not seen_from_side:
        _arm(brush, person, far_arm)
    if person.bag == "backpack" and pose.front <= -0.35:
        _backpack(brush, person, pose)
    if person.bag == "shoulder":
        _shoulder_bag(brush, person, pose)
    _arm(brush, person, near_arm)
    if person.bag == "handbag":
        x, y = near_arm.joints[2]
        brush.block((x, y + 0.075), 0.056, 0.055, person.bag_colour)
    _head(brush, person, pose)
    _hat(brush, person, pose)
    return brush.silhouette


def _leg(brush: Brush, person: Person, pose: Pose, limb: Limb) -> None:
    hip, knee, ankle = limb.joints
    shade = _FAR if limb.is_far else 1.0
    build = person.build
    if person.lower_kind == "trousers":
        _shoe(brush, person, pose, ankle, shade)
        cut = build * person.lower_width
        brush.sleeve(limb.joints, (0.058 * build, 0.042 * cut, 0.033 * cut), person.lower, shade)
        return
    brush.limb(limb.joints, (0.05 * build, 0.034 * build, 0.022 * build), shaded(person.skin, shade))
    _shoe(brush, person, pose, ankle, shade)
    if person.lower_kind == "shorts":
        brush.sleeve((hip, _between(hip, knee, 0.85)), (0.06 * build, 0.056 * build), person.lower, shade)


def _shoe(brush: Brush, person: Person, pose: Pose, ankle: Point, shade: float) -> None:
    toe = (ankle[0] + 0.028 * pose.side, min(ankle[1] + 0.022, 0.985))
    brush.ellipse(toe, 0.026 + 0.026 * abs(pose.side), 0.019, shaded(person.shoes, shade))


def _torso(brush: Brush, person: Person, pose: Pose) -> None:
    shoulder = _half_width(person, pose, 0.115, 0.065)
    waist = _half_width(person, pose, 0.088, 0.068)
    hip = _half_width(person, pose, 0.098, 0.075)
    hem = person.upper_length
    at_hem = hip + 0.15 * max(hem - 0.55, 0.0)
    if person.lower_kind == "skirt":
        wide = hip + 0.03 * person.lower_width
        brush.cloth([(-hip, 0.46), (hip, 0.46), (wide, 0.70), (-wide, 0.70)], person.lower)
    else:
        brush.cloth([(-hip, 0.46), (hip, 0.46), (hip * 0.95, 0.55), (-hip * 0.95, 0.55)], person.lower)
    right = [(0.04, 0.145), (shoulder * 0.85, 0.165), (shoulder, 0.195), (shoulder * 0.95, 0.27), (waist, 0.40)]
    right += [(at_hem, hem)] if hem < 0.5 else [(hip, 0.49), (at_hem, hem)]
    brush.cloth([*right, *((-x, y) for x, y in reversed(right))], person.upper)
    middle = 0.07 * pose.side
    if pose.front > 0.25 and person.is_open:
        top, low = 0.026 * pose.front, 0.036 * pose.front
        front = [(middle - top, 0.15), (middle + top, 0.15), (middle + low, hem), (middle - low, hem)]
        brush.polygon(front, person.upper.second)
    elif pose.front > 0.25 and person.logo is not None:
        brush.block((middle, 0.265), 0.046 * pose.front, 0.036, person.logo)
    if pose.front > 0.0:
        brush.polygon([(middle - 0.03, 0.145), (middle + 0.03, 0.145), (middle, 0.185)], person.skin)


def _arm(brush: Brush, person: Person, limb: Limb) -> None:
    shoulder, elbow, wrist = limb.joints
    shade = _FAR if limb.is_far else 0.9
    build = person.build
    brush.limb(limb.joints, (0.034 * build, 0.028 * build, 0.020 * build), shaded(person.skin, shade))
    brush.ellipse(_between(elbow, wrist, 1.1), 0.020, 0.025, shaded(person.skin, shade))
    if person.sleeve > 0.95:
        brush.sleeve(limb.joints, (0.041 * build, 0.036 * build, 0.029 * build), person.upper, shade)
    elif person.sleeve > 0.5:
        joints = (shoulder, elbow, _between(elbow, wrist, 2 * person.sleeve - 1))
        brush.sleeve(joints, (0.041 * build, 0.036 * build, 0.032 * build), person.upper, shade)
    elif person.sleeve > 0.0:
        joints = (shoulder, _between(shoulder, elbow, 2 * person.sleeve))
        brush.sleeve(joints, (0.043 * build, 0.042 * build), person.upper, shade)


def _backpack(brush: Brush, person: Person, pose: Pose) -> None:
    centre = -0.105 * pose.side
    half_width = 0.045 + 0.045 * max(-pose.front, 0.0) + 0.02 * max(pose.front, 0.0)
    brush.block((centre, 0.30), half_width, 0.125, person.bag_colour)
    if pose.front <= -0.35:
        brush.block((centre, 0.355), half_width * 0.75, 0.045, shaded(person.bag_colour, 0.72))


def _backpack_straps(brush: Brush, person: Person, pose: Pose) -> None:
    for body_side in (-1, 1):
        x = 0.066 * body_side * person.build * pose.front + 0.03 * pose.side
        brush.polygon([(x - 0.014, 0.16), (x + 0.014, 0.16), (x + 0.014, 0.37), (x - 0.014, 0.37)], person.bag_colour)


def _shoulder_bag(brush: Brush, person: Person, pose: Pose) -> None:
    """Worn across the body from the left shoulder to the right hip."""
    hip = -0.12 * pose.front * person.build
    brush.polygon(
        [(-hip * 0.6, 0.16), (-hip * 0.6 + 0.02, 0.16), (hip + 0.01, 0.48), (hip - 0.01, 0.48)], person.bag_colour
    )
    if pose.side > -0.5:  # otherwise the body hides it
        brush.block((hip, 0.50), 0.06, 0.06, person.bag_colour)


def _hair_behind(brush: Brush, person: Person, pose: Pose) -> None:
    if pose.front > 0.2 and person.hair_style in ("long", "bob"):
        low = 0.23 if person.hair_style == "long" else 0.155
        brush.block((-0.02 * pose.side, (0.03 + low) / 2), 0.062, (low - 0.03) / 2, person.hair)


def _head(brush: Brush, person: Person, pose: Pose) -> None:
    side, front = pose.side, pose.front
    width = 0.046 + 0.008 * abs(side)
    brush.polygon([(-0.027, 0.11), (0.027, 0.11), (0.032, 0.165), (-0.032, 0.165)], shaded(person.skin, 0.82))
    if person.hair_style == "bald":
        brush.ellipse((0.0, 0.07), width, 0.068, person.skin)
    else:
        brush.ellipse((-0.008 * side, 0.066), width + 0.007, 0.068, person.hair)
        if front > -0.55:
            brush.ellipse((0.02 * side, 0.085), width * (0.8 + 0.1 * front), 0.052, person.skin)
    if front > 0.25:
        for eye in (-1, 1):
            brush.ellipse((0.02 * eye * front + 0.026 * side, 0.080), 0.0065, 0.005, (62, 46, 42))
        brush.ellipse((0.026 * side, 0.114), 0.013, 0.004, shaded(person.skin, 0.74))
    match person.hair_style:
        case "long" if front <= 0.2:
            brush.block((-0.03 * side, 0.14), 0.03 + 0.032 * abs(front), 0.10, person.hair)
        case "bob" if front <= 0.2:
            brush.block((-0.018 * side, 0.09), 0.036 + 0.022 * abs(front), 0.062, person.hair)
        case "ponytail" if front <= 0.5:
            brush.block((-0.06 * side, 0.13), 0.017, 0.08, person.hair)
        case "bun":
            brush.ellipse((-0.055 * side, 0.022 if front > 0 else 0.04), 0.027, 0.025, person.hair)
        case _:
            pass


def _hat(brush: Brush, person: Person, pose: Pose) -> None:
    if person.hat == "none":
        return
    brow = 0.058 if person.hat == "cap" else 0.066
    brush.dome((0.0, brow), 0.058, brow + 0.008, person.hat_colour)
    if person.hat == "cap" and pose.front > -0.4:
        brush.ellipse((0.045 * pose.side, brow), 0.04 + 0.012 * pose.front, 0.011, shaded(person.hat_colour, 0.75))


def _half_width(person: Person, pose: Pose, from_front: float, from_side: float) -> float:
    """Half the width of the turned trunk, whose cross-section is an ellipse."""
    return person.build * ((from_front * pose.front) ** 2 + (from_side * pose.side) ** 2) ** 0.5


def _between(start: Point, end: Point, share: float) -> Point:
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])
