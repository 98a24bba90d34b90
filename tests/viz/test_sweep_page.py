import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from passreid_ray.viz.sweep_axes import NOT_SET, is_log_like, setting_axis
from passreid_ray.viz.sweep_figures import MAX_POINTS
from passreid_ray.viz.sweep_front import pareto_front
from passreid_ray.viz.sweep_importance import importances
from passreid_ray.viz.sweep_page import front_trials, sweep_page, write_sweep_page
from passreid_ray.viz.sweep_record import SettingValue, SweepRecord, TrialRecord, TrialStatus
from passreid_ray.viz.sweep_table import folder_link
from passreid_ray.viz.sweep_values import number_text, short_names
from tests.viz.browser import CHROMIUM, Browser, Page, open_browser

NOW = datetime(2026, 3, 4, 5, 6, tzinfo=UTC)
EVIL = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>\"&lt;"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def trial(number: int, status: TrialStatus = "finished", **changes: Any) -> TrialRecord:
    """A trial whose mAP rises with its number, faster than its cost."""
    value = round(0.5 + 0.01 * number, 4)
    settings: dict[str, SettingValue] = {
        "optimizer.lr": 10.0 ** -(2 + number % 4),
        "loss.kind": ["circle", "arcface", "triplet"][number % 3],
        "views.use_erasing": number % 2 == 0,
    }
    if number % 3 == 1:
        settings["loss.margin"] = 0.1 * number
    history = [{"step": 10.0 * k, "seconds": 3.0 * k, "mAP": value * k / 4, "cost": 1.0 + number} for k in (1, 2, 3, 4)]
    metrics = {"mAP": value, "cost": 1.0 + number}
    return replace(
        TrialRecord(f"t{number}", settings, metrics, history, status, 12.0 + number, f"trials/t{number}"), **changes
    )


def sweep(trials: list[TrialRecord], **changes: Any) -> SweepRecord:
    best = max((t for t in trials if t.status == "finished"), key=lambda t: t.metrics.get("mAP", 0.0), default=None)
    record = SweepRecord(
        "market", "finetune", "mAP", "max", None, None, trials, best and best.trial_id, "", [], True, len(trials)
    )
    return replace(record, **changes)


def mixed_sweep() -> SweepRecord:
    """Every status, NaN, and texts that would run if they were not escaped."""
    failed = trial(9, "failed", metrics={"mAP": math.nan}, history=[], error=f"ValueError: {EVIL}", folder=EVIL)
    waiting = trial(11, "waiting", metrics={}, history=[], seconds=0.0)
    trials = [*map(trial, range(8)), trial(8, "stopped early"), failed, trial(10, "running"), waiting]
    trials[2] = replace(trials[2], trial_id=EVIL, settings={**trials[2].settings, EVIL: EVIL})
    return sweep(
        trials, name=EVIL, notes=[EVIL], best_toml=f"# {EVIL}\nlr = 1\n", second_metric="cost", second_mode="min"
    )


