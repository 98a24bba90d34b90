"""Where workers post what they did and the driver reads it: progress, logs, quarantine, and reasons to stop."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from passreid_ray.engines.log_patience import LogPatience
from passreid_ray.engines.progress import run_progress
from passreid_ray.engines.setbacks import Cause, Setbacks
from passreid_ray.engines.worker_places import WorkerPlaces
from passreid_ray.train.beats import Beat, Beats, Heard, WorkerProcess
from passreid_ray.train.orders import Asked
from passreid_ray.train.run_log import RunLog

POLL_SECONDS = 0.25
Listener = Callable[[int, int, Mapping[str, float]], str | None]
"""Told (step, end step, metrics) of every record; may wait, and answers with a reason to stop or None."""


@ray.remote(num_cpus=0)
class Board:
    """A mailbox between the workers of a run and its driver, and the place where a reason to stop is kept."""

    def __init__(self) -> None:
        self._posts: list[dict[str, Any]] = []
        self._stop_reason: str | None = None
        self._beats = Beats()
        self._has_group = True
        self._asked: Asked | None = None
        self._has_answered = False

    def post(self, record: dict[str, Any]) -> None:
        """Add a record for the driver."""
        self._posts.append(record)

    def take(self) -> list[dict[str, Any]]:
        """All records since the last call."""
        posts, self._posts = self._posts, []
        return posts

    def num_waiting(self) -> int:
        """Records that the driver has not taken yet; without those of steps, which are on no disk."""
        return sum(record["kind"] != "step" for record in self._posts)

    def stop(self, reason: str) -> None:
        """Keep the first reason to stop: restarted workers look here before they begin."""
        self._stop_reason = self._stop_reason or reason

    def stop_reason(self) -> str | None:
        """Why the run must not go on; None while it may."""
        return self._stop_reason

    def beat(self, beat: Beat) -> None:
        """Keep how a worker gets on; not of a group that is being ended."""
        if self._has_group:
            self._beats.add(beat)

    def beats(self) -> list[Heard]:
        """How every worker gets on."""
        return self._beats.read()

    def end_beats(self, process: WorkerProcess) -> None:
        """Do not miss a worker that has ended."""
        self._beats.end(process)

    def forget_beats(self) -> None:
        """Do not miss any worker that was heard so far."""
        self._beats.forget()

    def ask(self, what: Asked) -> None:
        """Ask all workers to save, and then to wait for their end or to leave; once they are to leave, that stands."""
        if self._asked != "leave":
            self._asked = what

    def asked(self) -> Asked | None:
        """What the workers are asked to do."""
        return self._asked

    def answer(self) -> None:
        """The workers have saved, and wait or leave."""
        self._has_answered = True
        self._take_back_wait()

    def has_answered(self) -> bool:
        """Whether these workers have saved what they were asked to; they do nothing more after that."""
        return self._has_answered

    def begin_group(self) -> None:
        """The workers are others now: what the last ones were asked is not for them, but to leave stands."""
        self._has_answered = False
        self._has_group = True
        self._take_back_wait()

    def end_group(self) -> None:
        """Ray ends the workers: they are not missed, nor judged when those that are left wait for the others."""
        self._has_group = False
        self._beats.forget()

    def _take_back_wait(self) -> None:
        if self._asked == "wait":
            self._asked = None


def new_board() -> Any:
    """A board on the node of this process: of nodes that die, only the driver's own takes it along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()


