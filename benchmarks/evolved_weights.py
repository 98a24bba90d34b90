"""Whether loss weights that evolved without labels are better than random ones of the same budget.

For every preset and seed two sweeps with the same number of runs: the evolution of the preset, and one whose weights
are all drawn evenly, as the first generation of the evolution is. Weights are chosen by the fitness, which has no
labels; mAP, of people that were not trained on, only judges. Run from the repository:
``python -m benchmarks.evolved_weights 0 1 2``
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.compare import Row, write_result
from benchmarks.machine import describe_machine
from benchmarks.render import table_of
from passreid_ray.config import overridden, read_preset
from passreid_ray.engines import tune
from passreid_ray.engines.tune_book import TrialBook
from passreid_ray.engines.tune_config import TuneConfig
from passreid_ray.search import rank_correlation

NAME = "evolved_weights"
PRESETS = Path(__file__).parents[1] / "jobs" / "presets"
SWEEPS = ("sweep_evolution", "sweep_evolution_finetune")
SCORE = "evaluation/mAP"
READING = (
    "A line is two sweeps with as many short runs each, on people as frequent as Zipf's law has it. mAP, evolved: of "
    "the weights with the best fitness of the evolution. mAP, random: of all weights of the other sweep (median, "
    "lowest, highest), and of those that the same fitness chooses among them; the first four of them are the first "
    "generation of the evolution too. Spearman: of fitness and mAP over the runs of both, 1 where the better fitness "
    "always has the higher mAP."
)


@dataclass(frozen=True)
class Individual:
    """A run of a sweep."""

    fitness: float
    """Without labels; the higher the better, whatever its metric."""
    score: float
    """mAP."""


def sweep_config(preset: str, output: Path, seed: int, *, evolves: bool) -> TuneConfig:
    """The preset's sweep; without evolution all its runs are of one generation, the first, which is drawn evenly."""
    values = read_preset(preset, PRESETS)
    name = f"{preset}_{'evolved' if evolves else 'random'}{seed}"
    overrides = [f"seed={seed}", f"run.name={name}", f"run.output={output}"]
    if not evolves:
        overrides.append(f"searcher.population={values['budget']['trials']}")
    return overridden(TuneConfig, values, overrides)


def searched(config: TuneConfig) -> list[Individual]:
    """Run a sweep; all its runs."""
    folder = tune.run(config, Console(quiet=True), PRESETS)
    sign = 1.0 if config.mode == "max" else -1.0
    entries = TrialBook(folder / "trials").entries.values()
    return [Individual(sign * entry.metrics[config.metric], entry.metrics[SCORE]) for entry in entries]


def row_of(preset: str, seed: int, evolved: Sequence[Individual], drawn: Sequence[Individual]) -> Row:
    """One line: the runs of the two sweeps."""
    scores, both = [own.score for own in drawn], [*evolved, *drawn]
    return {
        "sweep": preset,
        "seed": float(seed),
        "runs": float(len(evolved)),
        "mAP, evolved": _chosen(evolved).score,
        "mAP, random": statistics.median(scores),
        "lowest": min(scores),
        "highest": max(scores),
        "mAP, random, best fitness": _chosen(drawn).score,
        "Spearman": rank_correlation([own.fitness for own in both], [own.score for own in both]).rho,
    }


def _chosen(individuals: Sequence[Individual]) -> Individual:
    return max(individuals, key=lambda own: own.fitness)


def main() -> None:
    """Compare for the given seeds, keep the figures and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds of the searches")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, preset in itertools.product(parser.parse_args().seeds, SWEEPS):
            configs = [sweep_config(preset, Path(folder), seed, evolves=evolves) for evolves in (True, False)]
            rows.append(row_of(preset, seed, *map(searched, configs)))
            print(table_of(rows), flush=True)
    settings = {"metrics": ", ".join(read_preset(preset, PRESETS)["metric"] for preset in SWEEPS)}
    write_result(NAME, describe_machine(torch.device("cpu")), settings, rows, reading=READING)


if __name__ == "__main__":
    main()
