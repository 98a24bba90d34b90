"""What takes the place of an image that cannot be used, so that batches keep their size."""

import numpy as np

from passreid_ray.data.decode import BadImage
from passreid_ray.data.order import Order
from passreid_ray.data.rows import Rows
from passreid_ray.errors import UserError

MAX_SUBSTITUTES = 100

BadImages = list[tuple[str, str]]
"""(image_id, reason) of images that cannot be used."""


def usable_image(
    rows: Rows, order: Order, draw: int, number: int, reason: str | None = None
) -> tuple[np.ndarray, int, BadImages]:
    """Pixels of row ``number`` or of the first row after it, by the order, that can be used; its number; those before.

    With a ``reason`` the row itself is known to be bad. Raises ``UserError`` after too many bad ones in a row.
    """
    bad: BadImages = [] if reason is None else [(str(rows.table["image_id"][number]), reason)]
    for attempt in range(len(bad), min(MAX_SUBSTITUTES, order.num_rows)):
        candidate = order.substitute(draw, number, attempt) if attempt else number
        try:
            return rows.image(candidate), candidate, bad
        except BadImage as error:
            bad.append((str(rows.table["image_id"][candidate]), error.reason))
    image_id, reason = bad[0]
    raise UserError(f"data: {len(bad)} images in a row cannot be used, the first: {image_id}: {reason}")
