"""Search settings of a job: trials on Ray Tune, early stopping, a report; by default tiny pre-training runs."""

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.tune import run
from passreid_ray.engines.tune_config import TuneConfig

if __name__ == "__main__":
    run_job(TuneConfig, run, __doc__, default_preset="sweep_pretrain", preset_prefix="sweep")
