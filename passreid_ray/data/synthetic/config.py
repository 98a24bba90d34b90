"""Settings of the synthetic people."""

from typing import Literal

from pydantic import Field

from passreid_ray.config import Section


class SyntheticSource(Section):
    """Procedural people seen by several cameras; everything follows from the seed and nothing is stored."""

    kind: Literal["synthetic"] = "synthetic"
    seed: int = Field(default=0, ge=0)
    """Another seed is another set of people and cameras."""
    num_people: int = Field(default=100, ge=2)
    """Identities; every second one is for training, the others for testing."""
    num_cameras: int = Field(default=6, ge=2, le=99)
    """Cameras, each with its own scene, viewpoint, colours and sharpness."""
    images_per_person: int = Field(default=12, ge=4)
    """Images of each identity, or their mean when ``images`` is zipf."""
    images: Literal["uniform", "zipf"] = "uniform"
    """uniform: the same number for everybody; zipf: a few people have very many images and most have few."""
    height_px: int = Field(default=128, ge=32)
    """Height of a crop."""
    width_px: int = Field(default=64, ge=16)
    """Width of a crop."""
    splits: list[Literal["train", "query", "gallery"]] | None = None
    """Keep only the rows of these splits; unset keeps all."""
