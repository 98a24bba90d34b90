"""Unsupervised ReID: cluster unlabelled crops, learn from the clusters, again; by default on synthetic people."""

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.usl import run
from passreid_ray.engines.usl_config import USLConfig

if __name__ == "__main__":
    run_job(USLConfig, run, __doc__, default_preset="usl_synthetic")
