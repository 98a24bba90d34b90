"""Settings of the model, the prototype heads and the necks, and how they become modules."""

from typing import Literal

from pydantic import Field

from passreid_ray.config import Section
from passreid_ray.models.part_vit import PartViT, Stem
from passreid_ray.models.pass_model import PassModel
from passreid_ray.models.patch_head import PatchHead
from passreid_ray.models.prototype_head import PrototypeHead
from passreid_ray.models.reid_model import Neck, NeckFusion, ReidModel

TIMM_WEIGHT_INIT = {"official": "", "xavier": "jax"}


class ModelConfig(Section):
    """A part-token ViT."""

    trunk: str = "vit_small_patch16_224"
    """Name of a timm ViT."""
    embed_dim: int | None = Field(default=None, ge=1)
    """Feature width D; none: the trunk's own."""
    depth: int | None = Field(default=None, ge=1)
    """Number of blocks; none: the trunk's own."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads per block; none: the trunk's own."""
    patch_size: int | None = Field(default=None, ge=1)
    """Side of a patch in pixels; none: the trunk's own."""
    stem: Stem = "patch"
    """Patch projection, or the IBN convolutional stem of TransReID-SSL."""
    stem_channels: int = Field(default=64, ge=2)
    """Width of the convolutional stem."""
    weight_init: Literal["official", "xavier"] = "official"
    """Initial weights of linear layers: truncated normal of deviation 0.02 (PASS), or Xavier uniform, which lets
    narrow models learn from fewer images."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the last block of the student; it grows linearly from 0 at the first."""
    official_pos_resize: bool = False
    """Resample positions at every size as the reference's pre-training does; for parity only."""

    def build(self, image_size: tuple[int, int], num_parts: int, *, drop_path: float | None = None) -> PartViT:
        """A randomly initialised model for ``image_size`` (height, width in pixels) and ``num_parts`` part tokens."""
        names = ("embed_dim", "depth", "num_heads", "patch_size")
        sizes = {name: value for name in names if (value := getattr(self, name)) is not None}
        return PartViT(
            self.trunk,
            image_size=image_size,
            num_parts=num_parts,
            stem=self.stem,
            stem_channels=self.stem_channels,
            drop_path=self.drop_path if drop_path is None else drop_path,
            official_pos_resize=self.official_pos_resize,
            weight_init=TIMM_WEIGHT_INIT[self.weight_init],
            **sizes,
        )


class HeadConfig(Section):
    """The prototype heads, one per token."""

    num_prototypes: int = Field(default=65536, ge=2)
    """K, output directions per token."""
    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the two hidden layers."""
    bottleneck_dim: int = Field(default=256, ge=1)
    """Width of the normalised vector that is compared with the prototypes."""
    norm_last_layer: bool = True
    """Keep every prototype at length 1."""
    batch_norm: bool = False
    """Batch norm in the hidden layers; PASS has none."""

    def build(self, in_dim: int, num_tokens: int) -> PrototypeHead:
        """Randomly initialised heads for ``num_tokens`` tokens of width ``in_dim``."""
        return PrototypeHead(
            in_dim,
            self.num_prototypes,
            hidden_dim=self.hidden_dim,
            bottleneck_dim=self.bottleneck_dim,
            num_tokens=num_tokens,
            norm_last_layer=self.norm_last_layer,
            batch_norm=self.batch_norm,
        )

    def build_for_patches(self, in_dim: int, num_prototypes: int) -> PatchHead:
        """A randomly initialised head of these sizes, but with ``num_prototypes``, for patches of width ``in_dim``.

        It has no batch norm: a worker may have no masked patch, and a micro-batch of all workers too.
        """
        sizes = self.model_copy(update={"num_prototypes": num_prototypes, "batch_norm": False})
        return PatchHead(in_dim, sizes.build(in_dim, 1))


class NeckConfig(Section):
    """How the tokens of an image become the feature that is tuned."""

    fusion: NeckFusion = "cat"
    """CLS and the mean of the part tokens side by side, width 2D (cat), or the mean of these two, width D (mean)."""
    neck: Neck = "single"
    """One batch norm after the tokens are fused (single), or one per token before (multi)."""

    def build(self, backbone: PartViT) -> ReidModel:
        """``backbone`` with fresh necks."""
        return ReidModel(backbone, fusion=self.fusion, neck=self.neck)


def build_pass_model(
    model: ModelConfig,
    head: HeadConfig,
    image_size: tuple[int, int],
    num_parts: int,
    *,
    patch_prototypes: int | None = None,
    is_teacher: bool = False,
) -> PassModel:
    """A student, or a teacher: the same without stochastic depth. With ``patch_prototypes`` it has a patch head."""
    backbone = model.build(image_size, num_parts, drop_path=0.0 if is_teacher else None)
    heads = head.build(backbone.width, 1 + num_parts)
    patches = None if patch_prototypes is None else head.build_for_patches(backbone.width, patch_prototypes)
    return PassModel(backbone, heads, patches)
