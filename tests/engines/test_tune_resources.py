import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.tune_resources import Resources, trials_at_once
from passreid_ray.errors import UserError


def test_a_trial_that_can_never_be_scheduled_is_refused_at_once_with_a_table() -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        trials_at_once(WorkersConfig(num_workers=8), Resources(4, 0), 2)
    assert time.monotonic() - start < 1
    lines = [line.split() for line in str(caught.value).replace("│", " ").splitlines()]
    assert ["a", "trial", "in", "all", "9", "0"] in lines
    assert ["the", "cluster", "4", "0"] in lines


def test_more_gpus_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match="does not fit the cluster"):
        trials_at_once(WorkersConfig(num_workers=2, use_gpu=True), Resources(64, 1), 1)


@given(st.integers(0, 4), st.integers(1, 40), st.integers(0, 8), st.integers(1, 9))
def test_what_fits_leaves_a_cpu_for_the_data_of_each_trial(workers: int, cpus: int, gpus: int, wanted: int) -> None:
    own = max(1, workers)
    try:
        found = trials_at_once(WorkersConfig(num_workers=workers), Resources(cpus, gpus), wanted)
    except UserError:
        assert cpus < own + 1
        return
    assert 1 <= found <= wanted
    assert found * (own + 1) <= cpus
    per_trial_gpus = own if gpus >= own else 0
    assert found * per_trial_gpus <= gpus
    more_fits = (found + 1) * (own + 1) <= cpus and (found + 1) * per_trial_gpus <= gpus
    assert found == wanted or not more_fits
