"""One concept per file, tensors in, scalar out; side effects (centers, memory) are separate visible calls."""

from passreid_ray.losses.centers import updated_centers
from passreid_ray.losses.diagnostics import DistillationDiagnostics, collapse, distillation_diagnostics, feature_spread
from passreid_ray.losses.part_distillation import mean_over_pairs, part_distillation_loss, part_distillation_terms

__all__ = [
    "DistillationDiagnostics",
    "collapse",
    "distillation_diagnostics",
    "feature_spread",
    "mean_over_pairs",
    "part_distillation_loss",
    "part_distillation_terms",
    "updated_centers",
]
