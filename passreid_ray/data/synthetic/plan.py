"""Who is seen by which camera, and in which split; no pixels."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from passreid_ray.data.market1501 import FOLDERS
from passreid_ray.data.synthetic.config import SyntheticSource
from passreid_ray.data.synthetic.randomness import Stream, generator

MIN_IMAGES = 4
"""Fewest images of a person: two cameras, each with a query and a gallery image."""


@dataclass(frozen=True)
class Shot:
    """One image of one person by one camera; all three are counted from 1."""

    person: int
    camera: int
    image: int
    split: str

    @property
    def image_id(self) -> str:
        """Path in the Market-1501 layout: a written set has the same ids as the one that is drawn on the fly."""
        return f"{FOLDERS[self.split]}/{self.person:04d}_c{self.camera}s1_{self.image:06d}_00.jpg"


def shots(source: SyntheticSource) -> Iterator[Shot]:
    """All images of the set, person by person."""
    for person in range(1, source.num_people + 1):
        cameras = _camera_sequence(source, person, _num_images(source, person))
        seen: set[int] = set()
        for image, camera in enumerate(cameras, start=1):
            yield Shot(person, camera, image, _split(person, is_first_of_camera=camera not in seen))
            seen.add(camera)


def _num_images(source: SyntheticSource, person: int) -> int:
    if source.images == "uniform":
        return source.images_per_person
    # Size c / u with u uniform is Zipf's law in the ranks; u in [0.05, 1] has a mean of 1 / u of 3.153.
    u = generator(source.seed, Stream.NUM_IMAGES, person).uniform(0.05, 1.0)
    return max(MIN_IMAGES, round(source.images_per_person / 3.153 / u))


def _camera_sequence(source: SyntheticSource, person: int, num_images: int) -> list[int]:
    """Cameras of a person's images: a b a b c d c d ..., whatever the number of images.

    With four images or more, every camera's first image (the query) then has a later image by another camera.
    """
    order = generator(source.seed, Stream.CAMERA_ORDER, person).permutation(source.num_cameras)
    image = np.arange(num_images)
    return (order[(image // 4 * 2 + image % 2) % source.num_cameras] + 1).tolist()


def _split(person: int, is_first_of_camera: bool) -> str:
    if person % 2:
        return "train"
    return "query" if is_first_of_camera else "gallery"
