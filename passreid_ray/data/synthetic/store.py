"""Synthetic people as rows and as an image store."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from passreid_ray.data.rows import Rows, make_rows
from passreid_ray.data.synthetic.config import SyntheticSource
from passreid_ray.data.synthetic.plan import shots
from passreid_ray.data.synthetic.render import render

JPEG_QUALITY = 92


@dataclass(frozen=True)
class SyntheticStore:
    """Draws an image when it is asked for; a locator is ``person:image:camera``."""

    source: SyntheticSource

    def read(self, locator: str) -> bytes:
        file = BytesIO()
        Image.fromarray(self.pixels(locator)).save(file, "JPEG", quality=JPEG_QUALITY)
        return file.getvalue()

    def pixels(self, locator: str) -> np.ndarray:
        person, image, camera = map(int, locator.split(":"))
        return render(self.source, person, image, camera)

    def identity(self) -> str:
        return f"synthetic seed={self.source.seed} size={self.source.height_px}x{self.source.width_px}"


def synthetic_rows(source: SyntheticSource) -> Rows:
    """Rows of a synthetic set; image ids are the paths of the Market-1501 layout that ``jobs/synthesize.py`` writes."""
    plan = list(shots(source))
    rows = make_rows(
        SyntheticStore(source),
        [f"{shot.person}:{shot.image}:{shot.camera}" for shot in plan],
        where="synthetic people",
        image_ids=[shot.image_id for shot in plan],
        person_ids=[f"{shot.person:04d}" for shot in plan],
        camera_ids=[str(shot.camera) for shot in plan],
        splits=[shot.split for shot in plan],
    )
    return rows if source.splits is None else rows.with_split(*source.splits, where="synthetic people")
