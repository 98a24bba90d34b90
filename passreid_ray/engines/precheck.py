"""Looking at the data before a cluster is started for it."""

import math
from collections.abc import Mapping

import numpy as np

from passreid_ray.data import BadImage, Rows
from passreid_ray.errors import UserError

NUM_PROBED = 64


def check_patches(patch_size: tuple[int, int], sizes_px: Mapping[str, tuple[int, int]]) -> None:
    """Raise ``UserError`` with the setting, among ``sizes_px``, whose image cannot be cut into whole patches."""
    for key, (height_px, width_px) in sizes_px.items():
        if height_px % patch_size[0] or width_px % patch_size[1]:
            fitting = [
                max(1, round(side / patch)) * patch
                for side, patch in zip((height_px, width_px), patch_size, strict=True)
            ]
            raise UserError(
                f"{key}: {height_px} x {width_px} pixels are not whole patches of {patch_size[0]} x {patch_size[1]}; "
                f"the nearest size that is: {fitting}"
            )


def check_readable(rows: Rows, max_bad_share: float) -> None:
    """Decode a few images spread over ``rows``; ``UserError`` when surely more than ``max_bad_share`` of all are bad.

    Single bad images are met later, while training, and quarantined.
    """
    numbers = np.linspace(0, len(rows) - 1, num=min(NUM_PROBED, len(rows)), dtype=int)
    bad: list[str] = []
    for number in numbers:
        try:
            rows.image(int(number))
        except BadImage as error:
            bad.append(f"{rows.image_ids[number]}: {error}")
    # A sample may hold more bad images than its share by chance: three standard deviations are none.
    chance = 3 * math.sqrt(len(numbers) * max_bad_share * (1 - max_bad_share)) if len(rows) > len(numbers) else 0.0
    if len(bad) > max(1, max_bad_share * len(numbers) + chance) or len(bad) == len(numbers):
        raise UserError(
            f"{len(bad)} of {len(numbers)} images looked at cannot be used, the first: {bad[0]}; more than "
            f"max_bad_share={max_bad_share:g} allows. Check the data's path, or raise max_bad_share"
        )
