"""Pixels -> views: part-aware multi-crop, views of training and evaluation. Pure: the generator is an argument."""

from passreid_ray.views.config import PixelStatistics, ViewsConfig
from passreid_ray.views.evaluation import evaluation_pixels, evaluation_view
from passreid_ray.views.part_views import PartViews
from passreid_ray.views.pixels import normalize
from passreid_ray.views.seeding import view_rng
from passreid_ray.views.training_view import TrainingView, TrainingViewConfig
from passreid_ray.views.undistorted_view import (
    UndistortedView,
    UndistortedViewConfig,
    crop_to_grids,
    undistorted_pixels,
)

__all__ = [
    "PartViews",
    "PixelStatistics",
    "TrainingView",
    "TrainingViewConfig",
    "UndistortedView",
    "UndistortedViewConfig",
    "ViewsConfig",
    "crop_to_grids",
    "evaluation_pixels",
    "evaluation_view",
    "normalize",
    "undistorted_pixels",
    "view_rng",
]
