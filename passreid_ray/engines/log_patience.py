"""A run whose logs cannot be written for a while, mostly because the disk is full, goes on."""

from collections.abc import Callable

from passreid_ray.train.run_log import RunLog

RETRY_SECONDS = 5.0
PATIENCE_SECONDS = 600.0
"""How long the records of a run are kept in memory before it is stopped: they would be lost with its process."""


class LogPatience:
    """Tries again to write a log; ``say`` hears of trouble and of its end, ``stop`` when it lasts too long."""

    def __init__(self, log: RunLog, say: Callable[[str], None], stop: Callable[[str], None]) -> None:
        self._log = log
        self._say = say
        self._stop = stop
        self._since: float | None = None
        self._tried_at = 0.0
        self._has_stopped = False

    def look(self, now: float) -> None:
        """Look after the log at ``now``, in seconds of a clock that never goes back."""
        if self._since is None:
            if self._log.num_waiting:
                self._try(now)
        elif now - self._tried_at >= RETRY_SECONDS:
            self._try(now)

    def end(self) -> None:
        """Try a last time, and say what is lost."""
        error = self._log.catch_up()
        if error is not None:
            self._say(f"{self._told(error)}; {self._log.num_waiting} of their last records are lost")

    def _try(self, now: float) -> None:
        error, self._tried_at = self._log.catch_up(), now
        if error is None:
            if self._since is not None:
                self._say(f"{self._log.folder}: the logs are written again, nothing of them is lost")
            self._since = None
        elif self._since is None:
            self._since = now
            self._say(f"{self._told(error)}; they are kept in memory, training goes on. Make room")
        elif now - self._since >= PATIENCE_SECONDS and not self._has_stopped:
            self._has_stopped = True
            self._stop(
                f"{self._told(error)}, for {PATIENCE_SECONDS / 60:g} minutes. Make room; the same command goes on"
            )

    def _told(self, error: OSError) -> str:
        return f"{self._log.folder}: the logs cannot be written: {error.strerror or error}"
