"""Search settings of a job: trials on Ray Tune, early stopping, a report; by default tiny pre-training runs."""

import sys
from pathlib import Path

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.tune_config import TuneConfig


def run(config: TuneConfig) -> None:
    """Refuse at once what this machine can never run, then search."""
    from passreid_ray.engines.tune_resources import check_early

    check_early(config, Path(sys.argv[0]).resolve().parent / "presets")
    from passreid_ray.engines.tune import run as search  # seconds: all jobs, Ray Tune, plotting

    search(config)


if __name__ == "__main__":
    run_job(TuneConfig, run, __doc__, default_preset="sweep_pretrain", preset_prefix="sweep")
