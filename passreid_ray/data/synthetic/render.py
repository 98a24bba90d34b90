"""One synthetic crop: a person in front of a scene, seen through a camera and cut out by a detector."""

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from passreid_ray.data.synthetic.cameras import Camera, camera_of
from passreid_ray.data.synthetic.config import SyntheticSource
from passreid_ray.data.synthetic.figure import draw_person
from passreid_ray.data.synthetic.people import Person, person_of
from passreid_ray.data.synthetic.pose import Place, sample_pose
from passreid_ray.data.synthetic.randomness import Stream, generator
from passreid_ray.data.synthetic.scene import background

_OVERSAMPLING = 2
"""The canvas has this many pixels per output pixel and direction, which smooths the edges."""

_NUM_PASSERS_BY = 40


def render(source: SyntheticSource, person: int, image: int, camera: int) -> np.ndarray:
    """Image number ``image`` of a person by a camera: ``(H, W, 3)`` uint8 RGB.

    Depends on the seed, the size and the three numbers only: never on how many people or images there are.
    """
    rng = generator(source.seed, Stream.SHOT, person, image, camera)
    view = camera_of(source.seed, camera)
    size = (source.width_px * _OVERSAMPLING, source.height_px * _OVERSAMPLING)
    canvas = background(source.seed, camera, view.elevation, size, rng)
    daylight = rng.uniform(0.45, 1.5) * np.exp(rng.normal(0, 0.10, 3))
    canvas = canvas.point((np.arange(256) * daylight[:, None]).clip(0, 255).astype(np.uint8).ravel().tolist())
    if rng.random() < 0.25:
        _passer_by(canvas, source.seed, view, rng, behind=True)
    _stand(canvas, person_of(source.seed, person), view, rng)
    if rng.random() < view.occlusion:
        _occlude(canvas, source.seed, view, rng)
    return _through_camera(canvas, view, (source.width_px, source.height_px), rng)


def _stand(canvas: Image.Image, person: Person, view: Camera, rng: np.random.Generator) -> None:
    """The person of the crop, as well centred as the camera's detector does it."""
    width, height = canvas.size
    off_x, off_top, off_bottom = rng.normal(0, view.misalignment, 3).tolist()
    # Boxes follow the head and the feet, so that stature shows only a little.
    top = height * (0.035 + off_top + 0.25 * (0.94 - person.stature))
    bottom = height * (0.98 + off_bottom)
    place = Place(width * (0.5 + 1.4 * off_x), top, bottom - top, view.elevation)
    _draw_lit(canvas, person, place, view, rng)


def _passer_by(canvas: Image.Image, seed: int, view: Camera, rng: np.random.Generator, *, behind: bool) -> None:
    """Somebody else at the edge of the crop, further away or nearer than the person."""
    width, height = canvas.size
    passer_by = person_of(seed, -int(rng.integers(1, _NUM_PASSERS_BY + 1)))
    centre = width * (rng.uniform(0.0, 0.2) if rng.random() < 0.5 else rng.uniform(0.8, 1.0))
    scale = rng.uniform(0.55, 0.85) if behind else rng.uniform(0.95, 1.15)
    bottom = height * (rng.uniform(0.75, 0.92) if behind else rng.uniform(1.0, 1.1))
    _draw_lit(canvas, passer_by, Place(centre, bottom - scale * height, scale * height, view.elevation), view, rng)


def _draw_lit(canvas: Image.Image, person: Person, place: Place, view: Camera, rng: np.random.Generator) -> None:
    feet, radius = place((0.0, 0.985)), 0.17 * place.height_px
    ImageDraw.Draw(canvas).ellipse(
        (feet[0] - radius, feet[1] - radius / 7, feet[0] + radius, feet[1] + radius / 7), (58, 58, 60)
    )
    silhouette = draw_person(canvas, person, sample_pose(rng, view.facing, view.facing_spread), place)
    # The side away from the light lies in shadow: what the silhouette, pushed towards the light, no longer covers.
    push = int(0.05 * place.height_px) * view.light_side
    dark_side = ImageChops.subtract(silhouette, ImageChops.offset(silhouette, push, 0))
    dark_side = dark_side.filter(ImageFilter.BoxBlur(0.012 * place.height_px))
    canvas.paste((0, 0, 0), mask=dark_side.point([int(value * view.shadow) for value in range(256)]))


def _occlude(canvas: Image.Image, seed: int, view: Camera, rng: np.random.Generator) -> None:
    width, height = canvas.size
    draw = ImageDraw.Draw(canvas)
    grey = int(rng.integers(40, 190))
    match int(rng.integers(3)):
        case 0:
            _passer_by(canvas, seed, view, rng, behind=False)
        case 1:  # a pole
            x, half = width * rng.uniform(0.15, 0.85), width * rng.uniform(0.04, 0.09)
            draw.rectangle((x - half, 0, x + half, height), fill=(grey, grey, grey))
            draw.rectangle((x, 0, x + half, height), fill=(grey * 3 // 4, grey * 3 // 4, grey * 3 // 4))
        case _:  # a wall, a hedge or a car in front of the legs
            colour = tuple(int(value) for value in np.clip(grey + rng.normal(0, 25, 3), 0, 255))
            left = width * rng.uniform(-0.8, 0.5)
            box = (left, height * rng.uniform(0.6, 0.85), left + width * rng.uniform(0.6, 1.6), height * 1.1)
            draw.rounded_rectangle(box, height * 0.03, fill=colour)


def _through_camera(canvas: Image.Image, view: Camera, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Optics, white balance, exposure and sensor noise."""
    width, height = size
    sharpness = view.sharpness * rng.uniform(0.85, 1.0)
    seen = (max(8, round(width * sharpness)), max(8, round(height * sharpness)))
    image = canvas.resize(seen, Image.Resampling.BOX).resize(size, Image.Resampling.BILINEAR)
    image = image.convert("RGB", view.colour_matrix)
    exposure = view.brightness + rng.normal(0, 4)
    curve = 255 * np.linspace(0, 1, 256) ** view.gamma
    curve = (curve - 128) * view.contrast + 128 + exposure
    image = image.point(np.tile(curve.clip(0, 255).astype(np.uint8), 3).tolist())
    noise_HW = rng.standard_normal((height, width), np.float32) * np.float32(view.noise)
    return (np.asarray(image) + noise_HW[..., None]).clip(0, 255).astype(np.uint8)
