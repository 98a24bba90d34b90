"""Measure retrieval accuracy (mAP, mINP, CMC) of any checkpoint; by default of random weights on synthetic people."""

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.evaluate import run
from passreid_ray.engines.evaluate_config import EvaluateConfig

if __name__ == "__main__":
    run_job(EvaluateConfig, run, __doc__)
