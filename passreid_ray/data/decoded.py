"""From the encoded images of a stream to pixels on the device that trains; what cannot be used is replaced here."""

from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from passreid_ray.data.decode import BadImage
from passreid_ray.data.decode_batch import decode_batch
from passreid_ray.data.order import Order
from passreid_ray.data.rows import Rows
from passreid_ray.data.substitutes import BadImages, usable_image


@dataclass(frozen=True)
class Decoded:
    """One worker's slice of a global batch."""

    images: list[Tensor]
    """``(3, H, W)`` uint8 RGB, each of its own size, on the device that trains."""
    draws: list[int]
    image_ids: list[str]
    """Of the images that are used."""
    bad: BadImages
    """Images that are not used, and why."""


def decode_encoded(rows: Rows, order: Order, encoded: pa.Table, device: torch.device) -> Decoded:
    """Pixels of a batch of ``EncodedStream``; ``order`` says what takes the place of images that cannot be used."""
    images: list[Tensor] = []
    draws, image_ids = encoded["draw"].to_pylist(), encoded["image_id"].to_pylist()
    bad: BadImages = []
    for place, image in enumerate(decode_batch([data or b"" for data in encoded["image"].to_pylist()], device=device)):
        if isinstance(image, BadImage):
            reason = encoded["reason"][place].as_py() or image.reason
            image_HWC, used, own = usable_image(rows, order, draws[place], encoded["row"][place].as_py(), reason)
            image = torch.from_numpy(image_HWC).permute(2, 0, 1).to(device)
            image_ids[place] = str(rows.table["image_id"][used])
            draws[place] = ~draws[place]  # it may have its own turn in this epoch, with other views
            bad += own
        images.append(image)
    return Decoded(images, draws, image_ids, bad)
