"""Pre-train a part-token ViT on unlabelled person crops (PASS, arXiv:2203.03931); by default on synthetic people."""

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.pretrain import PretrainConfig, run

if __name__ == "__main__":
    run_job(PretrainConfig, run, __doc__, default_preset="pretrain_synthetic")
