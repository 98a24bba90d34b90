"""One concept per file, tensors in, scalar out; side effects (centers, memory) are separate visible calls."""

from passreid_ray.losses.centers import updated_centers
from passreid_ray.losses.cluster_memory import ClusterMemory, MemoryUpdate, Negatives
from passreid_ray.losses.diagnostics import DistillationDiagnostics, collapse, distillation_diagnostics, feature_spread
from passreid_ray.losses.koleo import koleo_loss
from passreid_ray.losses.part_distillation import mean_over_pairs, part_distillation_loss, part_distillation_terms
from passreid_ray.losses.targets import centered_targets, sinkhorn_targets

__all__ = [
    "ClusterMemory",
    "DistillationDiagnostics",
    "MemoryUpdate",
    "Negatives",
    "centered_targets",
    "collapse",
    "distillation_diagnostics",
    "feature_spread",
    "koleo_loss",
    "mean_over_pairs",
    "part_distillation_loss",
    "part_distillation_terms",
    "sinkhorn_targets",
    "updated_centers",
]
