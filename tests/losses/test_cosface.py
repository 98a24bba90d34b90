import math

import pytest
import torch

from passreid_ray.losses.cosface import cosface_loss


def test_by_default_features_opposite_to_their_class_cost_64_times_1_and_the_margin() -> None:
    loss = cosface_loss(torch.eye(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64), torch.arange(4))
    assert loss.item() == pytest.approx(64 * 1.35 + math.log(3 + math.exp(-64 * 1.35)), rel=1e-12)
