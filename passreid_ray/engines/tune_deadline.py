"""The end of a sweep's time, by a clock that nobody sets."""

import time

from ray.tune import Stopper


class Deadline(Stopper):
    """Ends all trials once ``seconds`` have passed.

    Ray Tune's own ``time_budget_s`` goes by the time of day: a clock that is set forward would end the sweep.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._end

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.is_over
