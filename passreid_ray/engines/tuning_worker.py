"""What the workers of every tuning job do between steps: records, checkpoints, the best model, a stop in trouble."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from passreid_ray.engines.fit import refusal
from passreid_ray.engines.run_folder import check_same_data
from passreid_ray.engines.tuning_config import TuningConfig
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.meter import Meter
from passreid_ray.train.orders import Orders
from passreid_ray.train.state_files import load_state, save_state
from passreid_ray.train.tuning_state import TuningState
from passreid_ray.train.worker import WorkerContext
from passreid_ray.views import TrainingView, TrainingViewConfig, view_rng


@dataclass(frozen=True)
class MakeView:
    """The training view of an image, as uint8: normalised only where it is used."""

    config: TrainingViewConfig
    seed: int

    def __call__(self, image_HWC: np.ndarray, draw: int, image_id: str) -> dict[str, np.ndarray]:
        return {"image": TrainingView(self.config)(image_HWC, view_rng(self.seed, draw, image_id))}


@dataclass(frozen=True)
class TuningRun:
    """One worker's part in a tuning run: its state, and where it is kept."""

    state: TuningState[Any]
    config: TuningConfig
    worker: WorkerContext
    best: CheckpointStore
    """Where the checkpoint with the highest mAP is kept."""
    fingerprint: str
    """Of the rows."""
    orders: Orders

    def resume(self, load: Callable[[Mapping[str, Tensor], Mapping[str, Any], str], None]) -> None:
        """Call ``load`` with (tensors, meta, folder) of the newest checkpoint, if there is one.

        Raises ``UserError`` when it is of other data or damaged.
        """
        self.worker.resume(partial(_load, load, self.fingerprint))

    def save(self, *, is_last: bool = False, tell_ray: bool = True) -> None:
        """Save a checkpoint; every worker must call this. ``is_last``, ``tell_ray``: as in ``WorkerContext.report``."""
        run = self.config.run
        self.worker.report(self.state.step, self._write, run.keep, is_last=is_last, tell_ray=tell_ray)

    def keep_best(self, metrics: Mapping[str, float]) -> None:
        """Save the state when its mAP is the highest so far; rank 0 alone knows the metrics and keeps the score."""
        if self.worker.rank == 0 and metrics.get("evaluation/mAP", -1.0) > self.state.best_mAP:
            before, self.state.best_mAP = self.state.best_mAP, metrics["evaluation/mAP"]
            if self.worker.try_to_write(self.best, self.state.step, self._write) is None:
                self.state.best_mAP = before  # of what is kept
            else:
                self.best.prune(1)

    def log(self, metrics: Mapping[str, Tensor], more: Mapping[str, float], meter: Meter) -> None:
        """Send the record of an interval to the driver."""
        interval = meter.read()
        if self.worker.rank == 0:
            self.worker.stop_if_told()
            values = {name: float(value) for name, value in metrics.items() if name != "loss"} | interval
            record = {**values, **more, "refused_steps": self.state.refused_steps}
            self.worker.post("metrics", step=self.state.step, metrics=record)

    def stop_if_refused(self, rate: str = "optimizer.lr") -> None:
        """Save and raise ``UserError``, naming the setting ``rate``, when too many steps in a row were refused."""
        state = self.state
        if state.refused_in_a_row >= self.config.max_refused_in_a_row:
            self.save()
            raise UserError(refusal(state.step, state.refused_in_a_row, self.config.run.folder, rate))

    def _write(self, folder: Path) -> None:
        identity = {"config": self.config.model_dump(mode="json"), "fingerprint": self.fingerprint}
        save_state(folder, self.state.tensors(), {**self.state.meta(), **identity})


def _load(load: Callable[[Mapping[str, Tensor], Mapping[str, Any], str], None], fingerprint: str, folder: Path) -> None:
    tensors, meta = load_state(folder)
    check_same_data(meta, fingerprint, str(folder))
    load(tensors, meta, str(folder))
