import time

import pytest

from passreid_ray.engines.tune_deadline import Deadline


def test_trials_are_ended_when_the_time_is_up_and_not_before() -> None:
    assert not Deadline(3600).stop_all()
    assert Deadline(0).stop_all()
    assert not Deadline(0)("trial", {})


def test_a_clock_that_is_set_forward_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline, now = Deadline(3600), time.time()
    assert not deadline.stop_all()
    monkeypatch.setattr(time, "time", lambda: now + 24 * 3600)
    assert not deadline.stop_all()
