"""Pixels -> views: part-aware multi-crop, the training and the evaluation view. Pure: the generator is an argument."""

from passreid_ray.views.config import PixelStatistics, ViewsConfig
from passreid_ray.views.evaluation import evaluation_pixels, evaluation_view
from passreid_ray.views.part_views import PartViews
from passreid_ray.views.pixels import normalize
from passreid_ray.views.seeding import view_rng
from passreid_ray.views.training_view import TrainingView, TrainingViewConfig

__all__ = [
    "PartViews",
    "PixelStatistics",
    "TrainingView",
    "TrainingViewConfig",
    "ViewsConfig",
    "evaluation_pixels",
    "evaluation_view",
    "normalize",
    "view_rng",
]
