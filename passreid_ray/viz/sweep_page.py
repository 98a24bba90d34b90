"""The report of a sweep: one HTML file that needs no network, for a finished sweep and for one that still runs."""

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from plotly.offline import get_plotlyjs

from passreid_ray.viz.sweep_figures import Figure, curves_figure, front_figure, importance_figure, settings_figure
from passreid_ray.viz.sweep_front import pareto_front
from passreid_ray.viz.sweep_importance import METHOD, MIN_TRIALS, importances
from passreid_ray.viz.sweep_record import SweepRecord, TrialRecord
from passreid_ray.viz.sweep_script import SCRIPT
from passreid_ray.viz.sweep_style import STYLE
from passreid_ray.viz.sweep_table import best_first, trials_table
from passreid_ray.viz.sweep_values import (
    compared_trials,
    cost,
    finite_value,
    number_text,
    seconds_text,
    setting_names,
)

BETTER = {"max": "larger is better", "min": "smaller is better"}


def write_sweep_page(sweep: SweepRecord, path: Path) -> None:
    """Write the page of ``sweep`` to ``path``; a reader finds the old page or the new one, never a part of one."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(sweep_page(sweep, datetime.now(UTC)), encoding="utf-8", newline="\n", errors="replace")
    os.replace(draft, path)


def sweep_page(sweep: SweepRecord, written_at: datetime) -> str:
    """The page as HTML: plotly.js, data and pictures are inside, nothing is loaded and nothing is sent.

    All texts of the sweep are escaped. Should one slip through all the same, the page's security policy runs only the
    scripts that are named by their hash.
    """
    figures: dict[str, Figure] = {}
    body = "\n".join(
        [
            *_head(sweep, written_at),
            *_table(sweep),
            *_settings(sweep, figures),
            *_curves(sweep, figures),
            *_importance(sweep, figures),
            *_front(sweep, figures),
            *_preset(sweep),
        ]
    )
    scripts = [get_plotlyjs(), SCRIPT] if figures else [SCRIPT]
    # Plotly compiles the shaders' calls of parallel coordinates with Function, which is what unsafe-eval allows.
    sources = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {sources} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
        "form-action 'none'; base-uri 'none'"
    )
    data = _json({name: asdict(figure) for name, figure in figures.items()})
    script_tags = "\n".join(f"<script>{script}</script>" for script in scripts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(sweep.name)}: sweep of {html.escape(sweep.job)}</title>
<style>{STYLE}</style>
</head>
<body>
<noscript><p>Pictures and sorting need JavaScript; the table and the preset are here without it.</p></noscript>
{body}
<script type="application/json" id="figures">{data}</script>
{script_tags}
</body>
</html>
"""


def _head(sweep: SweepRecord, written_at: datetime) -> Iterator[str]:
    counts = {status: sum(trial.status == status for trial in sweep.trials) for status in ("running", "failed")}
    finished = sum(trial.status == "finished" for trial in sweep.trials)
    stopped = sum(trial.status == "stopped early" for trial in sweep.trials)
    ended = finished + stopped + counts["failed"]
    planned = max(sweep.num_trials_planned, len(sweep.trials))
    yield f"<header><h1>{html.escape(sweep.name)}</h1>"
    yield (
        f'<p class="quiet">Sweep of {html.escape(sweep.job)} for {html.escape(sweep.metric)} ({BETTER[sweep.mode]}); '
        f"written {written_at:%Y-%m-%d %H:%M} UTC</p>"
    )
    if not sweep.is_done:
        yield (
            f'<div class="going"><b>Still running:</b> {ended} of {planned} trials have ended, '
            f"{counts['running']} are running, {planned - ended - counts['running']} wait. "
            f'Reload the page to see more.<progress max="{max(planned, 1)}" value="{ended}"></progress></div>'
        )
    seconds = sum(trial.seconds for trial in sweep.trials if math.isfinite(trial.seconds))
    facts = [
        (f"{finished} of {planned}", "planned trials finished"),
        (str(stopped), "stopped early"),
        (str(counts["failed"]), "failed"),
        (seconds_text(seconds) if seconds < 3600 else f"{number_text(seconds / 3600)} hours", "of all trials together"),
    ]
    if best := _best(sweep):
        value = finite_value(best, sweep.metric)
        shown = "no value" if value is None else number_text(value)
        facts.insert(0, (shown, f"best {sweep.metric}, by {best.trial_id}"))
    yield '<ul class="facts">'
    yield from (f"<li><b>{html.escape(figure)}</b>{html.escape(what)}</li>" for figure, what in facts)
    yield "</ul>"
    if not best:
        yield "<p>No trial is the best yet: none has ended with a value of the metric.</p>"
    if sweep.notes:
        yield '<ul class="notes">' + "".join(f"<li>{html.escape(note)}</li>" for note in sweep.notes) + "</ul>"
    yield "</header>"


def _table(sweep: SweepRecord) -> Iterator[str]:
    yield "<section><h2>All trials, best first</h2>"
    if sweep.trials:
        yield '<p class="quiet">A click on a head sorts by it. A trial\'s name leads to its folder.</p>'
        yield trials_table(sweep, best_first(sweep), "trials")
    else:
        yield '<p class="early">No trial has started yet.</p>'
    yield "</section>"


