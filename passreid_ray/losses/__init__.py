"""One concept per file, tensors in, scalar out; side effects (centers, memory) are separate visible calls."""

from passreid_ray.losses.am_softmax import am_softmax_loss
from passreid_ray.losses.arcface import arcface_loss, updated_curriculum
from passreid_ray.losses.average_k import average_k_labels, average_k_loss, average_k_threshold
from passreid_ray.losses.centers import updated_centers
from passreid_ray.losses.circle import circle_loss
from passreid_ray.losses.class_centers import ClassCenters
from passreid_ray.losses.cluster_memory import ClusterMemory, MemoryUpdate, Negatives
from passreid_ray.losses.cosface import cosface_loss
from passreid_ray.losses.diagnostics import DistillationDiagnostics, collapse, distillation_diagnostics, feature_spread
from passreid_ray.losses.identity import identity_loss
from passreid_ray.losses.koleo import koleo_loss
from passreid_ray.losses.masked_patches import masked_patch_entropy, masked_patch_loss
from passreid_ray.losses.mined_triplets import ranking_loss
from passreid_ray.losses.part_distillation import mean_over_pairs, part_distillation_loss, part_distillation_terms
from passreid_ray.losses.prototype_distillation import prototype_cross_entropy
from passreid_ray.losses.sparse_pairwise import SparsePositive, sparse_pairwise_loss
from passreid_ray.losses.targets import become_centered_targets, centered_targets, sinkhorn_targets
from passreid_ray.losses.triplet import TripletDistance, triplet_loss

__all__ = [
    "ClassCenters",
    "ClusterMemory",
    "DistillationDiagnostics",
    "MemoryUpdate",
    "Negatives",
    "SparsePositive",
    "TripletDistance",
    "am_softmax_loss",
    "arcface_loss",
    "average_k_labels",
    "average_k_loss",
    "average_k_threshold",
    "become_centered_targets",
    "centered_targets",
    "circle_loss",
    "collapse",
    "cosface_loss",
    "distillation_diagnostics",
    "feature_spread",
    "identity_loss",
    "koleo_loss",
    "masked_patch_entropy",
    "masked_patch_loss",
    "mean_over_pairs",
    "part_distillation_loss",
    "part_distillation_terms",
    "prototype_cross_entropy",
    "ranking_loss",
    "sinkhorn_targets",
    "sparse_pairwise_loss",
    "triplet_loss",
    "updated_centers",
    "updated_curriculum",
]
