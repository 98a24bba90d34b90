"""The pictures of a sweep as plotly figures: plain dictionaries, coloured by names that the page's style sheet defines.

Texts are escaped: plotly reads a subset of HTML in them.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from passreid_ray.viz.sweep_axes import Axis, is_log_like, setting_axis
from passreid_ray.viz.sweep_record import ENDED, SweepRecord, TrialRecord, TrialStatus
from passreid_ray.viz.sweep_values import (
    compared_trials,
    finite_value,
    seconds_text,
    setting_names,
    setting_text,
    short_names,
    shortened,
)

MAX_POINTS = 100
"""Of one trial's curve; a page of 500 trials stays small, and a screen shows no more."""
MANY_TRIALS = 60
"""With more, curves and marks are drawn finer."""
AXIS_PX = 112
"""Least distance of parallel axes; the picture scrolls when the page is too narrow for it."""
MAX_LABEL_LETTERS = 15
MAX_TICK_LETTERS = 12
Point = tuple[float, float, float]
"""Seconds, step and value."""
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "itemsizing": "constant"}
CURVE_COLOURS: dict[TrialStatus, tuple[str, str]] = {
    "finished": ("var(--finished)", "circle"),
    "stopped early": ("var(--stopped)", "square-open"),
    "failed": ("var(--failed)", "x"),
    "running": ("var(--running)", "triangle-right"),
}
"""Colour and mark of a trial's last point."""


@dataclass(frozen=True)
class Figure:
    """One picture: traces and layout for plotly, its least width, and changes of the x axis that a button makes."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]
    min_width_px: int = 0
    switches: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By the button's name: ``x`` of every trace, and ``title`` of the axis."""


def settings_figure(sweep: SweepRecord, trials: Sequence[TrialRecord]) -> Figure:
    """Parallel coordinates: a line per trial through its settings, last its metric; strong colour for a good rank.

    ``trials`` have finite values and come best first.
    """
    names = setting_names(trials)
    labels = short_names(names)
    axes = [(labels[name], setting_axis([trial.settings.get(name) for trial in trials])) for name in names]
    axes.append((sweep.metric, setting_axis([finite_value(trial, sweep.metric) for trial in trials])))
    num_others = max(len(trials) - 1, 1)
    line = {
        # The last line lies on top: reversed, so that it is the best trial's.
        "color": [1 - rank / num_others for rank in range(len(trials))][::-1],
        "cmin": 0,
        "cmax": 1,
        "colorscale": [[0, "var(--rank-low)"], [0.5, "var(--rank-middle)"], [1, "var(--rank-high)"]],
    }
    dimensions = [_dimension(label, axis) for label, axis in axes]
    trace = {"type": "parcoords", "line": line, "dimensions": dimensions, "labelside": "top"}
    layout = {"height": 420, "margin": {"l": 70, "r": 70, "t": 60, "b": 24}}
    return Figure([trace], layout, min_width_px=140 + AXIS_PX * (len(axes) - 1))


def _dimension(label: str, axis: Axis) -> dict[str, Any]:
    # Plotly draws an axis from its first tick to its last: unnamed ticks at the ends make it whole.
    ends = dict.fromkeys(axis.range, "")
    ticks = ends | dict(zip(axis.tick_positions, axis.tick_texts, strict=True))
    return {
        "label": _escaped(shortened(label, MAX_LABEL_LETTERS)),
        "values": axis.positions[::-1],
        "range": list(axis.range),
        "tickvals": sorted(ticks),
        # Not escaped: the only texts that plotly shows as they are.
        "ticktext": [shortened(ticks[place], MAX_TICK_LETTERS) for place in sorted(ticks)],
    }


