"""The second stage of the ranking recipe: its settings, and the Ray actor that mines hard triplets for it.

Source: Almazan et al., Re-ID done right (arXiv:1801.05339): identity classification first, then a ranking loss on mined
triplets.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn
from torch.optim import SGD, Optimizer

from passreid_ray import distributed
from passreid_ray.config import Section
from passreid_ray.data import Rows
from passreid_ray.engines.embedding import ImageInput, TunedFeatures, embed_numbers
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.errors import UserError
from passreid_ray.models import ReidModel
from passreid_ray.retrieval.hard_triplets import mine_triplets
from passreid_ray.train.pulse import MINING, pulse

_MINER_KEY = 2


class RankingConfig(Section):
    """The ranking loss on mined triplets, after the epochs of the other losses."""

    steps: int = Field(default=0, ge=0)
    """Steps; 0: none."""
    triplets_per_step: int = Field(default=64, ge=1)
    """Triplets of a step, over all workers together: three times as many images."""
    micro_batches: int = Field(default=1, ge=1)
    """Gradient accumulation: parts in which each worker computes its triplets, to save memory."""
    margin: float = Field(default=0.1, ge=0)
    """Of squared distances of L2-normalised features."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of SGD at the first step."""
    halve_every_steps: int = Field(default=512, ge=1)
    """Steps after which the learning rate is halved."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD."""
    weight_decay: float = Field(default=5e-5, ge=0)
    """Weight decay of all parameters."""
    refresh_steps: int = Field(default=16, ge=1)
    """Steps that learn from one mining: triplets are never older than this."""
    pool_size: int = Field(default=5000, ge=3)
    """Images that are embedded anew for each mining, drawn at random."""
    num_hardest: int = Field(default=25, ge=1)
    """A query's triplet is drawn from so many of highest loss."""
    checkpoint_every_minings: int = Field(default=8, ge=1)
    """Minings between checkpoints; the last step is always saved."""
    evaluate_every_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations, taken at the end of a mining's steps; none: only at the end."""
    miner_gpus: float = Field(default=0.0, ge=0)
    """GPUs, or the share of one, that the miner takes beside those of the workers; 0: it computes on CPUs."""

    def build_optimizer(self, network: nn.Module) -> Optimizer:
        """The optimiser of this stage."""
        return SGD(network.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from the beginning of this stage."""
        return self.lr * 0.5 ** (step // self.halve_every_steps)


@dataclass(frozen=True)
class Mined:
    """What a mining gave, for the steps until the next one."""

    triplets_T3: NDArray[np.int64]
    mean_loss: float
    random_loss: float
    bad: list[tuple[str, str]]
    """(image_id, reason) of images of the pool that could not be used."""


@dataclass(frozen=True)
class MiningTask:
    """What is the same in every mining of a run."""

    rows: Any
    """``ray.put`` reference to ``Rows``."""
    labels_N: Any
    """To the person of each row."""
    model: Any
    """To a ``ReidModel``, whatever its weights."""
    image_input: ImageInput
    config: RankingConfig
    seed: int
    batch_size: int
    """Images per forward pass."""
    threads: int


@ray.remote(num_cpus=0)
class TripletMiner:
    """Embeds a pool of random rows with the weights it is given, and picks hard triplets among them.

    All that it knows comes with the call, so one that died is started again and asked again.
    """

    def __init__(self) -> None:
        self._model: ReidModel | None = None

    def mine(self, task: MiningTask, weights: dict[str, torch.Tensor], round_index: int) -> Mined:
        """Triplets for the steps of a round; the same for the same task, weights and round."""
        torch.set_num_threads(task.threads)
        device = torch.device("cuda" if task.config.miner_gpus else "cpu")
        if self._model is None:
            self._model = cast(ReidModel, ray.get(task.model)).to(device)
        self._model.load_state_dict(weights)
        rows, labels_N = cast(Rows, ray.get(task.rows)), np.asarray(ray.get(task.labels_N))
        config = task.config
        rng = np.random.default_rng([task.seed, round_index, _MINER_KEY])
        pool = np.sort(rng.permutation(len(rows))[: config.pool_size])
        model = TunedFeatures(self._model, "before")
        features_ND, bad = embed_numbers(model, rows, pool, task.image_input, batch_size=task.batch_size, device=device)
        is_usable_N = torch.isfinite(features_ND).all(dim=1).cpu().numpy()
        pool = pool[is_usable_N]
        mined = mine_triplets(
            features_ND.cpu().numpy()[is_usable_N],
            labels_N[pool],
            config.refresh_steps * config.triplets_per_step,
            rng,
            num_hardest=config.num_hardest,
            margin=config.margin,
        )
        return Mined(pool[mined.triplets_T3], mined.mean_loss, mined.random_loss, bad)


@dataclass(frozen=True)
class Mining:
    """The miner and its task, as workers ask it."""

    miner: Any
    """Handle of a ``TripletMiner``."""
    task: MiningTask

    @classmethod
    def start(cls, task: MiningTask, workers: WorkersConfig) -> "Mining":
        """Start the miner; it is restarted as often as a worker would be.

        Raises ``UserError`` when it would take a GPU that a worker needs.
        """
        share, found = task.config.miner_gpus, ray.cluster_resources().get("GPU", 0)
        taken = workers.world_size if workers.to_ray().use_gpu else 0
        if share and taken + share > found:
            raise UserError(
                f"ranking.miner_gpus: {share:g} beside {taken} of the workers, but the cluster has {found:g} GPUs; set "
                "ranking.miner_gpus=0 to mine on CPUs, or workers.num_workers lower"
            )
        restarts = {"max_restarts": workers.max_failures, "max_task_retries": workers.max_failures}
        # "DEFAULT": not from what a sweep has set aside for the process of a trial, which has no GPU for it.
        place = {"num_gpus": share, "scheduling_strategy": "DEFAULT"}
        miner = TripletMiner.options(**place, **restarts)  # pyright: ignore[reportAttributeAccessIssue]
        return cls(miner.remote(), task)

    def mine(self, model: ReidModel, round_index: int) -> tuple[NDArray[np.int64], Mined | None]:
        """Triplets of a round on every rank, and on rank 0 all that the miner said; every rank must call this."""
        config = self.task.config
        triplets_T3 = torch.zeros(config.refresh_steps * config.triplets_per_step, 3, dtype=torch.int64)
        mined: Mined | None = None
        if distributed.rank() == 0:
            weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
            with pulse.doing(MINING):
                mined = cast(Mined, ray.get(self.miner.mine.remote(self.task, weights, round_index)))
            triplets_T3 = torch.tensor(mined.triplets_T3)  # a copy: what Ray hands over is read-only
        device = next(model.parameters()).device  # collectives on GPUs take nothing else
        return distributed.all_reduce_sum(triplets_T3.to(device)).cpu().numpy(), mined
