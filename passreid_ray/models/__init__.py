"""Part-token ViT composed on timm, its stems and prototype heads, and the checkpoint formats they are read from."""

from passreid_ray.models.formats import LoadReport, load_backbone, official_state_dict
from passreid_ray.models.part_vit import PartViT
from passreid_ray.models.pretrain_checkpoint import PretrainCheckpoint, pretrain_checkpoint, read_pretrain_checkpoint
from passreid_ray.models.prototype_head import PrototypeHead, load_heads, official_head_state_dict
from passreid_ray.models.safe_load import read_state
from passreid_ray.models.timm_weights import load_timm_weights

__all__ = [
    "LoadReport",
    "PartViT",
    "PretrainCheckpoint",
    "PrototypeHead",
    "load_backbone",
    "load_heads",
    "load_timm_weights",
    "official_head_state_dict",
    "official_state_dict",
    "pretrain_checkpoint",
    "read_pretrain_checkpoint",
    "read_state",
]
