"""The smallest sweeps: micro pre-training runs in the trials' own processes."""

from pathlib import Path
from typing import Any

from passreid_ray.config import build, to_toml
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.engines.tune_book import TrialBook, TrialEntry
from passreid_ray.engines.tune_config import TuneConfig
from passreid_ray.engines.tune_plan import SweepPlan, make_plan
from tests.engines.micro import SETTINGS

SPACE: dict[str, Any] = {
    "optimizer": {"lr": {"kind": "log_uniform", "low": 1e-3, "high": 1e-1}},
    "student_temp": {"kind": "choice", "values": [0.1, 0.2]},
}


def micro_preset(output: Path, **changes: Any) -> Path:
    """The job's preset below ``output``."""
    short = {"epochs": 3, "evaluation": {**SETTINGS["evaluation"], "every_epochs": 1}, "workers": {"num_workers": 0}}
    path = output / "job.toml"
    path.write_text(to_toml(build(PretrainConfig, {**SETTINGS, **short, **changes})), encoding="utf-8")
    return path


def sweep_config(output: Path, **changes: Any) -> TuneConfig:
    """Settings of a sweep below ``output``; ``changes`` replace whole sections or values."""
    settings = {
        "run": {"name": "sweep", "output": str(output)},
        "preset": str(micro_preset(output)),
        "space": SPACE,
        "budget": {"trials": 4},
        **changes,
    }
    return build(TuneConfig, settings)


def sweep_plan(output: Path, **changes: Any) -> SweepPlan:
    """The plan of such a sweep."""
    return make_plan(sweep_config(output, **changes), None)


def entries_of(folder: Path) -> list[TrialEntry]:
    """The trials of the sweep in ``folder``, in the order of their numbers."""
    entries = TrialBook(folder / "trials").entries
    return [entries[number] for number in sorted(entries)]
