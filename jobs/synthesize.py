"""Write a data set of synthetic people in the layout of Market-1501, with a contact sheet to look at."""

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.synthesize import SynthesizeConfig, run

if __name__ == "__main__":
    run_job(SynthesizeConfig, run, __doc__)
