"""Measure what a pre-training run will cost before it starts: speed, memory, hours; settings are those of pretrain."""

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.plan import PlanConfig, run

if __name__ == "__main__":
    run_job(PlanConfig, run, __doc__, default_preset="pretrain_synthetic")
