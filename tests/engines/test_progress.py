from io import StringIO

import pytest
from rich.console import Console

from passreid_ray.engines import progress
from passreid_ray.engines.progress import LiveBar, PlainLines, run_progress


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.seconds)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), soft_wrap=True)


def test_a_log_file_gets_about_ten_lines_and_the_last_step(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    clock, shown = Clock(monkeypatch), run_progress(console)
    shown.start(0, 95)
    for step in range(1, 96):
        clock.seconds += 2
        shown.update(step, f"loss {step / 100}")
    shown.close()
    assert lines(console)[0] == "step 10 of 95  loss 0.1  0:02:50 left"
    assert lines(console)[-1] == "step 95 of 95  loss 0.95  0:00:00 left"
    assert len(lines(console)) == 10


def test_slow_steps_get_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    clock, shown = Clock(monkeypatch), PlainLines(console)
    shown.start(500, 10_000)
    for step in range(501, 521):
        clock.seconds += 10
        shown.update(step, "")
    assert [line.split()[1] for line in lines(console)] == ["503", "506", "509", "512", "515", "518"]


def test_what_is_said_appears_at_once_as_it_is(console: Console) -> None:
    PlainLines(console).say("step 3: [bold] " + "long " * 40, style="yellow")
    assert lines(console) == ["step 3: [bold] " + "long " * 40]


def test_a_terminal_gets_a_bar() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=100)
    shown = run_progress(console)
    assert isinstance(shown, LiveBar)
    shown.start(0, 10)
    shown.say("hello")
    shown.update(10, "loss 0.5")
    shown.close()
    text = "\n".join(lines(console))
    assert "hello" in text
    assert "10/10" in text
    assert "loss 0.5" in text
