"""A sweep whose job is killed; a file of its own, since it needs no cluster beside those of its jobs."""

from pathlib import Path
from typing import Any

from passreid_ray.config import to_toml
from passreid_ray.engines.tune_book import TrialBook
from passreid_ray.train.run_log import read_jsonl
from tests.engines.killing import killed_and_given_again
from tests.engines.sweep_micro import entries_of, sweep_config, sweep_plan


def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    config = sweep_config(tmp_path, budget={"trials": 3}, concurrency=2)
    preset = tmp_path / "sweep.toml"
    preset.write_text(to_toml(config), encoding="utf-8")
    trials = sweep_plan(tmp_path).trials_folder
    seen: dict[int, Any] = {}

    def is_time() -> bool:
        """Whether a trial has ended and another has come as far as a checkpoint."""
        entries = [] if not trials.is_dir() else list(TrialBook(trials).entries.values())
        seen.update({own.number: own for own in entries})
        ended = [own for own in entries if own.status == "finished"]
        running = [own for own in entries if own.status == "running"]
        return bool(ended) and any(list((trials / f"trial_{own.number:04d}").glob("step_*")) for own in running)

    said = killed_and_given_again("tune.py", preset, is_time)
    ended = [own for own in seen.values() if own.status == "finished"]
    assert f"continuing: {len(ended)} trials are done" in said
    entries = entries_of(config.run.folder)
    assert ended
    assert [own.status for own in entries] == ["finished"] * 3
    for own in seen.values():
        assert entries[own.number].asked == own.asked
        if own.status == "finished":
            assert entries[own.number] == own
            assert f"trial_{own.number:04d} finished" not in said
    for own in entries:
        steps = [record["step"] for record in read_jsonl(trials / f"trial_{own.number:04d}" / "metrics.jsonl")]
        assert steps == sorted(steps)
        assert set(steps) == set(range(19))
