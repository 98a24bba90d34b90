"""Genes to weights of a constant sum."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passreid_ray.errors import UserError
from passreid_ray.search import WeightSpace

NAMES = ("cls", "part_0", "part_1", "part_2", "local", "distil")
GENES = st.lists(st.floats(0, 1), min_size=6, max_size=6)


@given(GENES, st.floats(1e-3, 1e3), st.floats(0, 0.9))
def test_weights_sum_to_the_total_whatever_the_genes(genes: list[float], total: float, low: float) -> None:
    weights = WeightSpace(NAMES, total, low=low).to_weights(genes)
    assert tuple(weights) == NAMES
    assert sum(weights.values()) == pytest.approx(total, rel=1e-12)
    assert min(weights.values()) >= 0


def test_three_weights_by_hand() -> None:
    space = WeightSpace(("a", "b", "c"), total=4.0, low=1.0, high=3.0)
    assert space.to_weights([0.0, 0.5, 1.0]) == pytest.approx({"a": 4 / 6, "b": 8 / 6, "c": 12 / 6})


def test_the_total_is_one_per_name_unless_it_is_given() -> None:
    assert WeightSpace(NAMES).to_weights([0.25] * 6) == pytest.approx(dict.fromkeys(NAMES, 1.0))


@given(GENES.filter(lambda genes: max(genes) > 1e-3), st.floats(1e-3, 1))
def test_only_ratios_count(genes: list[float], factor: float) -> None:
    space = WeightSpace(NAMES)
    assert space.to_weights([factor * gene for gene in genes]) == pytest.approx(space.to_weights(genes), abs=1e-9)


@pytest.mark.parametrize("genes", [[0.0] * 6, [5e-324] * 6])
def test_no_genes_at_all_are_equal_weights(genes: list[float]) -> None:
    assert WeightSpace(NAMES, total=3.0).to_weights(genes) == dict.fromkeys(NAMES, 0.5)


def test_a_gene_of_zero_switches_its_loss_off_unless_low_is_above_zero() -> None:
    genes = [0.0, 1, 1, 1, 1, 1]
    assert WeightSpace(NAMES).to_weights(genes)["cls"] == 0
    weights = WeightSpace(NAMES, low=0.1).to_weights(genes)
    assert weights["part_0"] == pytest.approx(10 * weights["cls"])


def test_weights_are_finite_at_the_ends_of_the_numbers() -> None:
    assert WeightSpace(("a", "b"), high=1.7e308).to_weights([1.0, 1.0]) == {"a": 1.0, "b": 1.0}
    assert WeightSpace(("a", "b")).to_weights([5e-324, 0.0]) == {"a": 2.0, "b": 0.0}


@given(GENES, st.floats(0, 0.9))
def test_genes_of_weights_give_the_weights_back(genes: list[float], low: float) -> None:
    space = WeightSpace(NAMES, low=low)
    weights = space.to_weights(genes)
    back = space.to_genes(weights)
    assert max(back) == 1
    assert space.to_weights(back) == pytest.approx(weights, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "weights", [{"a": 1.0}, {"a": 1.0, "b": -1.0}, {"a": 0.0, "b": 0.0}, {"a": 1.0, "b": float("nan")}]
)
def test_weights_that_no_genes_give_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match="evolved weights: expected"):
        WeightSpace(("a", "b")).to_genes(weights)


def test_a_ratio_above_the_range_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="may be 4 times the smallest"):
        WeightSpace(("a", "b"), low=0.25).to_genes({"a": 1.0, "b": 0.2})


@pytest.mark.parametrize("genes", [[0.5], [0.5, 1.1], [0.5, -0.1], [0.5, float("nan")], [[0.5, 0.5]]])
def test_genes_out_of_range_are_refused(genes: list[float]) -> None:
    with pytest.raises(UserError, match="2 genes in"):
        WeightSpace(("a", "b")).to_weights(genes)


@pytest.mark.parametrize("names", [(), ("a", "a")])
def test_names_must_be_there_once(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="each once"):
        WeightSpace(names)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 1), (1, 1), (2, 1), (0, float("inf")), (float("nan"), 1)])
def test_an_impossible_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(UserError, match="low < high"):
        WeightSpace(("a",), low=low, high=high)


@pytest.mark.parametrize("total", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_sum_is_refused(total: float) -> None:
    with pytest.raises(UserError, match="sum above 0"):
        WeightSpace(("a",), total=total)


def test_weights_at_the_lower_end_are_not_refused_for_their_rounding() -> None:
    space = WeightSpace(NAMES, total=0.7, low=0.1)
    assert space.to_genes(space.to_weights([0.0, 1, 0, 1, 0, 1])) == pytest.approx((0.0, 1, 0, 1, 0, 1))
