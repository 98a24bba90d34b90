"""Cluster crops or a file of features into pseudo-labels, without training; by default synthetic people."""

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.pseudo_labels import PseudoLabelsConfig, run

if __name__ == "__main__":
    run_job(PseudoLabelsConfig, run, __doc__)
