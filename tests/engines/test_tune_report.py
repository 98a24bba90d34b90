import html
import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from passreid_ray.config import load_config
from passreid_ray.engines import tune
from passreid_ray.engines.live_metrics import SweepGauges
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.engines.tune import Reporter, check_continues, search
from passreid_ray.engines.tune_book import TrialEntry
from passreid_ray.engines.tune_plan import SweepPlan
from passreid_ray.engines.tune_report import (
    best_preset,
    print_table,
    ranked,
    sweep_record,
    trial_line,
    write_report,
)
from passreid_ray.engines.tune_searcher import Keeper
from passreid_ray.errors import UserError
from tests.engines.sweep_micro import sweep_plan

METRIC = "evaluation/mAP"


def entry(number: int, value: float | None, status: Any = "finished", **settings: Any) -> TrialEntry:
    metrics = {} if value is None else {METRIC: value}
    settings = settings or {"optimizer.lr": 0.01 * (1 + number), "student_temp": 0.1}
    return TrialEntry(number, settings, settings, 0, status, number, metrics, error="broken" if value is None else "")


ENTRIES = [
    entry(0, 0.3),
    entry(1, 0.5, "stopped early"),
    entry(2, 0.4),
    entry(3, None, "failed"),
    entry(4, math.nan),
    entry(5, 0.9, "running"),
]


class Shown(SweepGauges):
    """Keeps what it is told to show."""

    def __init__(self) -> None:
        super().__init__("pretrain", "sweep", METRIC, num_trials=4)
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, name: str, value: float, **more_labels: str) -> None:
        self.values[name, *more_labels.values()] = value


@pytest.fixture
def plan(tmp_path: Path) -> SweepPlan:
    return sweep_plan(tmp_path)


def test_finished_trials_come_before_stopped_ones_and_those_under_way_not_at_all(plan: SweepPlan) -> None:
    assert [own.number for own in ranked(plan, ENTRIES)] == [2, 0, 1]


def test_the_best_preset_is_the_trial_by_itself(plan: SweepPlan, tmp_path: Path) -> None:
    path = tmp_path / "best.toml"
    path.write_text(best_preset(plan, ENTRIES[2]), encoding="utf-8")
    found = load_config(PretrainConfig, [str(path)])
    trial = plan.trial_config(2, ENTRIES[2].settings, use_gpu=False)
    assert found.run.folder == tmp_path / "sweep_best"
    assert trial.workers.threads is not None  # its share of the cores, which decides how sums round
    assert found.workers == plan.base.workers.model_copy(update={"threads": trial.workers.threads})
    assert found.model_copy(update={"run": trial.run, "workers": trial.workers}) == trial
    assert found.optimizer.lr == 0.03
    text = path.read_text(encoding="utf-8")
    assert "evaluation/mAP = 0.4" in text
    assert f"python jobs/pretrain.py {plan.config.run.folder / 'best.toml'}\n" in text
    assert f"workers.threads={trial.workers.threads} is the trial's" in text


def test_the_table_has_a_row_for_each_trial_and_a_column_for_each_setting(plan: SweepPlan, tmp_path: Path) -> None:
    folder = plan.config.run.folder
    folder.mkdir()
    mixed = entry(6, 0.1, **{"views.global_scale": [0.3, 1.0], "student_temp": 0.2})
    write_report(plan, [*ENTRIES, mixed], [], is_done=False)
    table = pq.read_table(folder / "trials.parquet").to_pydict()
    assert table["number"] == [0, 1, 2, 3, 4, 5, 6]
    assert table["status"][1] == "stopped early"
    assert table["settings.student_temp"][6] == 0.2
    assert [own and json.loads(own) for own in table["settings.views.global_scale"]] == [None] * 6 + [[0.3, 1.0]]
    assert table[METRIC][:3] == [0.3, 0.5, 0.4]
    assert table[METRIC][3] is None
    assert (folder / "sweep.html").stat().st_size > 1000
    assert not list(folder.glob("*.part"))