def _settings(sweep: SweepRecord, figures: dict[str, Figure]) -> Iterator[str]:
    metric = html.escape(sweep.metric)
    trials = compared_trials(sweep)
    yield f"<section><h2>Which settings go with which {metric}</h2>"
    if not trials or not setting_names(trials):
        reason = "searched settings" if trials else "trial that has ended with a value"
        yield f'<p class="early">Nothing to draw: there is no {reason}.</p></section>'
        return
    figures["settings"] = settings_figure(sweep, trials)
    yield (
        f'<p class="quiet">Each line is a finished or early stopped trial, {len(trials)} in all; the stronger its '
        "colour, the better its rank. Drag along an axis to pick trials, click on it to see all again; "
        "drag a name to move its axis.</p>"
    )
    yield f'<div class="wide">{_place("settings", figures["settings"])}</div></section>'


def _curves(sweep: SweepRecord, figures: dict[str, Figure]) -> Iterator[str]:
    metric = html.escape(sweep.metric)
    yield f"<section><h2>{metric} while the trials ran</h2>"
    figure = curves_figure(sweep)
    if figure is None:
        yield f'<p class="early">Nothing to draw: no trial has reported {metric} yet.</p></section>'
        return
    figures["curves"] = figure
    yield (
        '<p class="quiet">A mark shows where a trial is now or ended: a circle when it finished, an open square when '
        "it was stopped early, a cross when it failed. A click on a name in the legend hides its trials; "
        "dragging zooms in, a double click zooms out.</p>"
    )
    buttons = "".join(
        f'<button type="button" value="{name}" aria-pressed="{str(name == "time").lower()}">{name}</button>'
        for name in figure.switches
    )
    yield f'<div class="switch" data-figure="curves">{buttons}</div>{_place("curves", figure)}</section>'


def _importance(sweep: SweepRecord, figures: dict[str, Figure]) -> Iterator[str]:
    metric = html.escape(sweep.metric)
    trials = compared_trials(sweep)
    yield f"<section><h2>Which settings made a difference to {metric}</h2>"
    if len(trials) < MIN_TRIALS:
        yield (
            f'<p class="early">Too early to say: trials that have ended with a value: {len(trials)}. It takes '
            f"{MIN_TRIALS} for a first impression.</p></section>"
        )
        return
    shares = importances(
        [trial.settings for trial in trials], [finite_value(trial, sweep.metric) or 0.0 for trial in trials]
    )
    if not any(shares.values()):
        yield '<p class="early">Nothing to draw: no setting differs between the trials, or no value does.</p></section>'
        return
    figures["importance"] = importance_figure(shares)
    yield (
        f'<p class="quiet">How much of the difference between the ranks of {len(trials)} finished or early stopped '
        f"trials each setting explains by itself: {METHOD}. What is missing to 100 % are settings that act together. "
        "With few trials trust only large differences.</p>"
    )
    yield f"{_place('importance', figures['importance'])}</section>"


def _front(sweep: SweepRecord, figures: dict[str, Figure]) -> Iterator[str]:
    if sweep.second_metric is None:
        return
    metric, second = html.escape(sweep.metric), html.escape(sweep.second_metric)
    yield f"<section><h2>{metric} against {second}: trials that no other beats in both</h2>"
    front = front_trials(sweep)
    if not front:
        yield f'<p class="early">Nothing to draw: no trial has finished with both {metric} and {second}.</p></section>'
        return
    figures["front"] = front_figure(sweep, front)
    yield (
        f'<p class="quiet">Of {metric} {BETTER[sweep.mode]}, of {second} {BETTER[sweep.second_mode or "min"]}. Only '
        "finished trials can be on the front; their table is below it.</p>"
    )
    yield f"{_place('front', figures['front'])}{trials_table(sweep, front, 'front-trials')}</section>"


def front_trials(sweep: SweepRecord) -> list[TrialRecord]:
    """The finished trials on the Pareto front of both metrics, by the first one, best first."""
    second, second_mode = sweep.second_metric, sweep.second_mode or "min"
    candidates, costs = [], []
    for trial in compared_trials(sweep):
        first_value = finite_value(trial, sweep.metric)
        second_value = None if second is None else finite_value(trial, second)
        if trial.status == "finished" and first_value is not None and second_value is not None:
            candidates.append(trial)
            costs.append((cost(first_value, sweep.mode), cost(second_value, second_mode)))
    return [candidates[index] for index in pareto_front(costs)]


def _preset(sweep: SweepRecord) -> Iterator[str]:
    yield "<section><h2>The best preset</h2>"
    if sweep.best_toml:
        yield '<p class="quiet">The settings of the best trial as a job file.</p>'
        yield '<div class="preset"><button type="button" id="copy">copy</button>'
        # The parser drops one newline after <pre>; this one is for it.
        yield f'<pre id="preset">\n{html.escape(sweep.best_toml)}</pre></div>'
    else:
        yield '<p class="early">There is none yet.</p>'
    yield "</section>"


def _best(sweep: SweepRecord) -> TrialRecord | None:
    return next((trial for trial in sweep.trials if trial.trial_id == sweep.best_id), None)


def _place(name: str, figure: Figure) -> str:
    return f'<div id="{name}" style="min-width: {figure.min_width_px}px; height: {figure.layout["height"]}px"></div>'


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(value: object) -> str:
    """``value`` for a script element: nothing in it can end the element, and there is no NaN."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