def curves_figure(sweep: SweepRecord) -> Figure | None:
    """The metric of every trial over time, and over steps by a button; None when nothing was reported yet.

    Trials of one status are one trace with gaps, which plotly draws fast; the best trial has its own.
    """
    curves = {trial.trial_id: _curve(trial, sweep.metric) for trial in sweep.trials}
    if not any(curves.values()):
        return None
    groups: list[tuple[TrialStatus, list[TrialRecord]]] = [
        (status, [trial for trial in sweep.trials if trial.status == status and trial.trial_id != sweep.best_id])
        for status in CURVE_COLOURS
    ]
    best = [trial for trial in sweep.trials if trial.trial_id == sweep.best_id]
    longest = max((point[0] for curve in curves.values() for point in curve), default=0.0)
    unit, unit_seconds = _time_unit(longest)
    is_few = len(sweep.trials) <= MANY_TRIALS
    data: list[dict[str, Any]] = []
    times: list[list[float | None]] = []
    steps: list[list[float | None]] = []
    for status, trials in groups:
        trials = [trial for trial in trials if curves[trial.trial_id]]
        if trials:
            colour, mark = CURVE_COLOURS[status]
            trace, time, step = _curve_trace(trials, curves, unit_seconds, mark_px=9 if is_few else 5)
            data.append(
                trace
                | {"name": f"{status} ({len(trials)})", "line": {"color": colour, "width": 1.2 if is_few else 0.6}}
            )
            data[-1]["marker"] |= {"symbol": mark, "color": colour}
            times.append(time)
            steps.append(step)
    for trial in best:
        if curves[trial.trial_id]:
            trace, time, step = _curve_trace([trial], curves, unit_seconds, mark_px=14)
            data.append(trace | {"name": "best trial", "line": {"color": "var(--best)", "width": 3}, "opacity": 1})
            data[-1]["marker"] |= {"symbol": "star", "color": "var(--best)"}
            times.append(time)
            steps.append(step)
    values = [point[2] for curve in curves.values() for point in curve]
    switches = {
        "time": {"x": times, "title": f"time since the trial's start, {unit}"},
        "steps": {"x": steps, "title": "steps"},
    }
    for trace, time in zip(data, times, strict=True):
        trace["x"] = time
    layout = {
        "height": 420,
        "margin": {"l": 70, "r": 16, "t": 16, "b": 50},
        "xaxis": {"title": {"text": switches["time"]["title"]}, "rangemode": "tozero"},
        "yaxis": _value_axis(sweep.metric, values),
        "legend": LEGEND,
        "hovermode": "closest",
    }
    return Figure(data, layout, switches=switches)


def _curve(trial: TrialRecord, metric: str) -> list[Point]:
    """(seconds, step, value) of each report with all three, thinned to ``MAX_POINTS``; the last one is always there."""
    keys = ("seconds", "step", metric)
    points = [(entry[keys[0]], entry[keys[1]], entry[metric]) for entry in trial.history if entry.keys() >= set(keys)]
    points = [point for point in points if all(map(math.isfinite, point))]
    stride = math.ceil(len(points) / MAX_POINTS) or 1
    return points[::-1][::stride][::-1]


def _curve_trace(
    trials: Iterable[TrialRecord], curves: dict[str, list[Point]], unit_seconds: float, *, mark_px: int
) -> tuple[dict[str, Any], list[float | None], list[float | None]]:
    """One trace of several curves with gaps between them, and its x in time and in steps."""
    times: list[float | None] = []
    steps: list[float | None] = []
    values: list[float | None] = []
    sizes_px: list[tuple[int, int]] = []
    texts: list[tuple[str, int]] = []
    for trial in trials:
        curve = curves[trial.trial_id]
        times += [*(_short(seconds / unit_seconds) for seconds, _, _ in curve), None]
        steps += [*(_short(step) for _, step, _ in curve), None]
        values += [*(_short(value) for _, _, value in curve), None]
        sizes_px += [(0, len(curve) - 1), (mark_px, 1), (0, 1)]
        texts.append((_escaped(shortened(trial.trial_id, 60)), len(curve) + 1))
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "y": values,
        # Plotly wants one per point; the page has (value, how often), and its script writes them out.
        "text": {"runs": texts},
        "marker": {"size": {"runs": sizes_px}, "opacity": 1, "line": {"width": 0}},
        "opacity": 0.75,
        "hovertemplate": "%{text}<br>%{y:.4g} at %{x:.4g}<extra></extra>",
    }
    return trace, times, steps


