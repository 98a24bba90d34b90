"""Tune a part-token ViT on labelled person crops, with any sum of losses; by default on synthetic people."""

from passreid_ray.engines.cli import run_job
from passreid_ray.engines.finetune import run
from passreid_ray.engines.finetune_config import FinetuneConfig

if __name__ == "__main__":
    run_job(FinetuneConfig, run, __doc__, default_preset="finetune_synthetic")
