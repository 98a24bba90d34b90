"""Part-token ViT composed on timm, its stems, heads and necks, and the checkpoint formats they are read from."""

from passreid_ray.models.formats import LoadReport, load_backbone, official_state_dict
from passreid_ray.models.neighbour_refiner import NeighbourRefiner, refine_features
from passreid_ray.models.part_vit import PartViT
from passreid_ray.models.pretrain_checkpoint import PretrainCheckpoint, pretrain_checkpoint, read_pretrain_checkpoint
from passreid_ray.models.prototype_head import PrototypeHead, load_heads, official_head_state_dict
from passreid_ray.models.reid_formats import (
    classifier_of,
    load_reid_model,
    official_supervised_state_dict,
    official_usl_state_dict,
)
from passreid_ray.models.reid_model import ReidFeatures, ReidModel
from passreid_ray.models.reid_shape import ReidShape, infer_reid_shape
from passreid_ray.models.safe_load import read_state
from passreid_ray.models.timm_weights import load_timm_weights

__all__ = [
    "LoadReport",
    "NeighbourRefiner",
    "PartViT",
    "PretrainCheckpoint",
    "PrototypeHead",
    "ReidFeatures",
    "ReidModel",
    "ReidShape",
    "classifier_of",
    "infer_reid_shape",
    "load_backbone",
    "load_heads",
    "load_reid_model",
    "load_timm_weights",
    "official_head_state_dict",
    "official_state_dict",
    "official_supervised_state_dict",
    "official_usl_state_dict",
    "pretrain_checkpoint",
    "read_pretrain_checkpoint",
    "read_state",
    "refine_features",
]
