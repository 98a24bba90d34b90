"""Pixels -> views: part-aware multi-crop, views of training and evaluation. Pure: the generator is an argument."""

from passreid_ray.views.batch_views import BatchViews
from passreid_ray.views.config import PixelStatistics, ViewsConfig
from passreid_ray.views.device_views import views_on_device
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
from passreid_ray.views.view_draws import ViewDraws, draw_views

__all__ = [
    "BatchViews",
    "PartViews",
    "PixelStatistics",
    "TrainingView",
    "TrainingViewConfig",
    "UndistortedView",
    "UndistortedViewConfig",
    "ViewDraws",
    "ViewsConfig",
    "crop_to_grids",
    "draw_views",
    "evaluation_pixels",
    "evaluation_view",
    "normalize",
    "undistorted_pixels",
    "view_rng",
    "views_on_device",
]
