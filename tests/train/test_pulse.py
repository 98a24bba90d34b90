import pytest

from passreid_ray.train.pulse import DATA, EVALUATION, STARTING, STEP, Pulse


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in the only element."""
    time = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: time[0])
    return time


def test_pieces_of_work_steps_and_new_phases_count_as_getting_on(now: list[float]) -> None:
    pulse = Pulse()
    assert (pulse.phase, pulse.last_seconds) == (STARTING, 10.0)
    now[0] = 11.0
    pulse.get_on()
    assert (pulse.steps, pulse.last_seconds) == (0, 11.0)
    now[0] = 12.0
    pulse.count_step()
    assert (pulse.steps, pulse.last_seconds) == (1, 12.0)
    now[0] = 13.0
    with pulse.doing(DATA):
        assert pulse.last_seconds == 13.0
        now[0] = 14.0
    assert pulse.last_seconds == 14.0


def test_after_a_phase_comes_the_one_before_or_the_one_that_was_given(now: list[float]) -> None:
    pulse = Pulse()
    with pulse.doing(DATA, then=STEP), pulse.doing(EVALUATION):
        assert pulse.phase == EVALUATION
    assert pulse.phase == STEP
    with pytest.raises(ValueError, match="bad"), pulse.doing(EVALUATION):
        raise ValueError("bad")
    assert pulse.phase == STEP


def test_a_run_that_begins_in_a_used_process_begins_anew(now: list[float]) -> None:
    pulse = Pulse()
    pulse.phase, pulse.first_step = STEP, 30
    pulse.count_step()
    now[0] = 20.0
    pulse.restart()
    assert (pulse.phase, pulse.first_step, pulse.steps, pulse.last_seconds) == (STARTING, 0, 0, 20.0)
