"""Convert a checkpoint of this project or a public one into another format, and check what was written."""

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.convert import run
from passreid_ray.engines.convert_config import ConvertConfig

if __name__ == "__main__":
    run_job(ConvertConfig, run, __doc__)