def importance_figure(shares: dict[str, float]) -> Figure:
    """A bar per setting with the share of the trials' differences that it explains alone, largest on top."""
    names = list(shares)[::-1]
    trace = {
        "type": "bar",
        "orientation": "h",
        # Numbers as places: two long names that are cut to one text keep their own bars.
        "y": list(range(len(names))),
        "x": [_short(shares[name]) for name in names],
        "text": [f"{100 * shares[name]:.3g} %" for name in names],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertext": [_escaped(name) for name in names],
        "hoverinfo": "text",
        "marker": {"color": "var(--finished)"},
    }
    layout = {
        "height": 70 + 30 * len(names),
        "margin": {"l": 200, "r": 60, "t": 8, "b": 50},
        "xaxis": {
            "title": {"text": "share explained"},
            "tickformat": ".0%",
            "rangemode": "tozero",
        },
        "yaxis": {
            "tickvals": list(range(len(names))),
            "ticktext": [_escaped(shortened(name, 30)) for name in names],
            "showgrid": False,
        },
        "bargap": 0.35,
    }
    return Figure([trace], layout)


def front_figure(sweep: SweepRecord, front: Sequence[TrialRecord]) -> Figure:
    """Both metrics of every compared trial, and the line of those in ``front``, which come by rising first cost."""
    metric, second = sweep.metric, sweep.second_metric or ""
    front_ids = {trial.trial_id for trial in front}
    others = [
        trial
        for trial in compared_trials(sweep)
        if trial.trial_id not in front_ids and finite_value(trial, second) is not None
    ]
    data = []
    for status in ENDED:
        trials = [trial for trial in others if trial.status == status]
        colour, mark = CURVE_COLOURS[status]
        if trials:
            data.append(
                _points(trials, metric, second)
                | {"mode": "markers", "name": status, "marker": {"color": colour, "symbol": mark, "size": 8}}
            )
    data.append(
        _points(front, metric, second)
        | {
            "mode": "lines+markers",
            "name": "front",
            # From one point to the next through the corner that is worse in both.
            "line": {"color": "var(--best)", "width": 2, "shape": "vh"},
            "marker": {"color": "var(--best)", "symbol": "diamond", "size": 10},
        }
    )
    xs = [value for trace in data for value in trace["x"]]
    ys = [value for trace in data for value in trace["y"]]
    layout = {
        "height": 420,
        "margin": {"l": 70, "r": 16, "t": 16, "b": 50},
        "xaxis": _value_axis(second, xs),
        "yaxis": _value_axis(metric, ys),
        "legend": LEGEND,
        "hovermode": "closest",
    }
    return Figure(data, layout)


def _points(trials: Sequence[TrialRecord], metric: str, second: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": [finite_value(trial, second) for trial in trials],
        "y": [finite_value(trial, metric) for trial in trials],
        "text": [_trial_text(trial) for trial in trials],
        "hovertemplate": "%{text}<br>%{y:.4g} at %{x:.4g}<extra></extra>",
    }


def _trial_text(trial: TrialRecord) -> str:
    """A trial and its settings, one a line."""
    lines = [f"{name} = {setting_text(value)}" for name, value in trial.settings.items()]
    lines = [trial.trial_id, f"{trial.status}, {seconds_text(trial.seconds)}", *lines]
    return "<br>".join(_escaped(shortened(line, 60)) for line in lines)


def _value_axis(name: str, values: Sequence[float]) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": _escaped(shortened(name, 60))}}
    return axis | {"type": "log"} if is_log_like(values) else axis


def _time_unit(seconds: float) -> tuple[str, float]:
    if seconds < 200:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 12_000 else ("hours", 3600.0)


def _short(value: float) -> float:
    """Six digits are more than a picture shows, and half the bytes."""
    return float(f"{value:.6g}")


def _escaped(text: str) -> str:
    # Plotly reads tags and most entities, but shows &quot; as it is.
    return html.escape(text, quote=False)
