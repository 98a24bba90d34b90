"""Genes to weights of a constant sum."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passreid_ray.errors import UserError
from passreid_ray.search import WeightSpace

NAMES = ("cls", "part_0", "part_1", "part_2", "local", "distil")
GENES = st.lists(st.floats(0, 1), min_size=6, max_size=6)


@given(GENES, st.floats(1e-3, 1e3))
def test_weights_sum_to_the_total_whatever_the_genes(genes: list[float], total: float) -> None:
    weights = WeightSpace(NAMES, total).to_weights(genes)
    assert tuple(weights) == NAMES
    assert sum(weights.values()) == pytest.approx(total, rel=1e-12)
    assert min(weights.values()) >= 0


def test_three_weights_by_hand() -> None:
    space = WeightSpace(("a", "b", "c"), total=4.0)
    assert space.to_weights([0.1, 0.2, 0.3]) == pytest.approx({"a": 4 / 6, "b": 8 / 6, "c": 12 / 6})


def test_the_total_is_one_per_name_unless_it_is_given() -> None:
    assert WeightSpace(NAMES).to_weights([0.25] * 6) == pytest.approx(dict.fromkeys(NAMES, 1.0))


@given(GENES.filter(lambda genes: max(genes) > 1e-3), st.floats(1e-3, 1))
def test_only_ratios_count(genes: list[float], factor: float) -> None:
    space = WeightSpace(NAMES)
    assert space.to_weights([factor * gene for gene in genes]) == pytest.approx(space.to_weights(genes), abs=1e-9)


@pytest.mark.parametrize("genes", [[0.0] * 6, [5e-324] * 6])
def test_no_genes_at_all_are_equal_weights(genes: list[float]) -> None:
    assert WeightSpace(NAMES, total=3.0).to_weights(genes) == dict.fromkeys(NAMES, 0.5)


def test_a_gene_of_zero_switches_its_loss_off() -> None:
    assert WeightSpace(NAMES).to_weights([0.0, 1, 1, 1, 1, 1])["cls"] == 0


def test_weights_of_the_tiniest_genes_are_finite() -> None:
    assert WeightSpace(("a", "b")).to_weights([5e-324, 0.0]) == {"a": 2.0, "b": 0.0}


@pytest.mark.parametrize("genes", [[0.5], [0.5, 1.1], [0.5, -0.1], [0.5, float("nan")], [[0.5, 0.5]]])
def test_genes_out_of_range_are_refused(genes: list[float]) -> None:
    with pytest.raises(UserError, match="2 genes in"):
        WeightSpace(("a", "b")).to_weights(genes)


@pytest.mark.parametrize("names", [(), ("a", "a")])
def test_names_must_be_there_once(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="each once"):
        WeightSpace(names)


@pytest.mark.parametrize("total", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_sum_is_refused(total: float) -> None:
    with pytest.raises(UserError, match="sum above 0"):
        WeightSpace(("a",), total=total)
