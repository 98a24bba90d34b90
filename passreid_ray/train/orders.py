"""What workers are told between steps: save now, wait, or leave. All of them hear it after the same step."""

import time
from typing import Literal, NamedTuple

import ray
import ray.train
import torch

from passreid_ray import distributed
from passreid_ray.train.pulse import pulse
from passreid_ray.train.worker import WorkerContext

CHECK_SECONDS = 1.0
"""About how often is asked; every time is a round trip of all workers."""
SAVE_AGAIN_SECONDS = 15.0
"""Between checkpoints while a node is about to be taken away: nobody knows when it goes."""
WAIT_SECONDS = 60.0
"""How long workers wait at most for their end, which was announced."""
POST_SECONDS = 0.05
"""Between two posts of the step, so that short steps do not pile them up."""

Asked = Literal["wait", "leave"]
"""Of all workers, by way of the board: save and then wait for the end, or save and then leave."""


class Left(Exception):
    """A worker has saved its state and leaves because it was asked to."""


class Order(NamedTuple):
    """What every worker does after a step."""

    save: bool = False
    wait: bool = False
    leave: bool = False

    @property
    def ends_group(self) -> bool:
        """Whether nothing is done after it: Ray Train's controller may stand still, and needs no checkpoint."""
        return self.wait or self.leave


NOTHING = Order()


class Orders:
    """Asks after steps what to do, and does it; all workers of a run must call it alike."""

    def __init__(self, worker: WorkerContext) -> None:
        self._worker = worker
        self._steps_left = 1
        self._steps_between = 1
        self._asked_at = time.monotonic()
        self._saved_at = self._posted_at = float("-inf")

    def after_step(self, step: int) -> Order:
        """What to do now that ``step`` steps are done: most of the time nothing, and nobody was asked."""
        if self._worker.rank == 0:
            self._post(step)
        self._steps_left -= 1
        if self._steps_left > 0:
            return NOTHING
        # A barrier, in which rank 0 tells the others what Ray told it: all must call it, and equally often.
        is_preempted = ray.train.get_preemption_info() is not None
        decided = self._decide(step, is_preempted) if self._worker.rank == 0 else [0, 0, 0, 0]
        agreed = distributed.all_reduce_sum(torch.tensor(decided, device=self._worker.device))
        save, wait, leave, self._steps_between = agreed.tolist()
        self._steps_left = self._steps_between
        return Order(bool(save), bool(wait), bool(leave))

    def carry_out(self, order: Order) -> None:
        """Wait or leave, once what was to be saved is saved. Raises ``Left``."""
        if not order.ends_group:
            return
        if self._worker.rank == 0:
            ray.get(self._worker.board.answer.remote())
        if order.leave:
            raise Left
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:  # ended by Ray in the middle of it
            pulse.get_on()  # it hangs by order
            time.sleep(0.1)

    def _decide(self, step: int, is_preempted: bool) -> list[int]:
        """On rank 0: save, wait, leave, and the steps until this is asked again."""
        now = time.monotonic()
        seconds_per_step = max(1e-6, (now - self._asked_at) / self._steps_between)
        self._asked_at = now
        asked: Asked | None = ray.get(self._worker.board.asked.remote())
        save = asked is not None
        if is_preempted and now - self._saved_at >= SAVE_AGAIN_SECONDS:
            if self._saved_at == float("-inf"):
                text = f"step {step}: a node of this run is about to be taken away; saving a checkpoint"
                self._worker.post("say", text=text)
            self._saved_at, save = now, True
        return [int(save), int(asked == "wait"), int(asked == "leave"), max(1, int(CHECK_SECONDS / seconds_per_step))]

    def _post(self, step: int) -> None:
        now = time.monotonic()
        if now - self._posted_at >= POST_SECONDS:
            self._worker.post("step", step=step)
            self._posted_at = now
