"""Golden files of the reference model, and our model built from them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from passreid_ray.models import PartViT, PrototypeHead

GOLDEN = Path(__file__).parents[1] / "golden"
FORWARD_FILES = ("pass_forward_64x32", "pass_forward_256x128", "pass_forward_wn_64x32")
TOKENS = ("cls", "pt1", "pt2", "pt3")

_MEAN_C11 = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD_C11 = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Golden:
    """One ``.npz`` file."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays["meta"]))

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def state(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}

    def global_views(self) -> Tensor:
        return torch.cat([_normalised(self["crop_u8/00"]), _normalised(self["crop_u8/01"])])

    def local_views(self) -> Iterator[Tensor]:
        """The three local views of each part, view by view."""
        for part in range(3):
            yield torch.cat([_normalised(self[f"crop_u8/{2 + 3 * part + view:02d}"]) for view in range(3)])


def tiny_vit(width: int = 48, image_size: tuple[int, int] = (64, 32), **settings: Any) -> PartViT:
    settings = {"depth": 2, "num_heads": 3, **settings}
    return PartViT("vit_tiny_patch16_224", image_size=image_size, embed_dim=width, **settings)


def golden_vit(golden: Golden, prefix: str) -> PartViT:
    meta = golden.meta
    model = tiny_vit(meta["embed_dim"], tuple(meta["img_size"]), depth=meta["depth"], official_pos_resize=True)
    model.load_state_dict(golden.state(f"{prefix}backbone."))
    return model


def golden_head(golden: Golden, prefix: str) -> PrototypeHead:
    meta = golden.meta
    head = PrototypeHead(meta["embed_dim"], meta["out_dim"], meta["head_hidden"], meta["bottleneck"])
    head.load_state_dict(golden.state(f"{prefix}head."))
    return head


def largest_difference(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return (ours.detach() - reference).abs().max().item()


def _normalised(images_u8: Tensor) -> Tensor:
    return (images_u8.float() / 255 - _MEAN_C11) / _STD_C11
