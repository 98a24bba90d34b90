"""The benchmark of evolved weights: the same budget for both sides, and labels only judge."""

from pathlib import Path

import pytest

from benchmarks.evolved_weights import SWEEPS, Individual, row_of, sweep_config
from passreid_ray.engines.tune_config import EvolutionConfig


@pytest.mark.parametrize("preset", SWEEPS)
def test_both_sides_have_the_same_runs_and_the_random_one_a_single_generation(preset: str, tmp_path: Path) -> None:
    evolved, drawn = (sweep_config(preset, tmp_path, 3, evolves=evolves) for evolves in (True, False))
    assert isinstance(evolved.searcher, EvolutionConfig)
    assert isinstance(drawn.searcher, EvolutionConfig)
    assert evolved.budget == drawn.budget
    assert evolved.budget.trials >= 3 * evolved.searcher.population
    assert drawn.budget.trials == drawn.searcher.population
    assert evolved.overrides == drawn.overrides
    assert evolved.seed == drawn.seed == 3
    assert evolved.run.folder != drawn.run.folder


def test_a_row_chooses_by_fitness_and_reads_the_score_of_the_chosen() -> None:
    evolved = [Individual(*own) for own in ((-0.5, 0.9), (-0.1, 0.4), (-0.3, 0.6))]
    drawn = [Individual(*own) for own in ((-0.4, 0.2), (-0.2, 0.3), (-0.6, 0.7))]
    row = row_of("sweep", 1, evolved, drawn)
    assert row["mAP, evolved"] == 0.4
    assert (row["lowest"], row["mAP, random"], row["highest"]) == (0.2, 0.3, 0.7)
    assert row["mAP, random, best fitness"] == 0.3
    assert row["Spearman"] == pytest.approx(-19 / 35)
