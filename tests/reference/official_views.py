"""The reference's multi-crop as literal torchvision calls, with every random decision given by the caller.

PIL images are typed as ``Any``: torchvision takes them, its annotations know tensors only.
"""

from collections.abc import Sequence
from typing import Any

from PIL import ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import functional

F: Any = functional


def official_band(image: Any, part: int) -> Any:
    """The strip of part 0, 1 or 2, as main_pass.py of PASS-reID cuts it."""
    width, height = image.size
    top = (0, int(0.25 * height), int(0.5 * height))[part]
    return F.crop(image, top, 0, int(0.5 * height), width)


def official_view(
    image: Any,
    *,
    box: Sequence[int],
    size: tuple[int, int],
    flip: bool,
    jitter: tuple[Any, ...] | None,
    grey: bool,
    blur_radius: float | None,
    solarize: bool,
) -> Any:
    """RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale, GaussianBlur, Solarization."""
    top, left, height, width = box
    view = F.resized_crop(image, top, left, height, width, list(size), transforms.InterpolationMode.BICUBIC)
    if flip:
        view = F.hflip(view)
    if jitter is not None:
        order, brightness, contrast, saturation, hue = jitter
        for change in order:
            if change == 0:
                view = F.adjust_brightness(view, brightness)
            elif change == 1:
                view = F.adjust_contrast(view, contrast)
            elif change == 2:
                view = F.adjust_saturation(view, saturation)
            elif change == 3:
                view = F.adjust_hue(view, hue)
    if grey:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if blur_radius is not None:
        view = view.filter(ImageFilter.GaussianBlur(radius=blur_radius))
    if solarize:
        view = ImageOps.solarize(view)
    return view


def official_normalize(image: Any) -> Any:
    """ToTensor and Normalize with ImageNet's statistics."""
    steps = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return transforms.Compose(steps)(image)
