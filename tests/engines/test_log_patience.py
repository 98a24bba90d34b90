from pathlib import Path

from passreid_ray.engines.log_patience import PATIENCE_SECONDS, RETRY_SECONDS, LogPatience
from passreid_ray.train.run_log import RunLog, read_jsonl


class Spoken:
    """A log that stands in a folder's way, and what is said of it."""

    def __init__(self, folder: Path) -> None:
        self.log = RunLog(folder)
        self.said: list[str] = []
        self.stopped: list[str] = []
        self.patience = LogPatience(self.log, self.said.append, self.stopped.append)
        self.obstacle = folder / "metrics.jsonl"
        self.obstacle.mkdir()


def test_a_log_in_trouble_is_told_once_and_written_once_there_is_room(tmp_path: Path) -> None:
    run = Spoken(tmp_path)
    run.patience.look(0.0)
    assert run.said == []
    run.log.write(1, {"loss": 1.0})
    for now in (100.0, 100.0 + RETRY_SECONDS):
        run.log.write(2, {"loss": 2.0})
        run.patience.look(now)
    told = f"{tmp_path}: the logs cannot be written: Is a directory; they are kept in memory, training goes on. "
    assert run.said == [told + "Make room"]
    run.obstacle.rmdir()
    run.patience.look(101.0 + RETRY_SECONDS)
    assert run.log.num_waiting > 0  # too early to try again
    run.patience.look(100.0 + 2 * RETRY_SECONDS)
    assert run.said[1:] == [f"{tmp_path}: the logs are written again, nothing of them is lost"]
    assert [record["step"] for record in read_jsonl(run.obstacle)] == [1, 2, 2]
    run.patience.look(101.0 + 2 * PATIENCE_SECONDS)
    run.patience.end()
    assert (len(run.said), run.stopped) == (2, [])


def test_a_log_that_stays_in_trouble_stops_the_run_and_what_is_lost_is_told(tmp_path: Path) -> None:
    run = Spoken(tmp_path)
    run.log.note(1, nodes=[])
    for now in (1.0, PATIENCE_SECONDS, PATIENCE_SECONDS + 1 + RETRY_SECONDS, PATIENCE_SECONDS + 2 + 2 * RETRY_SECONDS):
        run.patience.look(now)
    (reason,) = run.stopped
    assert reason.endswith("Is a directory, for 10 minutes. Make room; the same command goes on")
    run.patience.end()
    assert run.said[1].endswith("Is a directory; 2 of their last records are lost")
