import json
from pathlib import Path

import numpy as np
import pytest

from passreid_ray.train.schedules import cosine, linear_warmup

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "pass_schedules.npz")


def reference_value(name: str, step: int) -> float:
    given = json.loads(str(GOLDEN[f"{name}_args"]))
    per_epoch = given["niter_per_ep"]
    return cosine(
        step,
        start=given["base_value"],
        end=given["final_value"],
        steps=given["epochs"] * per_epoch,
        warmup_steps=given.get("warmup_epochs", 0) * per_epoch,
    )


@pytest.mark.parametrize("name", ["lr", "wd", "momentum", "lr_nowarm"])
def test_every_value_of_the_reference_schedule_is_reproduced(name: str) -> None:
    values = [reference_value(name, step) for step in range(len(GOLDEN[name]))]
    np.testing.assert_allclose(values, GOLDEN[name], rtol=0, atol=1e-12)


def test_the_official_100_epoch_schedule_is_reproduced() -> None:
    values = [reference_value("big", int(step)) for step in GOLDEN["big_idx"]]
    np.testing.assert_allclose(values, GOLDEN["big_val"], rtol=0, atol=1e-12)


def test_the_peak_is_held_for_two_steps_and_the_end_is_reached_only_after_the_run() -> None:
    values = [cosine(step, start=1.0, end=0.1, steps=20, warmup_steps=5) for step in range(22)]
    assert values[4] == values[5] == 1.0
    assert values[19] > 0.1
    assert values[20] == values[21] == 0.1


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps must lie between 0 and steps=3, got 4"):
        cosine(0, start=1.0, end=0.0, steps=3, warmup_steps=4)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_linear_warm_up_is_numpy_linspace_and_then_constant(steps: int) -> None:
    values = [linear_warmup(step, start=0.04, end=0.07, steps=steps) for step in range(steps + 2)]
    np.testing.assert_allclose(values, [*np.linspace(0.04, 0.07, steps), 0.07, 0.07], rtol=1e-12)


def test_a_warm_up_of_no_steps_is_the_end_value() -> None:
    assert linear_warmup(0, start=0.04, end=0.07, steps=0) == 0.07
