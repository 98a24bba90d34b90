import pytest

from passreid_ray.engines.setbacks import Setbacks


def at_work(*steps: int) -> Setbacks:
    """A run that began with the step 0 at 10 s and did a step a second."""
    setbacks = Setbacks(num_workers=2)
    assert setbacks.on_start(0, 10.0) is None
    for step in steps:
        setbacks.on_step(step, 10.0 + step)
    return setbacks


def test_steps_after_the_checkpoint_and_the_time_since_it_are_lost() -> None:
    setbacks = at_work(40, 41, 42, 43)
    setbacks.on_interruption("failed", "rank 1 on 127.0.0.3: its process died")
    line = setbacks.on_start(40, 67.2)
    assert line == (
        "workers failed at step 43 (rank 1 on 127.0.0.3: its process died); going on after step 40 on 2 worker(s): "
        "3 steps and 17.2 s lost"
    )
    assert setbacks.as_metrics() == {
        "failures/count": 1,
        "failures/resizes": 0,
        "failures/lost_steps": 3,
        "failures/lost_seconds": pytest.approx(17.2),
    }


def test_a_resize_is_no_failure_and_costs_the_time_of_the_start() -> None:
    setbacks = at_work(1, 2, 3)
    setbacks.on_interruption("resized", "from 2 to 3")
    setbacks.num_workers = 3
    line = setbacks.on_start(3, 20.0)
    assert line == (
        "workers are resized at step 3 (from 2 to 3); going on after step 3 on 3 worker(s): 0 steps and 7.0 s lost"
    )
    assert setbacks.as_metrics()["failures/count"] == 0
    assert setbacks.as_metrics()["failures/resizes"] == 1


def test_losses_of_several_setbacks_add_up_and_every_step_done_twice_counts_twice() -> None:
    setbacks = at_work(1, 2, 3)
    setbacks.on_interruption("failed", "one")
    setbacks.on_start(2, 20.0)
    setbacks.on_step(3, 21.0)
    setbacks.on_interruption("preempted", "two")
    assert "workers were preempted at step 3 (two); going on after step 2" in str(setbacks.on_start(2, 30.0))
    assert (setbacks.failures, setbacks.lost_steps) == (2, 2)
    assert setbacks.lost_seconds == pytest.approx((20.0 - 12.0) + (30.0 - 20.0))


def test_workers_that_fail_again_before_they_begin_are_counted_and_the_first_reason_is_told() -> None:
    setbacks = at_work(1, 2)
    for why in ("first", "second"):
        setbacks.on_interruption("failed", why)
    assert "(first)" in str(setbacks.on_start(1, 30.0))
    assert setbacks.failures == 2


def test_a_run_without_a_checkpoint_loses_all_since_it_began() -> None:
    setbacks = at_work(1, 2, 3)
    setbacks.on_interruption("failed", "")
    assert str(setbacks.on_start(0, 20.0)).endswith(
        "at step 3; going on after step 0 on 2 worker(s): 3 steps and 10.0 s lost"
    )


def test_workers_that_fail_before_their_first_step_lose_the_time_since_they_were_there() -> None:
    setbacks = Setbacks()
    setbacks.on_interruption("failed", "early")
    assert str(setbacks.on_start(0, 5.0)).endswith("at step 0 (early); going on after step 0: 0 steps and 0.0 s lost")
