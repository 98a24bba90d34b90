"""From encoded images to the views of PASS, in threads of the training worker while it trains."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from passreid_ray.config import Section
from passreid_ray.data.decoded import Decoded, decode_encoded
from passreid_ray.data.order import Order
from passreid_ray.data.read_ahead import made_ahead
from passreid_ray.data.rows import Rows
from passreid_ray.data.substitutes import BadImages
from passreid_ray.views import BatchViews, ViewsConfig, draw_views, view_rng, views_on_device


class LoaderConfig(Section):
    """How a training worker makes its views."""

    threads: int = Field(default=1, ge=1)
    """Threads that decode images and make views while the worker trains; each works on a batch of its own."""


@dataclass(frozen=True)
class ViewBatch:
    """The views of one worker's slice of a global batch, uint8, on its device."""

    global_BGCHW: Tensor
    local_BPLCHW: Tensor
    bad: BadImages
    """Images that could not be used; others have taken their place."""


@dataclass(frozen=True)
class ViewMaker:
    """Turns batches of an ``EncodedStream`` into views: with numba on the CPU, with tensor operations on a GPU."""

    rows: Rows
    order: Order
    config: ViewsConfig
    seed: int
    device: torch.device

    def batches(self, encoded: Iterator[pa.Table], threads: int) -> Iterator[ViewBatch]:
        """Views of every batch, in order, made ahead by ``threads`` threads."""
        return made_ahead(self, encoded, threads)

    def __call__(self, encoded: pa.Table) -> ViewBatch:
        """Views of one batch: a function of the seed, the draw and the image alone."""
        if self.device.type == "cpu":
            return self._make(encoded)
        stream = _side_stream(self.device)
        with torch.cuda.stream(stream):
            batch = self._make(encoded)
        stream.synchronize()
        for views in (batch.global_BGCHW, batch.local_BPLCHW):
            views.record_stream(torch.cuda.default_stream(self.device))  # else their memory is taken again too early
        return batch

    def _make(self, encoded: pa.Table) -> ViewBatch:
        decoded = decode_encoded(self.rows, self.order, encoded, self.device)
        rngs = [view_rng(self.seed, *key) for key in zip(decoded.draws, decoded.image_ids, strict=True)]
        return ViewBatch(*self._views(decoded, rngs), decoded.bad)

    def _views(self, decoded: Decoded, rngs: list[np.random.Generator]) -> tuple[Tensor, Tensor]:
        if self.device.type == "cpu":
            views = BatchViews(self.config).pixels([image.permute(1, 2, 0).numpy() for image in decoded.images], rngs)
            return torch.from_numpy(views["global_views"]), torch.from_numpy(views["local_views"])
        sizes = [tuple(image.shape[1:]) for image in decoded.images]
        return views_on_device(decoded.images, draw_views(self.config, sizes, rngs), self.config)


_own = threading.local()


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's own stream, on which views are made while the step computes."""
    # One for good: the allocator keeps the memory of every stream apart.
    if not hasattr(_own, "stream"):
        _own.stream = torch.cuda.Stream(device)
    return _own.stream
