from pathlib import Path
from typing import Any

import pytest

from passreid_ray.config import load_config, to_toml
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.engines.tune_config import TuneConfig
from passreid_ray.engines.tune_jobs import reported_metrics
from passreid_ray.engines.tune_plan import check_at_once, make_plan
from passreid_ray.errors import UserError
from tests.engines.sweep_micro import SPACE, sweep_config, sweep_plan

PRESETS = Path(__file__).parents[2] / "jobs" / "presets"


@pytest.mark.parametrize("path", sorted(PRESETS.glob("sweep_*.toml")), ids=lambda path: path.stem)
def test_a_preset_is_a_sweep_that_passes_every_check_and_survives_being_written(path: Path, tmp_path: Path) -> None:
    config = load_config(TuneConfig, [str(path)])
    make_plan(config, PRESETS)
    (tmp_path / "again.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(TuneConfig, [str(tmp_path / "again.toml")]) == config


def test_a_trial_has_the_settings_that_the_command_line_would_give_it(tmp_path: Path) -> None:
    plan = sweep_plan(tmp_path, overrides={"epochs": 2})
    config = plan.trial_config(7, {"optimizer.lr": 0.02, "student_temp": 0.2}, use_gpu=False)
    arguments = [plan.config.preset, "epochs=2", "optimizer.lr=0.02", "student_temp=0.2"]
    expected = load_config(PretrainConfig, [*arguments, "run.name=trial_0007", f"run.output={plan.trials_folder}"])
    assert config.model_copy(update={"workers": expected.workers}) == expected


def space_of(key: str, **dimension: Any) -> dict[str, Any]:
    section, _, name = key.partition(".")
    return {section: {name: dimension}} if name else {key: dimension}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": space_of("optimizer.lrr", kind="uniform", low=0.1, high=1)},
            "space.optimizer.lrr: pretrain refuses: optimizer.lrr: no such setting; did you mean optimizer.lr?",
        ),
        (
            {"space": space_of("student_temp", kind="uniform", low=0.0, high=1)},
            "space.student_temp: pretrain refuses 0.0: student_temp: expected more than 0",
        ),
        (
            {"space": space_of("precision", kind="choice", values=["fp32", "fp8"])},
            "space.precision: pretrain refuses 'fp8'",
        ),
        (
            {"space": space_of("workers.num_workers", kind="integer", low=1, high=2)},
            "space.workers.num_workers: is the sweep's own affair",
        ),
        ({"space": {}}, "space: empty"),
        ({"metric": "evaluation/map"}, "metric: pretrain never reports 'evaluation/map'; did you mean evaluation/mAP"),
        ({"second_metric": "speed"}, "second_metric: pretrain never reports 'speed'"),
        ({"overrides": {"epoch": 3}}, "epoch: no such setting; did you mean epochs"),
        ({"overrides": {"evaluation": {"data": "none"}}}, "there is no evaluation; give overrides.evaluation.data"),
        ({"searcher": {"kind": "grid"}}, "space.optimizer.lr: a grid cannot count through"),
        ({"searcher": {"kind": "evolution", "weights": ["koleo_weight"]}}, "evolution searches searcher.weights alone"),
        ({"scheduler": {"kind": "pbt"}}, "pbt trains its whole population at once, 4 trials, but concurrency"),
        (
            {"metric": "label_free/kl", "mode": "min", "scheduler": {"kind": "asha"}},
            "label_free/kl is known at the end of a trial only",
        ),
        (
            {
                "scheduler": {"kind": "pbt"},
                "concurrency": 4,
                "space": space_of("batch_size", kind="choice", values=[4, 8]),
            },
            "space.batch_size: cannot change in the middle of a run",
        ),
        (
            {"label_free": {"enabled": True, "num_clusters": 97}},
            "label_free.num_clusters: 97 clusters of 96 crops; lower it",
        ),
        ({"seed": 2**31}, "seed: expected"),
        ({"preset": "nowhere"}, "nowhere: no such preset file"),
    ],
)
def test_what_cannot_work_is_told_before_ray_starts(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        sweep_plan(tmp_path, **changes)
    assert message in str(caught.value)


def test_a_loss_that_only_some_trials_have_is_a_metric(tmp_path: Path) -> None:
    searched = {"masked_patch": {"weight": {"kind": "choice", "values": [0.0, 1.0]}}}
    with pytest.raises(UserError, match="pretrain never reports 'loss/patches'"):
        sweep_plan(tmp_path, metric="loss/patches")
    plan = sweep_plan(tmp_path, metric="loss/patches", space=searched)
    without, among = (reported_metrics(plan.job_config({"masked_patch.weight": own})) for own in (0.0, 1.0))
    assert among - without == {"loss/patches", "teacher_entropy/patches", "kl/patches"}


def test_a_population_that_the_cluster_has_no_room_for_is_told_what_to_lower(tmp_path: Path) -> None:
    plan = sweep_plan(tmp_path, scheduler={"kind": "pbt"}, concurrency=4)
    check_at_once(plan, fitting=4)
    with pytest.raises(UserError, match=r"the cluster has room for 3; lower budget\.trials"):
        check_at_once(plan, fitting=3)


def test_a_grid_ends_where_its_combinations_do(tmp_path: Path) -> None:
    space = {"student_temp": SPACE["student_temp"], "koleo_weight": {"kind": "choice", "values": [0.0, 0.1, 0.2]}}
    changes: dict[str, Any] = {"space": space, "searcher": {"kind": "grid"}}
    assert sweep_plan(tmp_path, **changes, budget={"trials": 100}).num_trials == 6
    assert sweep_plan(tmp_path, **changes, budget={"trials": 5}).num_trials == 5


def test_evolution_tries_each_weight_alone_on_the_job(tmp_path: Path) -> None:
    evolution = {"kind": "evolution", "weights": ["token_weights.0", "token_weights.1"]}
    changes: dict[str, Any] = {"space": {}, "searcher": evolution, "metric": "label_free/kl", "mode": "min"}
    with pytest.raises(UserError, match=r"space\.token_weights\.0: pretrain refuses"):
        sweep_plan(tmp_path, **changes)
    plan = sweep_plan(tmp_path, **changes, overrides={"token_weights": [1.0, 1.0, 1.0, 1.0]})
    weights = plan.job_config({"token_weights.0": 1.5, "token_weights.1": 0.5})
    assert weights.token_weights == [1.5, 0.5, 1.0, 1.0]  # pyright: ignore[reportAttributeAccessIssue]


def test_settings_of_a_sweep_are_one_object_in_all_ways_of_writing_them(tmp_path: Path) -> None:
    plain = sweep_config(tmp_path)
    typed = load_config(TuneConfig, [str(_written(plain, tmp_path)), "space.optimizer.lr.high=0.5"])
    assert typed.space["optimizer"]["lr"]["high"] == 0.5
    assert typed.space["student_temp"] == plain.space["student_temp"]


def _written(config: TuneConfig, folder: Path) -> Path:
    path = folder / "sweep.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return path