def test_a_choice_of_tables_is_text_in_the_report(plan: SweepPlan) -> None:
    folder = plan.config.run.folder
    folder.mkdir()
    entries = [entry(0, 0.3, optimizer={"lr": 0.01}), entry(1, 0.4, optimizer={"final_lr": 0.02})]
    write_report(plan, entries, [], is_done=True)
    table = pq.read_table(folder / "trials.parquet").to_pydict()
    assert [json.loads(own) for own in table["settings.optimizer"]] == [own.settings["optimizer"] for own in entries]
    assert html.escape("{'final_lr': 0.02}") in (folder / "sweep.html").read_text(encoding="utf-8")


def test_the_rank_correlation_of_every_score_without_labels_with_map_is_in_the_report(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"label_free": {"enabled": True}}
    plan = sweep_plan(tmp_path, **changes)
    scores = [{"label_free/kl": 6.0 - n, "label_free/effective_rank": float(n)} for n in range(6)]
    entries = [TrialEntry(n, {}, {}, 0, "finished", n, {METRIC: 0.1 * n, **scores[n]}) for n in range(6)]
    of_kl, of_rank, of_uniformity = sweep_record(plan, entries, [], is_done=True).notes
    assert "label_free/kl and mAP: Spearman -1.00" in of_kl
    assert "label_free/effective_rank and mAP: Spearman +1.00" in of_rank
    assert "label_free/uniformity and mAP: no rank correlation" in of_uniformity


