"""Look at every image and label of a data set before training on it; by default at synthetic people."""

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.inspect_data import InspectConfig, run

if __name__ == "__main__":
    run_job(InspectConfig, run, __doc__)
