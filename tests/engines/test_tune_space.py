import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passreid_ray.engines.tune_space import clipped, parse_space
from passreid_ray.errors import UserError

TABLES = {
    "optimizer": {
        "lr": {"kind": "log_uniform", "low": 1e-4, "high": 1e-1},
        "momentum": {"kind": "uniform", "low": 0.5, "high": 0.9, "when": {"optimizer": {"kind": "sgd"}}},
        "kind": {"kind": "choice", "values": ["sgd", "adamw"]},
    },
    "k1": {"kind": "integer", "low": 2, "high": 4},
}


def test_a_setting_called_kind_is_searched_and_decides_before_what_depends_on_it() -> None:
    space = parse_space(TABLES)
    assert list(space.dimensions).index("optimizer.kind") < list(space.dimensions).index("optimizer.momentum")


@given(st.integers(0, 2**31))
def test_a_draw_is_in_range_and_leaves_out_what_is_not_searched(seed: int) -> None:
    settings = parse_space(TABLES).sample(np.random.default_rng(seed))
    assert 1e-4 <= settings["optimizer.lr"] <= 1e-1  # pyright: ignore[reportOperatorIssue]
    assert settings["k1"] in (2, 3, 4)
    assert ("optimizer.momentum" in settings) == (settings["optimizer.kind"] == "sgd")


def test_powers_of_ten_are_as_likely_as_each_other() -> None:
    space = parse_space({"lr": {"kind": "log_uniform", "low": 1e-3, "high": 1.0}})
    rng = np.random.default_rng(0)
    draws = [space.sample(rng)["lr"] for _ in range(3000)]
    shares = np.bincount([math.floor(math.log10(own)) + 3 for own in draws], minlength=3) / 3000  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)


def test_a_grid_is_every_combination_once() -> None:
    tables = {
        "kind": {"kind": "choice", "values": ["a", "b"]},
        "k": {"kind": "integer", "low": 1, "high": 3, "when": {"kind": "a"}},
    }
    assert parse_space(tables).grid() == [
        {"kind": "a", "k": 1},
        {"kind": "a", "k": 2},
        {"kind": "a", "k": 3},
        {"kind": "b"},
    ]


def test_every_end_is_probed_under_its_conditions() -> None:
    probes = [settings for key, _, settings in parse_space(TABLES).probes() if key == "optimizer.momentum"]
    assert probes == [
        {"optimizer.kind": "sgd", "optimizer.momentum": 0.5},
        {"optimizer.kind": "sgd", "optimizer.momentum": 0.9},
    ]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"lr": 3}, "space.lr: expected a table"),
        (
            {"lr": {"kind": "gauss"}},
            "space.lr.kind: expected one of choice, uniform, log_uniform, integer, got 'gauss'",
        ),
        ({"lr": {"kind": "choice", "values": []}}, "space.lr.values: expected at least one"),
        ({"lr": {"kind": "log_uniform", "low": 0, "high": 1}}, "space.lr.low: expected more than 0"),
        ({"lr": {"kind": "uniform", "low": 2, "high": 1}}, "space.lr.high: expected more than low"),
        ({"lr": {"kind": "uniform", "low": 2, "hi": 1}}, "space.lr.hi: no such setting; did you mean high"),
        ({"k": {"kind": "integer", "low": 1, "high": 2.5}}, "space.k.high: expected a whole number, got 2.5"),
        ({"k": {"kind": "integer", "low": 1, "high": 2, "when": {"x": 1}}}, "space.k.when: x is not searched"),
        (
            {"a": {"kind": "choice", "values": [1]}, "k": {"kind": "integer", "low": 1, "high": 2, "when": {"a": 2}}},
            "space.k.when: a is never 2; its values are",
        ),
        (
            {
                "a": {"kind": "integer", "low": 1, "high": 3},
                "k": {"kind": "integer", "low": 1, "high": 2, "when": {"a": 7}},
            },
            "space.k.when: a is never 7; it goes from 1 to 3",
        ),
        (
            {
                "a": {"kind": "integer", "low": 1, "high": 2, "when": {"b": 1}},
                "b": {"kind": "integer", "low": 1, "high": 2, "when": {"a": 1}},
            },
            "a, b are conditions of each other",
        ),
    ],
)
def test_a_mistake_is_told_with_its_key(tables: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse_space(tables)


def test_values_that_left_their_range_come_back_to_its_end() -> None:
    space = parse_space(TABLES).dimensions
    assert clipped(space["optimizer.lr"], 3.0) == 0.1
    assert clipped(space["k1"], 3.6) == 4
    assert clipped(space["k1"], 4.8) == 4
    assert clipped(space["optimizer.kind"], "adamw") == "adamw"
