"""Procedural people for running every job without a download."""

from passreid_ray.data.synthetic.config import SyntheticSource
from passreid_ray.data.synthetic.store import SyntheticStore, synthetic_rows

__all__ = ["SyntheticSource", "SyntheticStore", "synthetic_rows"]
