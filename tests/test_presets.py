"""Every preset that comes with a job is one that its settings accept."""

from pathlib import Path

import pytest

from passreid_ray.config import Section, load_config
from passreid_ray.engines.finetune_config import FinetuneConfig
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.engines.tune_config import TuneConfig
from passreid_ray.engines.usl_config import USLConfig

PRESETS = sorted((Path(__file__).parents[1] / "jobs" / "presets").glob("*.toml"))
JOBS: dict[str, type[Section]] = {
    "pretrain": PretrainConfig,
    "usl": USLConfig,
    "finetune": FinetuneConfig,
    "sweep": TuneConfig,
}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_accepted_by_its_job(path: Path) -> None:
    config = load_config(JOBS[path.stem.split("_")[0]], [str(path)])
    assert isinstance(config, Section)


def test_the_published_tuning_settings_are_those_of_the_scripts() -> None:
    """Table of the four scripts of PASS's cluster-contrast code: eps, fusion, neck, workers."""
    found = {}
    for path in PRESETS:
        if path.stem.startswith(("usl_m", "usl_uda")):
            config = load_config(USLConfig, [str(path)])
            found[path.stem] = (config.cluster.eps, config.neck.fusion, config.neck.neck, config.workers.num_workers)
            assert (config.batch_size, config.images_per_identity, config.steps_per_round) == (256, 8, 200)
            assert (config.rounds, config.drop_path, config.optimizer.lr, config.memory.update) == (
                50,
                0.3,
                3.5e-4,
                "hard",
            )
    assert found == {
        "usl_market1501": (0.6, "cat", "single", 4),
        "usl_msmt17": (0.7, "mean", "single", 2),
        "usl_uda_market1501": (0.6, "cat", "multi", 4),
        "usl_uda_msmt17": (0.7, "mean", "multi", 2),
    }


def test_the_published_supervised_settings_are_those_of_the_scripts() -> None:
    """The scripts of PASS's fine-tuning code: one configuration for both sets and both sizes."""
    sizes = {}
    for path in PRESETS:
        if path.stem.startswith("finetune_m"):
            config = load_config(FinetuneConfig, [str(path)])
            sizes[path.stem] = config.views.image_size_px
            assert (config.epochs, config.batch_size, config.images_per_identity, config.drop_path) == (120, 64, 4, 0.1)
            assert (config.neck.fusion, config.neck.neck, config.feature) == ("cat", "multi", "before")
            assert config.losses.in_use == {"identity": 1.0, "triplet": 1.0}
            assert (config.losses.triplet.margin, config.losses.identity.label_smoothing) == (None, 0.0)
            optimizer = config.optimizer
            assert (optimizer.kind, optimizer.lr, optimizer.schedule, optimizer.warmup_epochs) == (
                "sgd",
                4e-4,
                "reference",
                20,
            )
            assert (optimizer.weight_decay, optimizer.bias_lr_factor, optimizer.momentum) == (1e-4, 2.0, 0.9)
            assert (config.views.pad_px, config.views.erase_probability, config.views.mean) == (
                10,
                0.5,
                (0.5, 0.5, 0.5),
            )
    assert sizes == {
        "finetune_market1501": (256, 128),
        "finetune_market1501_384": (384, 128),
        "finetune_msmt17": (256, 128),
        "finetune_msmt17_384": (384, 128),
    }
