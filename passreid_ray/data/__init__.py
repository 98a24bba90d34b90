"""Where rows come from: row schema, sources, decoding, synthetic people."""

from passreid_ray.data.decode import BadImage, decode_image
from passreid_ray.data.rows import JUNK_PERSON_ID, Rows
from passreid_ray.data.sources import JoinedSource, Source, open_rows
from passreid_ray.data.synthetic import SyntheticSource

__all__ = [
    "JUNK_PERSON_ID",
    "BadImage",
    "JoinedSource",
    "Rows",
    "Source",
    "SyntheticSource",
    "decode_image",
    "open_rows",
]
