"""The optimiser of tuning runs."""

import pytest
from torch import nn

from passreid_ray.train.tuning_optimizer import TuningOptimizerConfig


def test_the_learning_rate_falls_in_steps_of_rounds() -> None:
    config = TuningOptimizerConfig(lr=1.0, decay_every_rounds=20, decay_factor=0.1)
    assert [config.lr_at(index) for index in (0, 19, 20, 39, 40)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_frozen_parameters_are_left_out(kind: str) -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    optimizer = TuningOptimizerConfig.model_validate({"kind": kind}).build(module)
    assert [parameter is module.weight for group in optimizer.param_groups for parameter in group["params"]] == [True]