class Outline(HTMLParser):
    """Elements and the text of a page, as a parser sees them that knows nothing of how it was made."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.text += data
        if self.rows and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data


def figures(page: str) -> dict[str, Any]:
    found = re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_names_every_trial_best_first_the_stopped_after_the_finished_and_counts_them_by_status() -> None:
    outline = Outline(sweep_page(mixed_sweep(), NOW))
    ids = [row[0].removesuffix(" best") for row in outline.rows[1:13]]
    assert ids[:9] == ["t7", "t6", "t5", "t4", "t3", EVIL[:20] + "…" + EVIL[-19:], "t1", "t0", "t8"]
    assert ids[9:] == ["t10", "t9", "t11"]
    for fact in ("8 of 12", "0.57best mAP, by t7", "1stopped early", "1failed"):
        assert fact in outline.text.replace("\n", "")


def test_the_table_has_the_metrics_of_the_sweep_and_those_shown_beside() -> None:
    trials = [trial(0), trial(1, metrics={"mAP": 0.5})]
    outline = Outline(sweep_page(sweep(trials, also_shown=("cost",)), NOW))
    place = outline.rows[0].index("cost")
    assert outline.rows[0][place - 1] == "mAP"
    assert [row[place] for row in outline.rows[1:3]] == ["1", "–"]


def test_an_unfinished_sweep_says_how_far_it_is() -> None:
    trials = [trial(0), trial(1, "failed"), trial(2, "running")]
    going = Outline(sweep_page(sweep(trials, is_done=False, num_trials_planned=10), NOW)).text
    assert "2 of 10 trials have ended, 1 are running, 7 wait" in going
    assert "Still running" not in Outline(sweep_page(sweep(trials), NOW)).text


def test_no_text_of_the_sweep_becomes_an_element() -> None:
    outline = Outline(sweep_page(mixed_sweep(), NOW))
    assert [attrs for tag, attrs in outline.tags if tag == "img" or "onerror" in attrs] == []
    assert sum(tag == "script" for tag, _ in outline.tags) == 3  # data, plotly.js, the page's own
    assert outline.text.count(EVIL) >= 4  # name, note, error and preset are shown as they are
    links = [attrs["href"] or "" for tag, attrs in outline.tags if tag == "a"]
    assert links
    assert all(re.fullmatch(r"\./[\w/%.-]+/", link) for link in links)
    assert folder_link("javascript:alert(1)").startswith("./javascript%3A")


@pytest.mark.parametrize(
    ("trials", "drawn"),
    [
        ([], set()),
        ([trial(0)], {"settings", "curves"}),
        ([trial(n, "failed", metrics={}, history=[], error="x") for n in range(8)], set()),
        ([trial(n, metrics={"mAP": math.nan}, history=[]) for n in range(8)], set()),
        ([trial(n) for n in range(5)], {"settings", "curves"}),
        ([trial(n) for n in range(6)], {"settings", "curves", "importance"}),
        ([trial(n, settings={"lr": 0.1}) for n in range(8)], {"settings", "curves"}),
    ],
)
def test_only_what_can_be_drawn_is_drawn(trials: list[TrialRecord], drawn: set[str]) -> None:
    page = sweep_page(sweep(trials), NOW)
    assert set(figures(page)) == drawn
    assert ("Too early to say" in page) == (
        len([t for t in trials if math.isfinite(t.metrics.get("mAP", math.nan))]) < 6
    )


def test_the_page_replaces_the_old_one_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "sweep.html"
    path.write_text("old")
    write_sweep_page(sweep([trial(0)]), path)
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.html"]


def test_five_hundred_trials_with_long_histories_stay_a_small_page() -> None:
    history = [{"step": float(k), "seconds": k / 7, "mAP": 1 / (k + 1.3)} for k in range(250)]
    page = sweep_page(sweep([trial(n, history=history) for n in range(500)]), NOW)
    curves = figures(page)["curves"]["data"]
    assert sum(value is not None for trace in curves for value in trace["y"]) <= 500 * MAX_POINTS
    assert all(trace["y"][-2] == pytest.approx(1 / 250.3, rel=1e-5) for trace in curves)
    assert len(page) < 8_000_000


def test_a_setting_is_on_a_log_axis_when_its_values_are_spread_like_powers() -> None:
    assert is_log_like([1e-5, 3e-5, 1e-4, 5e-4, 1e-3])
    assert not is_log_like([0.01, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert not is_log_like([0.0, 1e-4, 1e-2])
    assert not is_log_like([2.0, 4.0, 8.0])
    axis = setting_axis([1e-4, 1e-2, 1e-3])
    assert axis.positions == pytest.approx([-4, -2, -3])
    assert axis.tick_texts == ["0.0001", "0.001", "0.01"]


def test_a_setting_that_some_trials_lack_has_a_place_of_its_own() -> None:
    numbers = setting_axis([0.2, None, 0.4])
    assert numbers.positions[1] < 0.2
    assert numbers.tick_texts[0] == NOT_SET
    words = setting_axis(["b", None, True, "a"])
    assert [words.tick_texts[int(place)] for place in words.positions] == ["b", NOT_SET, "true", "a"]
    assert len(set(words.positions)) == 4


def test_importance_finds_the_setting_that_decides_and_not_one_that_does_nothing() -> None:
    settings: list[dict[str, SettingValue]] = [
        {"decides": float(n % 8), "idle": (n * 7) % 5, "same": 1} | ({"kind": "a"} if n % 2 else {}) for n in range(40)
    ]
    shares = importances(settings, [float((n % 8) ** 2) for n in range(40)])
    assert next(iter(shares)) == "decides"
    assert shares["decides"] > 0.5
    assert shares["idle"] < 0.1
    assert shares["same"] == 0
    assert sum(shares.values()) <= 1 + 1e-9
    assert shares == importances(settings, [1e6 * (n % 8) ** 3 for n in range(40)])  # only the order counts


def test_the_front_is_what_nothing_dominates() -> None:
    costs = [(float((n * 37) % 23), float((n * 53) % 29)) for n in range(60)] + [(0.0, 40.0), (0.0, 40.0)]
    dominated = [any(a <= x and b <= y and (a, b) != (x, y) for a, b in costs) for x, y in costs]
    front = pareto_front(costs)
    assert sorted(front) == [index for index, is_out in enumerate(dominated) if not is_out]
    assert [costs[index] for index in front] == sorted(costs[index] for index in front)


def test_the_front_of_a_sweep_minds_both_directions_and_leaves_out_stopped_trials() -> None:
    values = [(0.9, 9.0), (0.8, 2.0), (0.7, 3.0)]
    trials = [trial(n, metrics={"mAP": value, "cost": cost}) for n, (value, cost) in enumerate(values)]
    trials.append(trial(3, "stopped early", metrics={"mAP": 0.99, "cost": 1.0}))
    record = sweep(trials, second_metric="cost", second_mode="min")
    assert [t.trial_id for t in front_trials(record)] == ["t0", "t1"]
    assert [t.trial_id for t in front_trials(replace(record, mode="min"))] == ["t2", "t1"]
    assert [t.trial_id for t in front_trials(replace(record, second_mode="max"))] == ["t0"]


def test_numbers_have_four_significant_digits_and_names_their_shortest_own_ending() -> None:
    texts = [number_text(x) for x in (0.123456, 12345.6, 3.21987e-7, 0.0, 7, math.nan, -math.inf)]
    assert texts == ["0.1235", "12350", "3.22e-7", "0", "7", "NaN", "-infinite"]
    assert short_names(["a.b.c", "x.c", "lr"]) == {"a.b.c": "b.c", "x.c": "x.c", "lr": "lr"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as running:
        yield running


def drawn(page: Page) -> None:
    page.wait_for("document.documentElement.dataset.drawn")


@needs_chromium
def test_a_page_opens_from_disk_draws_all_pictures_asks_for_nothing_and_runs_nothing_foreign(
    browser: Browser, tmp_path: Path
) -> None:
    path = tmp_path / "sweep.html"
    write_sweep_page(mixed_sweep(), path)
    with browser.page(path) as page:
        drawn(page)
        assert page.requests() == [path.as_uri()]
        assert page.complaints() == []
        assert page.evaluate("window.ran") is None
        for name in ("settings", "curves", "importance", "front"):
            assert page.evaluate(f"document.querySelectorAll('#{name} svg').length") > 0, name
        labels = page.evaluate("document.getElementById('settings').textContent")
        assert "</scri…" in labels  # a value as it is
        assert EVIL[-7:] in labels  # the end of a setting's name
        page.click(".switch button[value=steps]")
        assert page.evaluate("document.getElementById('curves').data[0].x.slice(0, 5)") == [10, 20, 30, 40, None]
        assert page.complaints() == []


@needs_chromium
def test_a_click_on_a_head_sorts_numbers_as_numbers_both_ways_with_missing_ones_last(
    browser: Browser, tmp_path: Path
) -> None:
    path = tmp_path / "sweep.html"
    values = [0.5, 10.0, 2.0, math.nan, 1e-5]
    trials = [trial(n, "running", metrics={"mAP": value}, history=[]) for n, value in enumerate(values)]
    trials.append(trial(10, "running", metrics={}, history=[]))
    write_sweep_page(sweep(trials), path)
    with browser.page(path) as page:
        ids = "#trials tbody td:first-child"
        page.click("#trials th:nth-child(3) button")
        assert page.texts(ids) == ["t4", "t0", "t2", "t1", "t3", "t10"]
        page.click("#trials th:nth-child(3) button")
        assert page.texts(ids) == ["t1", "t2", "t0", "t4", "t3", "t10"]
        page.click("#trials th:nth-child(1) button")
        assert page.texts(ids) == ["t0", "t1", "t2", "t3", "t4", "t10"]
        assert page.evaluate("document.querySelector('#trials th').getAttribute('aria-sort')") == "ascending"


@needs_chromium
def test_a_script_that_was_not_escaped_would_not_run_either(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "sweep.html"
    page_text = sweep_page(sweep([]), NOW)
    path.write_text(page_text.replace("<section>", "<script>window.ran = 1</script><section>", 1), encoding="utf-8")
    with browser.page(path) as page:
        drawn(page)
        assert page.evaluate("window.ran") is None
        assert any("Content Security Policy" in text for text in page.complaints())


@needs_chromium
def test_the_copy_button_copies_the_preset_as_it_was_written(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "sweep.html"
    preset = f"\n[loss]\nname = '{EVIL}'\n"
    write_sweep_page(sweep([], best_toml=preset), path)
    with browser.page(path) as page:
        page.evaluate("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
        page.click("#copy")
        page.wait_for("document.getElementById('copy').textContent === 'copied'")
        assert page.evaluate("window.copied") == preset