class Monitor:
    """Reads a board in the background and turns its records into progress, logs and files."""

    def __init__(
        self,
        board: Any,
        log: RunLog,
        console: Console,
        *,
        num_rows: int,
        max_bad_share: float,
        listener: Listener | None = None,
    ) -> None:
        self._board = board
        self._listener = listener
        self._end_step = 0
        self._setbacks = Setbacks()
        self._log = log
        self._limit = max_bad_share * num_rows
        self._num_rows = num_rows
        self._bad: set[str] = set()
        self._collapsed = False
        self._places = WorkerPlaces()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._progress = run_progress(console)
        self._patience = LogPatience(log, self._progress.say, self._stop)

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        self._patience.end()
        self._progress.close()
        self._log.close()

    @property
    def num_bad(self) -> int:
        """Different images that could not be used."""
        return len(self._bad)

    def _watch(self) -> None:
        try:
            while not self._done.wait(POLL_SECONDS):
                self._read()
                self._patience.look(time.monotonic())
            self._read()
        except OSError as error:  # not of the log, which is kept in memory
            self._stop(f"the progress of the run cannot be written: {error.strerror or error}")
        except RayError:
            pass  # the cluster is gone; whoever started the run learns why

    def _read(self) -> None:
        handlers: dict[str, Callable[..., None]] = {
            "worker": self._on_worker,
            "start": self._on_start,
            "step": lambda step, **_: self._setbacks.on_step(step, time.monotonic()),
            "group": self._on_group,
            "interruption": self._on_interruption,
            "metrics": self._on_metrics,
            "evaluation": self._on_evaluation,
            "record": self._on_record,
            "say": lambda text, **_: self._progress.say(text),
            "phase": lambda phase, done, total, **_: self._progress.phase(phase, done, total),
            "round": self._on_round,
            "bad": self._on_bad,
            "collapse": self._on_collapse,
        }
        for record in ray.get(self._board.take.remote()):
            handlers[record.pop("kind")](**record)

    def _on_start(self, step: int, end_step: int, **_: Any) -> None:
        lost = self._setbacks.on_start(step, time.monotonic())
        self._log.restart_at(step)
        self._end_step = end_step
        if lost is not None:
            self._progress.say(lost, style="yellow")
            self._log.write(step, self._setbacks.as_metrics())
        elif step > end_step:
            self._progress.say(f"nothing to do: the run is at step {step}, these settings end at step {end_step}")
        elif step:
            self._progress.say(f"continuing after step {step} of {end_step}")
        self._progress.start(step, end_step)
        self._places.start(step)
        self._tell_places()

    def _on_worker(self, rank: int, world_size: int, address: str) -> None:
        self._places.add(rank, world_size, address)
        self._tell_places()

    def _tell_places(self) -> None:
        if self._places.are_news:
            step, addresses = self._places.take()
            self._log.note(step, nodes=addresses)
            self._progress.say(", ".join(f"worker {rank} on {address}" for rank, address in enumerate(addresses)))

    def _on_group(self, num_workers: int, **_: Any) -> None:
        self._setbacks.num_workers = num_workers
        self._places.new_group()

    def _on_interruption(self, cause: Cause, why: str, **_: Any) -> None:
        self._setbacks.on_interruption(cause, why)

    def _on_record(self, step: int, metrics: dict[str, float], **_: Any) -> None:
        self._log.write(step, metrics)
        self._tell(step, metrics)

    def _on_metrics(self, step: int, metrics: dict[str, float], **_: Any) -> None:
        self._log.write(step, metrics)
        state = f"loss {metrics['loss']:.3f}  {metrics['images_per_second']:.1f} images/s"
        if metrics["data_wait_share"] > 0.1:
            state += f"  waits {metrics['data_wait_share']:.0%} for data"
        self._progress.update(step, state)
        self._tell(step, metrics)

    def _on_evaluation(self, step: int, metrics: dict[str, float], **_: Any) -> None:
        self._log.write(step, metrics)
        self._progress.say(
            f"step {step}: mAP {metrics['evaluation/mAP']:.2%}  rank-1 {metrics['evaluation/rank1']:.2%}"
        )
        self._tell(step, metrics)

    def _on_round(self, step: int, text: str, metrics: dict[str, float], **_: Any) -> None:
        self._log.write(step, metrics)
        self._progress.say(text)
        self._tell(step, metrics)

    def _tell(self, step: int, metrics: Mapping[str, float]) -> None:
        reason = None if self._listener is None else self._listener(step, self._end_step, metrics)
        if reason is not None:
            self._stop(reason)

    def _on_collapse(self, step: int, text: str, **_: Any) -> None:
        if not self._collapsed:
            self._progress.say(f"step {step}: the teacher has collapsed: {text}", style="yellow")
        self._collapsed = True

    def _on_bad(self, images: list[tuple[str, str]], **_: Any) -> None:
        new = {image_id: reason for image_id, reason in images if image_id not in self._bad}
        self._bad |= new.keys()
        if new:
            self._log.quarantine([{"image_id": image_id, "reason": reason} for image_id, reason in new.items()])
        if len(self._bad) > self._limit:
            image_id, reason = images[-1]
            self._stop(
                f"{len(self._bad)} of {self._num_rows} images cannot be used, more than max_bad_share allows; "
                f"the last: {image_id}: {reason}. All are in {self._log.folder / 'quarantine.jsonl'}"
            )

    def _stop(self, reason: str) -> None:
        ray.get(self._board.stop.remote(reason))