def test_tables_of_a_sweep_that_is_judged_without_labels_have_map_too_where_it_was_measured(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"metric": "label_free/kl", "mode": "min"}
    plan = sweep_plan(tmp_path, **changes)
    unmeasured = [TrialEntry(n, {}, {}, 0, "finished", n, {"label_free/kl": 1.0 - n}) for n in range(2)]
    measured = [TrialEntry(2, {}, {}, 0, "finished", 2, {"label_free/kl": 0.5, METRIC: 0.25})]
    console = Console(file=StringIO(), width=200)
    for entries, expected in ((unmeasured, ()), (unmeasured + measured, (METRIC,))):
        assert sweep_record(plan, entries, [], is_done=True).also_shown == expected
        print_table(plan, entries, console)
    assert isinstance(console.file, StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    first, second = (row for row in rows if "trial" in row)
    assert METRIC not in first
    assert second.index(METRIC) == second.index("label_free/kl") + 2
    assert any("0.25" in row for row in rows)


def test_the_table_and_lines_name_the_best_and_the_failed(plan: SweepPlan) -> None:
    console = Console(file=StringIO(), width=200)
    print_table(plan, ENTRIES, console)
    assert isinstance(console.file, StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert [row[1] for row in rows if row[0] == "│"] == ["2", "0", "1"]
    assert rows[-1][:2] == ["best:", "trial_0002"]
    assert trial_line(plan, ENTRIES[2], ENTRIES).endswith("best so far")
    assert trial_line(plan, ENTRIES[3], ENTRIES) == "trial_0003 failed: broken"


def test_there_is_no_table_before_a_trial_has_ended(plan: SweepPlan) -> None:
    console = Console(file=StringIO())
    print_table(plan, ENTRIES[5:], console)
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue() == ""


def test_a_sweep_of_failures_ends_with_a_line_and_keeps_what_there_is(plan: SweepPlan) -> None:
    keeper = Keeper(plan)
    for number in range(4):
        assert keeper.next_trial() is not None
        keeper.fail(number, "no space left")
    with pytest.raises(UserError, match=r"all 4 trials failed, the first: no space left\. Their folders are in"):
        Reporter(keeper, Console(file=StringIO()), [], Shown()).finish()
    folder = plan.config.run.folder
    assert pq.read_table(folder / "trials.parquet").to_pydict()["error"] == ["no space left"] * 4
    assert (folder / "sweep.html").is_file()
    assert not (folder / "best.toml").exists()


def test_the_gauges_of_a_sweep_follow_its_trials(plan: SweepPlan) -> None:
    keeper, shown = Keeper(plan), Shown()
    reporter = Reporter(keeper, Console(file=StringIO()), [], shown)
    assert shown.values["passreid_sweep_trials", "waiting"] == 4
    for number, value in enumerate((0.3, 0.5)):
        given = keeper.next_trial()
        assert given is not None
        keeper.report(number, dict(given.settings), {"step": 1, METRIC: value, "metrics": {METRIC: value}})
        reporter.changed(keeper.book.entries[number])
    assert shown.values["passreid_sweep_trials", "running"] == 2
    assert ("passreid_sweep_best", METRIC) not in shown.values
    for number in range(2):
        reporter.changed(keeper.end(number, {"finished": True}))
    assert shown.values["passreid_sweep_trials", "finished"] == 2
    assert shown.values["passreid_sweep_trials", "waiting"] == 2
    assert shown.values["passreid_sweep_best", METRIC] == 0.5


def test_trials_that_are_left_are_told(plan: SweepPlan) -> None:
    keeper = Keeper(plan)
    for _ in range(2):
        keeper.next_trial()
    keeper.end(1, {"finished": True})
    console = Console(file=StringIO(), width=200)
    Reporter(keeper, console, [], Shown()).finish()
    assert isinstance(console.file, StringIO)
    assert "3 trials are left" in console.file.getvalue()


def test_an_error_while_the_last_trials_run_is_not_lost(plan: SweepPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper(plan)

    def give_out_all_and_fail(*args: Any, **settings: Any) -> None:
        for _ in range(4):
            keeper.next_trial()
        keeper.end(0, {"finished": True})
        raise OSError("no space left")

    monkeypatch.setattr(tune.tune, "run", give_out_all_and_fail)
    with pytest.raises(OSError, match="no space left"):
        search(keeper, Reporter(keeper, Console(file=StringIO()), [], Shown()), use_gpu=False)


def test_a_sweep_goes_on_only_with_the_settings_that_it_was_made_with(tmp_path: Path) -> None:
    plan = sweep_plan(tmp_path)
    plan.config.run.folder.mkdir()
    check_continues(plan)
    Keeper(plan).next_trial()
    check_continues(sweep_plan(tmp_path, budget={"trials": 9}, concurrency=1, retries=5))
    with pytest.raises(UserError, match=r"made with seed = 0, now it is 1"):
        check_continues(sweep_plan(tmp_path, seed=1))
    with pytest.raises(UserError, match=r"epochs = 3, now it is 5"):
        check_continues(sweep_plan(tmp_path, overrides={"epochs": 5}))


def test_a_command_that_is_refused_leaves_the_record_of_the_sweep_as_it_was(tmp_path: Path) -> None:
    plan = sweep_plan(tmp_path)
    plan.config.run.folder.mkdir()
    check_continues(plan)
    Keeper(plan).next_trial()
    record = (plan.config.run.folder / "config.toml").read_bytes()
    with pytest.raises(UserError, match="epochs = 3, now it is 5"):
        check_continues(sweep_plan(tmp_path, overrides={"epochs": 5}))
    assert (plan.config.run.folder / "config.toml").read_bytes() == record


def test_a_sweep_that_is_older_than_a_setting_was_made_with_its_default(tmp_path: Path) -> None:
    plan = sweep_plan(tmp_path)
    plan.config.run.folder.mkdir()
    check_continues(plan)
    Keeper(plan).next_trial()
    for file, line in (("config.toml", "seed = 0\n"), ("job.toml", "koleo_weight = 0.0\n")):
        path = plan.config.run.folder / file
        text = path.read_text(encoding="utf-8")
        assert text.count(line) == 1
        path.write_text(text.replace(line, ""), encoding="utf-8")
    check_continues(sweep_plan(tmp_path))
    path.write_text(text.replace(line, ""), encoding="utf-8")
    with pytest.raises(UserError, match=r"made with koleo_weight = 0\.0, now it is 0\.5"):
        check_continues(sweep_plan(tmp_path, overrides={"koleo_weight": 0.5}))
