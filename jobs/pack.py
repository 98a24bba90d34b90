"""Pack images into Parquet shards that training streams, checked and hashed; by default synthetic people."""

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.pack import PackConfig, run

if __name__ == "__main__":
    run_job(PackConfig, run, __doc__)
