"""Encoded images of a batch -> pixels, on the device that trains: plain JPEG by torchvision, the rest one by one."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from passreid_ray.data.decode import MAX_IMAGE_BYTES, MIN_SIDE_PX, BadImage, decode_image

_MAX_PLAIN_PIXELS = 4_000_000
"""Larger images are left to ``decode_image``, whose own limit refuses a bomb; it also bounds a batch on the device."""


def decode_batch(encoded: Sequence[bytes], *, device: torch.device) -> list[Tensor | BadImage]:
    """Pixels of encoded images, in their order: uint8 RGB ``(3, H, W)`` on ``device``, or why there are none.

    On the CPU the pixels and the reasons are those of ``decode_image``. On CUDA nvJPEG decodes plain JPEG: it rounds
    and upsamples colour in its own way, so pixels may differ by some grey levels, and damage inside a file that is
    complete can look different. The tensors may be views of pixels stored as ``(H, W, 3)``.
    """
    if device.type == "cuda":
        return _decode_on_cuda(encoded, device)
    pixels = decode_arrays(encoded)
    return [each if isinstance(each, BadImage) else _to_tensor(each).to(device) for each in pixels]


def decode_arrays(encoded: Sequence[bytes]) -> list[np.ndarray | BadImage]:
    """Pixels of encoded images, in their order: uint8 RGB ``(H, W, 3)``, or why there are none; as ``decode_image``.

    Both decoders release the GIL: a thread more is nearly as good as a process more.
    """
    return [_decode_array(data) for data in encoded]


def _decode_array(data: bytes) -> np.ndarray | BadImage:
    if is_plain_jpeg(data):
        try:
            (pixels,) = _decode_jpegs([data], torch.device("cpu"))
            return pixels.permute(1, 2, 0).numpy()
        except RuntimeError:
            pass  # damaged: decode_image says in which way
    try:
        return decode_image(data)
    except BadImage as bad:
        return bad


def _decode_on_cuda(encoded: Sequence[bytes], device: torch.device) -> list[Tensor | BadImage]:
    # A truncated file lacks the end marker; nvJPEG would fill up what is missing and say nothing.
    plain = [index for index, data in enumerate(encoded) if data.endswith(b"\xff\xd9") and is_plain_jpeg(data)]
    on_device = dict(zip(plain, _decode_plain_on_cuda([encoded[index] for index in plain], device), strict=True))
    decoded: list[Tensor | BadImage] = []
    for index, data in enumerate(encoded):
        pixels = on_device.get(index)
        if pixels is None:
            array = _decode_array(data)
            pixels = array if isinstance(array, BadImage) else _to_tensor(array).to(device, non_blocking=True)
        decoded.append(pixels)
    return decoded


def _decode_plain_on_cuda(encoded: list[bytes], device: torch.device) -> list[Tensor] | list[Tensor | None]:
    """None in place of what nvJPEG does not decode."""
    if not encoded:
        return []
    try:
        return _decode_jpegs(encoded, device)
    except RuntimeError:
        if len(encoded) == 1:
            return [None]
        return [_decode_plain_on_cuda([data], device)[0] for data in encoded]  # one bad file fails the whole call


def _decode_jpegs(encoded: list[bytes], device: torch.device) -> list[Tensor]:
    # Each is copied into a bytearray because torch warns about memory that cannot be written to.
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded]
    return list(decode_jpeg(files, mode=ImageReadMode.RGB, device=device))


def _to_tensor(pixels_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def is_plain_jpeg(data: bytes) -> bool:
    """Whether a JPEG's header holds nothing that needs care, so that any decoder agrees on what the image is.

    Plain is: Huffman coded, 8 bits, 1 or 3 components, no marker but JFIF's and comments (so no EXIF orientation and no
    Adobe colours), sides from ``MIN_SIDE_PX`` and at most 4 million pixels, and at most ``MAX_IMAGE_BYTES``. Nothing is
    decoded and nothing raised.
    """
    if data[:2] != b"\xff\xd8" or len(data) > MAX_IMAGE_BYTES:
        return False
    position, has_frame = 2, False
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        length = int.from_bytes(data[position + 2 : position + 4])
        segment = data[position + 4 : position + 2 + length]
        if len(segment) != length - 2:
            return False
        match marker:
            case 0xC0 | 0xC1 | 0xC2 if not has_frame and _is_plain_frame(segment):  # baseline, extended, progressive
                has_frame = True
            case 0xE0 if len(segment) >= 14 and segment[:5] == b"JFIF\0":
                pass
            case 0xC4 | 0xDB | 0xDD | 0xFE:  # Huffman tables, quantisation tables, restart interval, comment
                pass
            case 0xDA:  # start of scan: the header ends
                return has_frame
            case _:
                return False
        position += 2 + length
    return False


def _is_plain_frame(segment: bytes) -> bool:
    if len(segment) < 6:
        return False
    bits, num_components = segment[0], segment[5]
    height, width = int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5])
    return (
        bits == 8
        and num_components in (1, 3)
        and len(segment) == 6 + 3 * num_components
        and min(height, width) >= MIN_SIDE_PX
        and height * width <= _MAX_PLAIN_PIXELS
    )
