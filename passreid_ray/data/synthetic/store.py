"""Synthetic people as rows and as an image store."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from passreid_ray.data.decode import BadImage
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
        person, image, camera = map(int, locator.split(":"))
        file = BytesIO()
        Image.fromarray(render(self.source, person, image, camera)).save(file, "JPEG", quality=JPEG_QUALITY)
        return file.getvalue()

    def read_many(self, locators: Sequence[str]) -> list[bytes | BadImage]:
        return [self.read(locator) for locator in locators]

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
